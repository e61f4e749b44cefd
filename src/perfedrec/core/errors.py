"""Errors that a person can act on.

Each carries one line that says what is wrong, where, and what was expected. The command line prints that line and
exits with :attr:`PerfedrecError.exit_code`; anything else that escapes is a bug and keeps its traceback.
"""


class PerfedrecError(Exception):
    """Base of all errors caused by input, configuration or stored state."""

    exit_code = 2


class DataError(PerfedrecError):
    """A data file or data specification cannot be understood."""


class ConfigError(PerfedrecError):
    """A configuration value or key is not valid."""


class CheckpointError(PerfedrecError):
    """A stored run or checkpoint is damaged, foreign or of another version."""


class DivergedError(PerfedrecError):
    """Training has left the numbers that can be computed with; options decide whether it does."""
