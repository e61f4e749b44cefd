"""Asking a server of this room from another process of the machine."""

from __future__ import annotations

import json
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from perfedrec.core.errors import ConfigError, PerfedrecError, reason

SECONDS = 30.0
"""Seconds that a server has to answer."""


class NoAnswerError(PerfedrecError):
    """A server that does not answer; trying again helps."""

    exit_code = 3


def ask(address: str, token: Path, path: str) -> dict[str, Any]:
    """The object at a ``path`` of the server at an ``address``, which is asked with the token in a file.

    Raises :class:`ConfigError` for an address that is none and for a token that is refused, and :class:`NoAnswerError`
    where nobody answers.
    """
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"{address}: expected an address such as http://127.0.0.1:9500")
    try:
        secret = token.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{token}: {reason(error)}; expected the file with the operator's token") from None
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError(f"{token}: holds no token; expected the file that the coordinator made")
    request = Request(f"http://{parts.netloc}{path}", headers={"Authorization": f"Bearer {secret}"})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            found = json.loads(answer.read())
    except HTTPError as error:
        detail = _detail(error)
        raise ConfigError(f"{address}: refuses to answer: {detail}") from None
    except (URLError, HTTPException, OSError) as error:
        why = error.reason if isinstance(error, URLError) else error
        raise NoAnswerError(f"{address}: does not answer ({why}); expected a page that is served there") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{address}: is no page of a coordinator; expected the address that serve has printed")
    return found


def _detail(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"status {error.code}"
