"""Why a file cannot be read or written, in plain words."""

import errno
import json
import os
import ssl

import pytest

from perfedrec.core.errors import reason


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOENT, "there is no such file or folder"),
        (errno.EISDIR, "it is a folder"),
        (errno.EACCES, "this user has no permission"),
        (errno.EPIPE, "broken pipe"),  # no error of a path: the system's own words
    ],
)
def test_errors_of_paths_are_said_in_plain_words(number: int, said: str) -> None:
    assert reason(OSError(number, os.strerror(number), "a/b")) == said


def test_numbers_that_mean_something_else_are_not_taken_for_errors_of_paths() -> None:
    """Errors of OpenSSL have number 1, which is that of a missing permission."""
    assert reason(ssl.SSLError(errno.EPERM, "a handshake failed")) == "a handshake failed"
    assert (
        reason(FileNotFoundError(errno.ENOENT, "No folder of [a, b] can be used")) == "no folder of [a, b] can be used"
    )
    assert reason(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no start")) == "it is not UTF-8 text"
    assert reason(ValueError("A text")) == "a text"


def test_what_python_says_of_damaged_json_is_said_in_plain_words() -> None:
    def said(text: str) -> str:
        try:
            json.loads(text)["format"]
        except Exception as error:
            return reason(error)
        return ""

    assert said("{") == "it is not JSON: line 1, column 2"
    assert said("{}") == 'it has no "format"'
    assert [said(text) for text in ("[]", "5", "null", '"text"')] == ["it has another form"] * 4
    assert reason(RecursionError("maximum depth")) == "it is nested too deeply"
