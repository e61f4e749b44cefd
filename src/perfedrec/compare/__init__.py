"""Comparisons of many runs: benchmarks, and searches for options."""
