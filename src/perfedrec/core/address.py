"""Addresses: a name or an IP address, and HOST:PORT, in which an IPv6 address stands in brackets."""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass

from perfedrec.core.errors import ConfigError

PORT = 18000
"""The port on which a coordinator listens, where no other is chosen."""

_EXAMPLE = "fed.example.org"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*://)")
_LEAST_USUAL_PORT = 1024


@dataclass(frozen=True)
class Address:
    """Where something listens: a ``host``, which is a name or an IP address without brackets, and a ``port``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str, option: str) -> Address:
        """The address ``HOST:PORT`` in ``text``.

        Raises :class:`ConfigError`, which names the ``option`` and, where it can be guessed, the text that was meant.
        """
        given, bare = f"{option} {shlex.quote(text)}", _bare(text)
        written, port = _parted(bare)
        host = read_host(written)
        if host is None:
            raise ConfigError(f"{given}: expected HOST:PORT, as in {_EXAMPLE}:{PORT} or [2001:db8::7]:{PORT}")
        if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(f"{given}: {port} is no port; expected HOST:PORT with a port from 1 to 65535")
        meant = Address(host, int(port) if port else PORT)
        fault = "" if bare == text else "has more than a host and a port"
        if ":" in written and not written.startswith("["):
            fault = "an IPv6 address stands in brackets"
        elif not port:
            fault = "has no port"
        if scheme := _SCHEME.match(text):
            fault = f"needs no {scheme[1]} because TLS is always used"
        if fault:
            raise ConfigError(f"{given}: {fault}; expected HOST:PORT, as in {meant}")
        if own(host) != host:
            raise ConfigError(
                f"{given}: stands for all addresses of a machine; expected HOST:PORT with a name or an address of one, "
                f"as in {_EXAMPLE}:{port}"
            )
        return meant


def parse_host(text: str, option: str) -> str:
    """The host in ``text``, without brackets around an IPv6 address.

    Raises :class:`ConfigError`, which names the ``option`` and, where it can be guessed, the text that was meant.
    """
    if (host := read_host(text)) is not None:
        return host
    bare = _bare(text)
    meant = read_host(bare) or read_host(_parted(bare)[0])
    example = "" if meant is None else f", as in {meant}"
    raise ConfigError(f"{option} {shlex.quote(text)}: expected a name or an IP address and nothing else{example}")


def read_host(text: str) -> str | None:
    """The host in ``text``, without brackets around an IPv6 address; ``None`` where there is none.

    A name in another script is given in its ASCII form, as certificates have it.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in bare or bare != text:
        return _ip(ipaddress.IPv6Address, bare)
    try:
        name = bare if bare.isascii() else bare.encode("idna").decode()
    except UnicodeError:
        return None
    labels = name.removesuffix(".").split(".")
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)):
        return None
    # No name ends in a number: this is meant to be an IPv4 address.
    return _ip(ipaddress.IPv4Address, name) if labels[-1].isdecimal() else name


def own(host: str) -> str:
    """The host at which a process finds what listens on ``host`` of the same machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _ip(kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], text: str) -> str | None:
    """An IP address in its shortest form; ``None`` where it is none, or has a zone, which no certificate can have."""
    try:
        return None if "%" in text else str(kind(text))
    except ValueError:
        return None


def _bare(text: str) -> str:
    """What is left of an address without spaces around it, a scheme, a user, and a path."""
    return re.split(r"[/?#]", _SCHEME.sub("", text).strip(), maxsplit=1)[0].rpartition("@")[2]


def _parted(bare: str) -> tuple[str, str]:
    """The host and the port in an address as they are written; "" where there is none.

    Where an IPv6 address has no brackets, what follows its last colon is a port if it can be nothing else, or if it
    looks like one.
    """
    if found := re.fullmatch(r"(\[[^\]]*\])(?::(.*))?", bare):
        return found[1], found[2] or ""
    host, colon, port = bare.rpartition(":")
    if not colon:
        return bare, ""
    usual = read_host(host) and port.isdecimal() and int(port) >= _LEAST_USUAL_PORT
    return (bare, "") if read_host(bare) and not usual else (host, port)
