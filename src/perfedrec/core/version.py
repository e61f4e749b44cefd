"""The version of this package, for all rooms; what is installed may be another one than what runs."""

__version__ = "0.16.0"
