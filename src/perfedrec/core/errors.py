"""Errors that a user can fix.

The message of each is one line that says what is wrong, where, and what was expected. The command line prints this
line and exits with :attr:`PerfedrecError.exit_code`. Any other exception that reaches the command line is a bug in
perfedrec, and is shown with its traceback.
"""


class PerfedrecError(Exception):
    """The base of all errors that are caused by input, configuration or stored files."""

    exit_code = 2


class DataError(PerfedrecError):
    """A data file or a data specification cannot be read."""


class ConfigError(PerfedrecError):
    """A key or a value of the configuration is not valid."""


class CheckpointError(PerfedrecError):
    """A stored run or checkpoint is damaged, belongs to other data or options, or has another format version."""


class DivergedError(PerfedrecError):
    """Training has diverged: its numbers are no longer finite. Whether this happens depends on the options."""


def check_length(k: int) -> None:
    """Raise :class:`ConfigError` where a list would have fewer than 1 item."""
    if k < 1:
        raise ConfigError(f"the length k of the list is {k}; expected 1 or more")


def reason(error: Exception) -> str:
    """The reason why a file could not be read or written, for a message that already names the file."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]
