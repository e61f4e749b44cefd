"""Attacks on what a run hands over."""
