"""Servers on this machine: a port of loopback or a Unix socket, until SIGTERM, SIGINT or the end of a block."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from perfedrec.core.errors import ConfigError, reason

LOOPBACK = "127.0.0.1"
GRACE = 5
"""Seconds that requests in progress have to be answered after the end was asked for."""

_BACKLOG = 2048


@dataclass(frozen=True)
class Listener:
    """A socket that listens. ``address`` is what people are told: ``http://127.0.0.1:PORT``, or the path of a Unix
    socket."""

    socket: socket.socket
    address: str


@contextmanager
def listening(port: int = 0, unix: Path | None = None) -> Iterator[Listener]:
    """Listen on a port of loopback (0: a free one), or on a Unix socket that only this user can use.

    Requests that come before the server runs wait for it. Raises :class:`ConfigError` for a port or a path that cannot
    be used.
    """
    if unix is not None:
        with _listening_on(unix) as found:
            yield found
        return
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port}: expected a port, a number from 0 (a free one) to 65535")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((LOOPBACK, port))
            bound.listen(_BACKLOG)
        except OSError as error:
            why = f"cannot be listened on ({error.strerror}); expected a free port, or 0 for any free one"
            raise ConfigError(f"--port {port}: {why}") from None
        yield Listener(bound, f"http://{LOOPBACK}:{bound.getsockname()[1]}")


@contextmanager
def _listening_on(path: Path) -> Iterator[Listener]:
    _check_place(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        before = os.umask(0o177)  # the socket never has another mode, not even for a moment
        try:
            bound.bind(str(path))
            bound.listen(_BACKLOG)
        except OSError as error:
            why = f"cannot be listened on ({error.strerror or error})"
            raise ConfigError(f"--unix {path}: {why}; expected a path of at most 107 bytes") from None
        finally:
            os.umask(before)
        try:
            yield Listener(bound, str(path))
        finally:
            path.unlink(missing_ok=True)


def _check_place(path: Path) -> None:
    """Make the folder of a socket, for this user alone, and remove a socket on which nobody listens any more.

    Raises :class:`ConfigError` where others could replace the socket, and where something else has its path.
    """
    folder = path.absolute().parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    foreign = found.st_uid not in (os.getuid(), 0)
    if foreign or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        why = f"other users of the machine can write to {folder}, and could replace the socket"
        raise ConfigError(f"--unix {path}: {why}; expected a folder of your own: chmod 700 {folder}")
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise ConfigError(f"--unix {path}: is there already and is no socket; expected a path of no file")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:  # left by a process that was killed
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--unix {path}: cannot be used ({reason(error)})") from None
        else:
            raise ConfigError(f"--unix {path}: another process listens there; expected another path, or end it")


class _Server(uvicorn.Server):
    """Ends after SIGTERM or SIGINT as after any other wish: without raising the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _server(app: ASGIApp) -> _Server:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
        backlog=_BACKLOG,
    )
    return _Server(config)


def serve(app: ASGIApp, listener: Listener) -> None:
    """Answer requests until SIGTERM or SIGINT."""
    _server(app).run([listener.socket])


@contextmanager
def serving(app: ASGIApp, listener: Listener) -> Iterator[None]:
    """Answer requests in a thread until the end of the block, beside what the process does otherwise."""
    server = _server(app)
    thread = threading.Thread(target=server.run, args=([listener.socket],), name="web", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
