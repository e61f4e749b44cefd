"""Who may ask a server on this machine: the guard that stands before every page and every interface of this room.

A server on loopback can be reached by every program and by every user of the machine, and by every website that is open
in a browser there. So a request is refused

- if its ``Host`` is not an address of loopback: a website can let its own name point to this machine (DNS rebinding);
- if another origin has made it;
- if it has neither the token nor the cookie of this server. Where a Unix socket is listened on, the mode of the socket
  takes the place of the token;
- if its body is too long.
"""

from __future__ import annotations

import html
import json
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perfedrec.core.errors import ConfigError

BODY_LIMIT = 1 << 20
"""The longest body of a request, in bytes, where nothing else is said."""

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""The names of loopback, as they stand in a header. Any port may follow them: ssh can pass a port on."""

CONTENT_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # without any, browsers send forms with "Origin: null"
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Headers of every answer that does not set them itself."""

SHORTEST_TOKEN = 20
"""Characters. A token that this module makes has 43, which are 256 random bits."""


def token_file(path: Path) -> str:
    """The token in a file, which is made where it does not exist. Only its owner can read it.

    Raises :class:`ConfigError` where others can read the file, and where its content is no token.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        if (mode := path.stat().st_mode & 0o777) & 0o077:
            others = f"has mode {mode:03o}, so that other users of the machine can use it"
            raise ConfigError(f"{path}: {others}; expected mode 600: chmod 600 {path}") from None
        token = path.read_text(encoding="utf-8", errors="replace").strip()
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            what = f"expected at least {SHORTEST_TOKEN} letters and digits in one line"
            raise ConfigError(f"{path}: holds no token; {what}, or no file: then one is made") from None
        return token
    token = secrets.token_urlsafe(32)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(token + "\n")
    return token


class Access:
    """Who is let in: programs that send the ``token`` (by default a new one), and browsers with a cookie for which they
    have exchanged a one-time token. Tokens and cookies are compared in constant time."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(32)
        self.gives_addresses = False
        """Whether addresses with a one-time token were given out."""
        self._once: list[str] = []
        self._sessions: list[str] = []

    def one_time(self) -> str:
        """A new token that opens one session, to be put into an address as ``?token=``."""
        self.gives_addresses = True
        self._once.append(secrets.token_urlsafe(32))
        return self._once[-1]

    def exchange(self, one_time: str) -> str | None:
        """The value of the cookie of a new session; ``None`` where the one-time token was used, or never given out."""
        if (place := _place(one_time, self._once)) is None:
            return None
        del self._once[place]
        return self.session()

    def session(self) -> str:
        """The value of the cookie of a new session."""
        self._sessions.append(secrets.token_urlsafe(32))
        return self._sessions[-1]

    def admits(self, headers: Headers, cookie: str) -> bool:
        """Whether a request has the token, or a session in the cookie of this name."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _place(token.strip(), [self.token]) is not None:
            return True
        return _place(_cookies(headers).get(cookie, ""), self._sessions) is not None


def cookie_name(scope: Scope) -> str:
    """The name of the session's cookie. It has the port, because browsers do not keep cookies of ports apart."""
    server = scope.get("server")
    return f"perfedrec-{server[1] if server else None}"


def set_cookie(scope: Scope, session: str) -> str:
    """The value of the header ``Set-Cookie`` that gives a browser a session of :class:`Access`."""
    return f"{cookie_name(scope)}={session}; Path=/; HttpOnly; SameSite=Strict"


def _place(value: str, known: list[str]) -> int | None:
    """Where a value stands among known ones, which are all compared."""
    given = value.encode()
    same = [place for place, each in enumerate(known) if secrets.compare_digest(given, each.encode())]
    return same[0] if same else None


def _cookies(headers: Headers) -> dict[str, str]:
    try:
        return {name: each.value for name, each in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


@dataclass(frozen=True)
class RefusedError(Exception):
    """A request that is not passed on: the status of the answer, and why."""

    status: int
    detail: str


class Guard:
    """The app behind the guard. ``access`` says who is let in; with ``None``, as on a Unix socket, nobody is asked for
    a token. ``open_paths`` need none either. Bodies have at most ``body_limit`` bytes, and are read before the app is
    called. What is refused gets one line: as JSON with the key ``detail``, or as a page where a browser asked.

    A browser that asks for a page without the cookie is led to ``enter``, the path of a form for the token, or else is
    told the ``advice``, which says how to get an address with a one-time token."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access | None,
        *,
        body_limit: int = BODY_LIMIT,
        open_paths: Collection[str] = (),
        enter: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.app, self.access, self.body_limit, self.open_paths = app, access, body_limit, frozenset(open_paths)
        self.enter, self.advice = enter, advice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, send = Headers(scope=scope), _with_headers(send)
        try:
            _check_origin(headers)
            location = self._entered(scope, headers)
            if location is not None:
                await (_step if _is_followed(headers) else _redirect)(send, *location)
                return
            if "content-length" in headers or "transfer-encoding" in headers:
                receive = await _whole(headers, receive, self.body_limit)
        except RefusedError as refused:
            await _refuse(send, refused, headers)
            return
        await self.app(scope, receive, send)

    def _entered(self, scope: Scope, headers: Headers) -> tuple[str, str | None] | None:
        """Raise :class:`RefusedError` where the token is missing. Where the address has a one-time token: the address
        without it, and the cookie that is given for it (none where the browser has one). Where a browser has to give
        the token first: the address of the form for it."""
        if self.access is None or scope["path"] in self.open_paths:
            return None
        known = self.access.admits(headers, cookie_name(scope))
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        once = query.pop("token", None) if scope["method"] == "GET" else None
        if once is None and known:
            return None
        session = None if once is None or known else self.access.exchange(once)
        if session is None and not known:
            by_browser = scope["method"] == "GET" and _wants_page(headers)
            if by_browser and self.enter is not None:
                return self.enter, None
            if once is not None and self.access.gives_addresses:
                used = "this address was used already, or is of an earlier start"
                raise RefusedError(401, f"{used}: {self.advice or 'ask for a new one'}")
            if by_browser and self.advice is not None:
                raise RefusedError(401, f"this browser has no key for this page: {self.advice}")
            raise RefusedError(401, "the token is missing or wrong; expected the header Authorization: Bearer TOKEN")
        # A path that begins with two slashes would be another machine's address.
        path = "/" + scope["raw_path"].decode("latin-1").lstrip("/")
        address = path + ("?" + urlencode(query) if query else "")
        return address, None if session is None else set_cookie(scope, session)


def _check_origin(headers: Headers) -> None:
    """Raise :class:`RefusedError` for a foreign host, and where another origin has made the request."""
    hosts = headers.getlist("host")
    if len(hosts) != 1:
        raise RefusedError(400, f"the request has {len(hosts)} headers Host; expected one")
    name, _, port = hosts[0].rpartition(":") if not hosts[0].endswith("]") else (hosts[0], "", "")
    name, port = (name, port) if name else (port, "")
    if name.lower() not in HOSTS or not (port == "" or (port.isascii() and port.isdecimal())):
        raise RefusedError(421, "this server answers on loopback alone; expected the Host 127.0.0.1 or localhost")
    origins = headers.getlist("origin")
    foreign = any(each.lower() != f"http://{hosts[0].lower()}" for each in origins)
    if foreign or (_is_elsewhere(headers) and not _is_followed(headers)):
        raise RefusedError(403, "a page of another origin has made this request; expected one of this server")


def _wants_page(headers: Headers) -> bool:
    """Whether somebody asks with a browser, and no program does."""
    return "text/html" in headers.get("accept", "")


def _is_elsewhere(headers: Headers) -> bool:
    """Whether another site has made a request, as browsers say."""
    return headers.get("sec-fetch-site") in ("cross-site", "same-site")


def _is_followed(headers: Headers) -> bool:
    """Whether somebody follows an address from elsewhere, which is harmless: the page that opens stands alone."""
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return _is_elsewhere(headers) and navigates


async def _whole(headers: Headers, receive: Receive, limit: int) -> Receive:
    """Read a body to its end, and give it on as one message. Raises :class:`RefusedError` where it is too long."""
    too_long = RefusedError(413, f"the body is too long; expected at most {limit} bytes")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()):
        raise RefusedError(400, "the header Content-Length is no number")
    if int(length) > limit:
        raise too_long
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break  # the client has gone, which the app shall see
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_long
        more = message.get("more_body", False)
    waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": more}]

    async def whole() -> Message:
        return waiting.pop() if waiting else await receive()

    return whole


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            message = {**message, "headers": headers.raw}
        await send(message)

    return sending


async def _refuse(send: Send, refused: RefusedError, headers: Headers) -> None:
    if _wants_page(headers):
        text = html.escape(refused.detail)
        page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{refused.status}</title><p>{text}</p></html>"
        await _answer(send, refused.status, page.encode(), {"content-type": "text/html; charset=utf-8"})
        return
    ask = {"www-authenticate": "Bearer"} if refused.status == 401 else {}
    body = json.dumps({"detail": refused.detail}).encode()
    await _answer(send, refused.status, body, {"content-type": "application/json", **ask})


async def _redirect(send: Send, location: str, cookie: str | None) -> None:
    given = {} if cookie is None else {"set-cookie": cookie}
    await _answer(send, 303, b"", {"location": location, **given})


async def _step(send: Send, location: str, cookie: str | None) -> None:
    """A page that leads on. After a redirect from another site, as in the terminal of an editor that is a web page, a
    browser would keep back the cookie that it has just been given."""
    given = {} if cookie is None else {"set-cookie": cookie}
    to = html.escape(location)
    page = "<!doctype html><html lang=en><meta charset=utf-8><title>perfedrec</title><meta http-equiv=refresh "
    page += f'content="0; url={to}"><p><a href="{to}">Open the page</a></p></html>'
    await _answer(send, 200, page.encode(), {"content-type": "text/html; charset=utf-8", **given})


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, Any]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
