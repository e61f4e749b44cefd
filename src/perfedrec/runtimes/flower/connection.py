"""What a node and a coordinator share when they call a SuperLink: errors, trusted certificates, and long polling."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker

from perfedrec.core.address import Address
from perfedrec.core.errors import PerfedrecError, reason
from perfedrec.runtimes.flower.proxy import proxy_for, shown

UPLOAD_SECONDS = 60.0
"""The longest time until the next part of a message arrives, in seconds."""

TIMEOUT = 30.0
"""The longest time that a connection, or the next bytes on it, may take, in seconds. It is Flower's own."""

NODE_WAITS, COORDINATOR_WAITS = 2, 1
"""Whole seconds that our SuperLink may hold a request of a node or a coordinator until there is news. A process notices
a stop signal or the end of a deadline only after that time."""

Q = TypeVar("Q")
A = TypeVar("A")
Client = TypeVar("Client", bound=ProtobufClient)


class AwayError(PerfedrecError):
    """The SuperLink, or another process that is needed, cannot be reached at present: try again later."""

    exit_code = 3


class UnknownNameError(AwayError):
    """The name of the SuperLink's machine cannot be resolved: for a moment, or because it is wrong."""


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


class _ServerName:
    """An interceptor that lets the certificate of a server be checked for a ``name`` other than the one that is
    called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def intercept(
        self, context: ProtobufRequestContext, call_next: Callable[[ProtobufRequestContext], httpx.Response]
    ) -> httpx.Response:
        """Add the name to the request."""
        context.request.extensions["sni_hostname"] = self.name
        return call_next(context)


@dataclass(frozen=True)
class Endpoint:
    """Where a SuperLink listens, and how it is recognised: its certificate must be from the authority in the file
    ``ca``, and for the ``name`` (default: the host of the ``address``)."""

    address: Address
    ca: Path
    name: str | None = None

    def __str__(self) -> str:
        return str(self.address)

    @property
    def proxy(self) -> str | None:
        """The URL of the proxy through which the SuperLink is reached; ``None`` where there is none."""
        return proxy_for(self.address.host, self.address.port)

    def client(
        self,
        kind: type[Client],
        interceptors: Iterable[ProtobufClientInterceptor],
        retry_invoker: RetryInvoker | None = None,
    ) -> Client:
        """A client of a ``kind`` of Flower's for this SuperLink.

        It trusts the authority alone, and uses no proxy where none is needed. Flower's own constructor is passed over:
        it lets httpx read the environment, which finds proxies for addresses of this machine as well, and some that it
        cannot use. Raises :class:`PerfedrecError` where the authority's certificate cannot be read, or the proxy cannot
        be used.
        """
        named = () if self.name is None else (_ServerName(self.name),)
        client = kind.__new__(kind)
        client._base_url, client._retry_invoker = f"https://{self}", retry_invoker
        client._interceptors = (*interceptors, *named)
        client._client = httpx.Client(verify=trust(self.ca), timeout=TIMEOUT, proxy=self.proxy, trust_env=False)
        return client


def call(method: Callable[[Q], A], request: Q, endpoint: Endpoint) -> A:
    """Call a ``method`` of the SuperLink at an ``endpoint``.

    Raises :class:`AwayError` where waiting may help, :class:`UnknownNameError` where it helps if the name was mistaken
    for a moment only, :class:`StoppedError` where the run has ended, and :class:`RefusedError` otherwise.
    """
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _explained(error.response, endpoint) from None
    except httpx.TransportError as error:
        raise _unreached(error, endpoint) from None
    except (httpx.RequestError, ValueError):
        raise RefusedError(f"{endpoint}: {_STRANGER}") from None  # its answer is none of Flower's


_STRANGER = "what answers there is no coordinator; expected the host and port of perfedrec serve"


def _unreached(error: httpx.TransportError, endpoint: Endpoint) -> PerfedrecError:
    """The error for a request that got no answer."""
    causes = list[BaseException](_causes(error))
    for each in causes:
        if isinstance(each, ssl.SSLCertVerificationError):
            return RefusedError(f"{endpoint}: {_untrusted(each, endpoint)}")
    if any(isinstance(each, ssl.SSLError) and each.reason in _NO_TLS for each in causes):
        return RefusedError(f"{endpoint}: {_STRANGER}, which speaks TLS")
    host, proxy, why = endpoint.address.host, endpoint.proxy, str(error) or type(error).__name__
    if proxy is not None:
        refused = isinstance(error, httpx.ProxyError) and why.startswith(_PROXY_REFUSES)
        return (RefusedError if refused else AwayError)(
            f"{endpoint}: the coordinator cannot be reached through the proxy {shown(proxy)} ({why}); expected another "
            f"proxy in https_proxy, or no_proxy={host} if none is needed"
        )
    if any(isinstance(each, socket.gaierror) for each in causes):
        return UnknownNameError(f"{endpoint}: the name {host} cannot be resolved ({why})")
    return AwayError(f"{endpoint}: the coordinator cannot be reached ({why})")


_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNEXPECTED_MESSAGE")
"""OpenSSL's words for a server that does not speak TLS."""

_PROXY_REFUSES = ("401", "403", "407")
"""What a proxy answers that wants a password, or forbids the way."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _untrusted(error: ssl.SSLCertVerificationError, endpoint: Endpoint) -> str:
    """Why a certificate cannot be trusted, and what to do."""
    host = endpoint.name or endpoint.address.host
    other = f"it is not for {host}; expected a name or an address that is in the certificate"
    remedy = {
        _EXPIRED: "it has expired; renew it, or set the clock of this machine",
        _NOT_YET: "it is not valid yet; set the clock of this machine",
        _OTHER_NAME: other,
        _OTHER_ADDRESS: other,
    }.get(error.verify_code, f"{error.verify_message}; expected one from the authority in {endpoint.ca}")
    return f"its certificate cannot be trusted: {remedy}"


_NOT_YET, _EXPIRED, _OTHER_NAME, _OTHER_ADDRESS = 9, 10, 62, 64
"""Codes of OpenSSL (X509_V_ERR): the certificate is not yet valid, has expired, has another name or address."""


def _explained(response: httpx.Response, endpoint: Endpoint) -> PerfedrecError:
    """The error that a response with an HTTP error stands for."""
    status, known = response.status_code, FlowerError.from_json(response.text)
    if known is not None and known.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return AwayError(f"{endpoint}: the node with this key still counts as connected, or is not registered")
    if status == httpx.codes.UNAUTHORIZED:
        return UnknownKeyError(
            f"{endpoint}: this node's key is not accepted; expected a key that is registered with the coordinator, and "
            "a clock that is right to within a few seconds"
        )
    if status == httpx.codes.FORBIDDEN:
        return StoppedError(f"{endpoint}: the run has ended")
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return AwayError(f"{endpoint}: the coordinator's limit for this key is reached: {response.text[:200]}")
    if status in (502, 503, 504):
        return AwayError(f"{endpoint}: the coordinator is not ready (HTTP {status})")
    if status in (404, 405) and known is None:
        return RefusedError(f"{endpoint}: {_STRANGER} (HTTP {status})")
    detail = response.text[:200] if known is None else f"[{known.code}] {known.message}"
    return RefusedError(f"{endpoint}: HTTP {status}: {detail}")


def trust(ca: Path) -> ssl.SSLContext:
    """A context that trusts the certificates in the file ``ca``, and no others.

    Raises :class:`PerfedrecError` where the file cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:
        why = "is no certificate" if isinstance(error, ssl.SSLError) else f"cannot be read ({reason(error)})"
        raise PerfedrecError(f"{ca}: {why}; expected the certificate of an authority, such as ca.crt") from None
