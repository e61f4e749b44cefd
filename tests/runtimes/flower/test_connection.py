"""What a node says about a coordinator that it cannot reach or trust, and when it tries again."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from perfedrec.core.address import Address
from perfedrec.core.errors import PerfedrecError
from perfedrec.federation.certificates import make_certificates
from perfedrec.runtimes.flower import AwayError, Endpoint, RefusedError, node_loop
from perfedrec.runtimes.flower.connection import UnknownNameError, call
from perfedrec.runtimes.flower.node_loop import Activity, run_node


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Certificates for fed.example.org, in an environment without proxies."""
    for name in ("https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    make_certificates(tmp_path, ["fed.example.org"])
    return tmp_path


@contextmanager
def server(files: Path | None, status: int = 200, body: bytes = b"", host: str = "127.0.0.1") -> Iterator[Address]:
    """A web server that answers every request, with TLS where there are certificates."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_CONNECT(self) -> None:
            self.send_error(status)

        def log_message(self, format: str, *given: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the client has gone

    with Server((host, 0), Handler) as running:
        if files is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files / "server.pem", files / "server.key")
            running.socket = context.wrap_socket(running.socket, server_side=True)
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield Address(host, running.server_address[1])
        running.shutdown()
        thread.join()


def error_of(endpoint: Endpoint) -> PerfedrecError:
    with endpoint.client(FleetHttpClient, []) as client, pytest.raises(PerfedrecError) as found:
        call(client.ActivateNode, ActivateNodeRequest(), endpoint)
    return found.value


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("proxies", [{}, {"HTTPS_PROXY": "http://127.0.0.1:9"}, {"all_proxy": "socks://127.0.0.1:9"}])
def test_a_machine_finds_itself_by_a_name_of_its_certificate_and_past_all_proxies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, host: str, proxies: dict[str, str]
) -> None:
    """The certificate has neither the address nor ``localhost``."""
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with server(folder, host=host) as address:
        endpoint = Endpoint(address, folder / "ca.crt", "fed.example.org")
        with endpoint.client(FleetHttpClient, []) as client:
            assert call(client.ActivateNode, ActivateNodeRequest(), endpoint).node_id == 0  # an empty answer
        error = error_of(Endpoint(address, folder / "ca.crt"))
    assert isinstance(error, RefusedError)
    assert f"{address}: its certificate cannot be trusted: it is not for {host}; expected a name" in str(error)


def test_a_certificate_of_another_authority_is_not_trusted(folder: Path) -> None:
    make_certificates(folder / "other", ["127.0.0.1"])
    with server(folder / "other") as address:
        error = error_of(Endpoint(address, folder / "ca.crt"))
    assert isinstance(error, RefusedError)
    assert str(error).endswith(f"expected one from the authority in {folder / 'ca.crt'}")


@pytest.mark.parametrize(
    ("tls", "status", "body"), [(False, 200, b""), (True, 404, b"<html>"), (True, 200, b"<html>welcome")]
)
def test_trying_again_does_not_turn_another_server_into_a_coordinator(
    folder: Path, tls: bool, status: int, body: bytes
) -> None:
    with server(folder if tls else None, status, body) as address:
        error = error_of(Endpoint(address, folder / "ca.crt", "fed.example.org"))
    assert isinstance(error, RefusedError)
    assert "what answers there is no coordinator; expected the host and port of perfedrec serve" in str(error)


def test_a_coordinator_that_is_away_is_tried_again(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = error_of(Endpoint(Address("127.0.0.1", port), folder / "ca.crt"))
    assert type(error) is AwayError
    assert str(error) == f"127.0.0.1:{port}: the coordinator cannot be reached ([Errno 111] Connection refused)"


@pytest.mark.parametrize(("status", "kind"), [(403, RefusedError), (407, RefusedError), (502, AwayError)])
def test_the_proxy_that_fails_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[PerfedrecError]
) -> None:
    with server(None, status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{proxy}")
        error = error_of(Endpoint(Address("fed.example.org", 18000), folder / "ca.crt"))
    assert type(error) is kind
    assert f"through the proxy http://{proxy} ({status} " in str(error)
    assert "no_proxy=fed.example.org if none is needed" in str(error)
    assert "secret" not in str(error)
    error = error_of(Endpoint(Address("fed.example.org", 18000), folder / "ca.crt"))  # now the proxy is away
    assert type(error) is AwayError
    assert f"through the proxy http://{proxy} ([Errno 111]" in str(error)


def test_a_name_that_cannot_be_resolved_is_tried_for_a_while_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*given: Any, **named: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    endpoint = Endpoint(Address("fed.example.org", 18000), folder / "ca.crt")
    error = error_of(endpoint)
    assert type(error) is UnknownNameError
    assert str(error) == (
        "fed.example.org:18000: the name fed.example.org cannot be resolved ([Errno -2] Name or service not known)"
    )
    clock, stop, lines = Clock(), threading.Event(), list[str]()
    monkeypatch.setattr(node_loop.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(stop, "wait", clock.wait)
    with pytest.raises(UnknownNameError, match="expected --coordinator HOST:PORT with a name that is known here"):
        run_node(lambda: offline(error), app(), stop, lines.append)
    assert clock.now > node_loop.NAME_SECONDS
    assert all("for 60 s in all" in each for each in lines)
    # a coordinator that was reached before has a right name: this may last as long as it likes
    clock.now, ends = 0.0, 3 * node_loop.NAME_SECONDS
    monkeypatch.setattr(stop, "is_set", lambda: clock.now > ends)
    seen = [online(), *(offline(error) for _ in range(1000))]
    monkeypatch.setattr(node_loop, "_answer_all", fail(error))
    run_node(lambda: seen.pop(0), app(), stop, lines.append)
    assert clock.now > ends


class Clock:
    now = 0.0

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


def fail(error: Exception) -> Callable[..., Any]:
    def failing(*given: Any) -> Any:
        raise error

    return failing


def offline(error: Exception) -> Any:
    return SimpleNamespace(activate=fail(error), close=lambda: None, endpoint="fed")


def online() -> Any:
    return SimpleNamespace(activate=lambda: 7, close=lambda: None, endpoint="fed")


def app() -> Any:
    return SimpleNamespace(app=lambda: None, activity=Activity(), description="nothing", absence=None)
