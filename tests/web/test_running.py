"""Servers on a port of loopback and on a Unix socket, asked as programs ask them."""

import os
import signal
import socket
import stat
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from perfedrec.core.errors import ConfigError
from perfedrec.web.guard import Access, Guard
from perfedrec.web.running import listening, serving


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self.path))


def test_a_free_port_of_loopback_is_listened_on_until_the_end_of_the_block() -> None:
    access = Access()
    with listening() as listener:
        host, port = listener.socket.getsockname()
        assert (host, listener.address) == ("127.0.0.1", f"http://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"), listening(port):
            pass
        with serving(Guard(app, access), listener):
            asking = HTTPConnection(host, port)
            asking.request("GET", "/", headers={"Authorization": f"Bearer {access.token}"})
            answer = asking.getresponse()
            assert (answer.status, answer.read(), answer.getheader("server")) == (200, b"ok", None)
            asking.request(
                "POST", "/", body=iter([b"x" * (1 << 20), b"y"]), headers={"Authorization": f"Bearer {access.token}"}
            )
            assert asking.getresponse().status == 413
    with socket.socket() as after, pytest.raises(ConnectionRefusedError):
        after.connect((host, port))


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="a number from 0"), listening(port):
        pass


def test_a_unix_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Another user of the machine needs the right to write to a socket, and to enter its folder."""
    path = tmp_path / "new" / "home.socket"
    before = os.umask(0)
    try:
        with listening(unix=path) as listener:
            assert listener.address == str(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            with pytest.raises(ConfigError, match="another process listens there"), listening(unix=path):
                pass
            with serving(Guard(app, None), listener):
                asking = UnixConnection(path)
                asking.request("GET", "/")
                assert asking.getresponse().read() == b"ok"
        assert not path.exists()
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "home.socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listening(unix=path):
        assert path.is_socket()


def test_a_place_that_is_not_safe_or_not_free_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    long = tmp_path / ("x" * 120)
    for path, why in [
        (shared / "s", "could replace the socket"),
        (tmp_path / "file", "is no socket"),
        (tmp_path / "link", "is no socket"),
        (long, "at most 107 bytes"),
    ]:
        with pytest.raises(ConfigError, match=why), listening(unix=path):
            pass
    assert (tmp_path / "file").read_text() == "x"
    shared.chmod(0o1777)  # as /tmp: nobody can replace another user's file
    with listening(unix=shared / "s"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_with_code_0(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from perfedrec.web.running import listening, serve\n"
        "async def app(scope, receive, send): ...\n"
        "with listening(unix=Path(sys.argv[1])) as listener:\n"
        "    print(listener.address, flush=True); serve(app, listener)\n"
        "print('ended', flush=True)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{tmp_path / 's'}\n"
        asking = socket.socket(socket.AF_UNIX)
        asking.connect(str(tmp_path / "s"))
        asking.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asking.recv(100).startswith(b"HTTP/1.1 500")  # it runs: the app gave no answer
        asking.close()
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "ended\n"), errors
    assert not (tmp_path / "s").exists()
