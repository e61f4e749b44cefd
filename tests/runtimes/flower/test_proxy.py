"""Which proxy leads to a coordinator."""

from __future__ import annotations

import os

import pytest

from perfedrec.core.errors import ConfigError
from perfedrec.runtimes.flower.proxy import proxy_for, shown

PROXY = "http://proxy.example.org:3128"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_proxy_in_the_environment_is_used_but_not_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert proxy_for("fed.example.org", 18000) is None
    monkeypatch.setenv(name, PROXY)
    assert proxy_for("fed.example.org", 18000) == proxy_for("2001:db8::7", 1) == PROXY
    for host in ("localhost", "LOCALHOST", "n7.localhost", "127.0.0.1", "127.0.1.1", "::1"):
        assert proxy_for(host, 18000) is None, host


def test_proxies_for_other_things_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)  # TLS is always used
    monkeypatch.setenv("grpc_proxy", PROXY)  # gRPC never
    assert proxy_for("fed.example.org", 18000) is None


def test_small_letters_and_https_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "http://other:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://other:2")
    monkeypatch.setenv("https_proxy", "proxy.example.org:3128")  # without a scheme
    assert proxy_for("fed.example.org", 18000) == PROXY


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("*", "fed.example.org", True),
        ("fed.example.org", "fed.example.org", True),
        ("FED.example.org", "fed.Example.org.", True),
        ("example.org", "fed.example.org", True),
        (".example.org", "fed.example.org", True),
        ("*.example.org", "fed.example.org", True),
        ("a, b,fed.example.org ", "fed.example.org", True),
        ("fed.example.org:18000", "fed.example.org", True),
        ("fed.example.org:443", "fed.example.org", False),
        ("ample.org", "fed.example.org", False),
        ("fed.example.org", "example.org", False),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "fed.example.org", False),
        ("0.0.7", "10.0.0.7", False),
        ("2001:db8::/32", "2001:db8::7", True),
        ("[2001:db8::7]:18000", "2001:db8::7", True),
        ("[2001:db8::7]:443", "2001:db8::7", False),
        ("[,[::z],a:b:c,", "fed.example.org", False),
        ("", "fed.example.org", False),
    ],
)
def test_hosts_in_no_proxy_are_reached_directly(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, host: str, direct: bool
) -> None:
    monkeypatch.setenv("https_proxy", PROXY)
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_for(host, 18000) == (None if direct else PROXY)


@pytest.mark.parametrize("proxy", ["socks://u:secret@proxy:1", "ftp://u:secret@proxy:1", "http://u:secret@proxy:abc"])
def test_a_proxy_that_cannot_be_used_is_refused_where_it_is_needed(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert proxy_for("127.0.0.1", 18000) is None
    with pytest.raises(
        ConfigError, match=r"^all_proxy is \w+://proxy:\w+, which cannot be used; expected http://"
    ) as no:
        proxy_for("fed.example.org", 18000)
    assert str(no.value).endswith("or no_proxy=fed.example.org")


def test_a_password_is_not_shown() -> None:
    assert shown("http://user:secret@proxy:3128") == "http://proxy:3128"
    assert shown(PROXY) == PROXY
