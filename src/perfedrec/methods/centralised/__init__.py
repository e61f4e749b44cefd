"""Centralised methods, to compare with: everybody's interactions in one place."""
