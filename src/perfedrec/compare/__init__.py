"""Many runs at once: comparisons of methods, and searches for the best options."""
