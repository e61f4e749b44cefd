"""Centralised methods, for comparison: they have all users' interactions in one place."""
