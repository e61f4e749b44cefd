"""Attacks on the data that clients of a run send."""
