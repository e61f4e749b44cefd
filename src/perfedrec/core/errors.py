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


def reason(error: Exception) -> str:
    """Why a file could not be read or written, for a message that names the file: without its number and path."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said[:1].lower() + said[1:]
