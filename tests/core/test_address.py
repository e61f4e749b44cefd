"""How addresses are read, and what is said about those that cannot be."""

from __future__ import annotations

import pytest

from perfedrec.core.address import Address, own, parse_host
from perfedrec.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:18000", "localhost", 18000),
        ("fed.example.org.:1", "fed.example.org.", 1),
        ("my_host:65535", "my_host", 65535),
        ("192.0.2.7:18000", "192.0.2.7", 18000),
        ("[::1]:18000", "::1", 18000),
        ("[2001:DB8::0007]:18000", "2001:db8::7", 18000),
        ("föd.example.org:1", "xn--fd-fka.example.org", 1),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    found = Address.parse(text, "--coordinator")
    assert (found.host, found.port) == (host, port)
    assert Address.parse(str(found), "--coordinator") == found


@pytest.mark.parametrize(
    ("text", "fault", "meant"),
    [
        ("https://localhost:18611", "needs no https://", "localhost:18611"),
        ("http://fed.example.org/", "needs no http://", "fed.example.org:18000"),
        ("grpc://[::1]", "needs no grpc://", "[::1]:18000"),
        ("fed.example.org", "has no port", "fed.example.org:18000"),
        ("fed.example.org:", "has no port", "fed.example.org:18000"),
        ("[::1]", "has no port", "[::1]:18000"),
        ("::1", "stands in brackets", "[::1]:18000"),
        ("::1:18611", "stands in brackets", "[::1]:18611"),
        ("::1:8080", "stands in brackets", "[::1]:8080"),  # it could also be the address ::1:8080
        ("2001:db8::7:2", "stands in brackets", "[2001:db8::7:2]:18000"),
        ("host:18000/path", "more than a host and a port", "host:18000"),
        ("user@host:18000", "more than a host and a port", "host:18000"),
        (" host:18000 ", "more than a host and a port", "host:18000"),
        ("0.0.0.0:18001", "all addresses of a machine", "fed.example.org:18001"),
        ("[::]:18001", "all addresses of a machine", "fed.example.org:18001"),
    ],
)
def test_a_refused_address_is_corrected(text: str, fault: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Address.parse(text, "--coordinator")
    assert str(refused.value).startswith("--coordinator ")
    assert fault in str(refused.value)
    assert str(refused.value).endswith(f", as in {meant}")


@pytest.mark.parametrize("port", ["0", "65536", "abc", "+1", "-1", "1.5", "١", "1_000"])
def test_a_port_is_a_number_from_1_to_65535(port: str) -> None:
    with pytest.raises(ConfigError, match="is no port; expected HOST:PORT with a port from 1 to 65535"):
        Address.parse(f"localhost:{port}", "--coordinator")


@pytest.mark.parametrize(
    "text",
    [
        *("", ":18000", "18000", "a b:18000", "300.1.1.1:1", "1.2.3:1", "-a:1", "a..b:1", "[1.2.3.4]:1", "[::1]x:1"),
        *("[::z]:1", "[fe80::1%eth0]:1", f"{'a' * 64}:1", f"{'a.' * 130}:1", "a:b:1", "[::1:1", "*.example.org:1"),
    ],
)
def test_what_has_no_host_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"expected HOST:PORT, as in fed\.example\.org:18000 or \[2001:db8::7\]:18000$"
    ):
        Address.parse(text, "--coordinator")


@pytest.mark.parametrize(("text", "host"), [("::1", "::1"), ("[::1]", "::1"), ("::", "::"), ("0.0.0.0", "0.0.0.0")])
def test_a_host_to_listen_on_needs_no_brackets(text: str, host: str) -> None:
    assert parse_host(text, "--host") == host


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("fed.example.org:18000", ", as in fed.example.org"),
        ("https://[::1]:18000/", ", as in ::1"),
        ("a b", "nothing else"),
        ("", "nothing else"),
    ],
)
def test_a_host_is_nothing_but_a_host(text: str, end: str) -> None:
    with pytest.raises(ConfigError, match=r"^--host .*: expected a name or an IP address and") as refused:
        parse_host(text, "--host")
    assert str(refused.value).endswith(end)


def test_what_listens_everywhere_is_found_on_the_own_machine() -> None:
    assert [own(each) for each in ("0.0.0.0", "::", "192.0.2.7", "localhost")] == [
        *("127.0.0.1", "::1", "192.0.2.7", "localhost")
    ]
