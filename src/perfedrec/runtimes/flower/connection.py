"""What a node and a coordinator share when they call a SuperLink: errors, trusted certificates, and long polling."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.client import ProtobufRequestContext

from perfedrec.core.errors import PerfedrecError

UPLOAD_SECONDS = 60.0
"""The longest time that the parts of one message may take to arrive, in seconds."""

NODE_WAITS, COORDINATOR_WAITS = 2, 1
"""Whole seconds that our SuperLink may hold a request of a node or a coordinator until there is news. A process notices
a stop signal or the end of a deadline only after that time."""

Q = TypeVar("Q")
A = TypeVar("A")


class AwayError(PerfedrecError):
    """The SuperLink, or another process that is needed, cannot be reached at present: try again later."""

    exit_code = 3


class RefusedError(PerfedrecError):
    """The SuperLink cannot be trusted, or it does not accept this node or coordinator: trying again does not help."""

    exit_code = 4


class UnknownKeyError(RefusedError):
    """The SuperLink does not accept the signature of a node."""


class StoppedError(PerfedrecError):
    """The run that a message belongs to has ended."""


class LongPolling:
    """An interceptor that lets the SuperLink hold each request up to ``seconds`` until there is news (RFC 7240)."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def intercept(
        self, context: ProtobufRequestContext, call_next: Callable[[ProtobufRequestContext], httpx.Response]
    ) -> httpx.Response:
        """Add the header to the request."""
        context.request.headers["prefer"] = f"wait={self.seconds}"
        return call_next(context)


def call(method: Callable[[Q], A], request: Q, address: str) -> A:
    """Call a ``method`` of the SuperLink at ``address``.

    Raises :class:`AwayError` where waiting may help, :class:`StoppedError` where the run has ended, and
    :class:`RefusedError` otherwise.
    """
    try:
        return method(request)
    except httpx.TransportError as error:
        if "certificate" in str(error).lower():
            raise RefusedError(
                f"{address}: its certificate cannot be trusted ({error}); expected one of --ca"
            ) from None
        raise AwayError(f"{address}: the coordinator cannot be reached ({error})") from None
    except httpx.HTTPStatusError as error:
        raise _explained(error.response, address) from None


def _explained(response: httpx.Response, address: str) -> PerfedrecError:
    """The error that a response with an HTTP error stands for."""
    status, known = response.status_code, FlowerError.from_json(response.text)
    if known is not None and known.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return AwayError(f"{address}: the node with this key still counts as connected, or is not registered")
    if status == httpx.codes.UNAUTHORIZED:
        return UnknownKeyError(
            f"{address}: this node's key is not accepted; expected a key that is registered with the coordinator, and "
            "a clock that is right to within a few seconds"
        )
    if status == httpx.codes.FORBIDDEN:
        return StoppedError(f"{address}: the run has ended")
    if status in (502, 503, 504):
        return AwayError(f"{address}: the coordinator is not ready (HTTP {status})")
    detail = response.text[:200] if known is None else f"[{known.code}] {known.message}"
    return RefusedError(f"{address}: HTTP {status}: {detail}")


def trust(ca: Path) -> ssl.SSLContext:
    """A context that trusts the certificates in the file ``ca``, and no others.

    Raises :class:`PerfedrecError` where the file cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise PerfedrecError(
            f"{ca}: cannot be read ({error}); expected the certificate of an authority, such as ca.crt"
        ) from None
