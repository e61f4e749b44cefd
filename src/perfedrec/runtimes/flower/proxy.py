"""Which proxy leads to a coordinator, by the environment variables that most programs know."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.request import getproxies_environment

import httpx

from perfedrec.core.errors import ConfigError

_LISTED = re.compile(r"(?P<host>\[[^]]*\]|[^:]*)(?::(?P<port>[0-9]+))?")


def proxy_for(host: str, port: int) -> str | None:
    """The URL of the proxy through which ``host`` is reached by TLS; ``None`` where there is none.

    It is the one in ``https_proxy``, or else in ``all_proxy``; both names may be in capitals, and those in small
    letters count first. Addresses of this machine and those in ``no_proxy`` need no proxy. Raises :class:`ConfigError`
    for a proxy that cannot be used.
    """
    given: Mapping[str, str] = getproxies_environment()
    found = given.get("https") or given.get("all")
    if not found or _is_loopback(host) or _is_listed(host, port, given.get("no", "")):
        return None
    proxy = found if "://" in found else f"http://{found}"
    name = "https_proxy" if given.get("https") else "all_proxy"
    try:
        httpx.Client(proxy=proxy, trust_env=False).close()
    except ImportError:
        raise ConfigError(
            f"{name} is {shown(proxy)}, which needs pip install 'httpx[socks]'; expected that, an HTTP proxy, or "
            f"no_proxy={host}"
        ) from None
    except (ValueError, httpx.InvalidURL):
        raise ConfigError(
            f"{name} is {shown(proxy)}, which cannot be used; expected http://HOST:PORT, or no_proxy={host}"
        ) from None
    return proxy


def shown(proxy: str) -> str:
    """The URL of a proxy as it may be printed: without a user and a password."""
    return f"{proxy.partition('://')[0]}://{proxy.partition('://')[2].rpartition('@')[2]}"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address, name = _address(host), host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") if address is None else address.is_loopback


def _is_listed(host: str, port: int, no_proxy: str) -> bool:
    """Whether a host is in a list of hosts, domains, addresses and networks (``10.0.0.0/8``); a host in it may have a
    port."""
    address, name = _address(host), host.lower().removesuffix(".")
    for each in no_proxy.lower().replace(",", " ").split():
        parts = _LISTED.fullmatch(each)
        listed, of_port = (each, "") if parts is None else (parts["host"].strip("[]"), parts["port"] or "")
        domain = listed.lstrip("*.")
        inside = name == domain or name.endswith(f".{domain}") if address is None else _has(listed, address)
        if each == "*" or (inside and of_port in ("", str(port))):
            return True
    return False


def _has(network: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
