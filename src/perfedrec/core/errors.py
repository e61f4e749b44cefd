"""Errors that a user can fix.

The message of each is one line that says what is wrong, where, and what was expected. The command line prints this
line and exits with :attr:`PerfedrecError.exit_code`. Any other exception that reaches the command line is a bug in
perfedrec, and is shown with its traceback.
"""

import errno
import os
from json import JSONDecodeError


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
    """The reason why a file could not be read or written, for a message that already names the file: a clause about
    "it". The words of Python and of the system are for those who know these."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, JSONDecodeError):
        return f"it is not JSON: line {error.lineno}, column {error.colno}"
    if isinstance(error, KeyError):
        return f'it has no "{error.args[0]}"' if error.args else "a name is missing in it"
    if isinstance(error, TypeError | AttributeError):
        return "it has another form"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text, number = error.strerror, error.errno or 0
        if text == os.strerror(number):  # OpenSSL and others give the same numbers other meanings
            text = _PLAIN.get(number, text)
    return text[:1].lower() + text[1:]


_PLAIN = {
    errno.ENOENT: "there is no such file or folder",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "what should be a folder is a file",
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this user has no permission",
    errno.EROFS: "the disk can only be read",
    errno.EEXIST: "something of this name is there already",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "this user has no more room on the disk",
    errno.ENAMETOOLONG: "its name is too long",
}
"""What the system says of a file, in plain words. They are a clause of their own, so that they fit into any message."""
