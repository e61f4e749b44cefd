"""A node's process: its file, its key, its bundle, and the coordinator that it works for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perfedrec import __version__
from perfedrec.core.errors import ConfigError
from perfedrec.federation.bundles import BUNDLE, read_bundle
from perfedrec.federation.metrics import Expose, nowhere, of_node
from perfedrec.federation.model_file import build
from perfedrec.privacy.policy import Policy
from perfedrec.runs.config import load
from perfedrec.runtimes.flower import Fleet, NodeApp, run_node
from perfedrec.runtimes.node import Store

REQUIRED = "secure"
"""The profile whose protection a node insists on, unless its owner says otherwise."""


def work_for(
    store: Path,
    address: str,
    ca: Path,
    key: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
    threads: int = 1,
    bundle: Path | None = None,
    require: str | None = None,
    expose: Expose = nowhere,
) -> None:
    """Work for the coordinator at ``address`` until SIGTERM, SIGINT or ``stop``, after the work at hand.

    The ``bundle`` is by default the one beside the node's file, if there is one. Runs that protect less than the
    profile ``require`` (by default ``REQUIRED``) are refused. ``expose`` is given the source of metrics.
    """
    policy = policy_of(require or REQUIRED)
    prepare(address, threads, stop)
    bundle = bundle or store.with_name(BUNDLE)
    given = read_bundle(bundle) if bundle.exists() or bundle != store.with_name(BUNDLE) else None
    with Store.open(store) as users:
        station = NodeApp(users, build, __version__, given, policy)
        expose(lambda: of_node(station.done, users))
        run_node(lambda: Fleet(address, ca, key), station, stop, tell)


def policy_of(profile: str) -> Policy | None:
    """What a node insists on that requires a ``profile``: nothing, for none. Raises :class:`ConfigError`."""
    config: Any = load(privacy=profile)
    if not config.privacy.noisy and not config.privacy.sums:
        return None
    return Policy(profile, config.privacy, config.selection.max_participations)


def prepare(address: str, threads: int, stop: threading.Event) -> None:
    """Take so many threads, to work for the coordinator at ``address`` until SIGTERM, SIGINT or ``stop``.

    Raises :class:`ConfigError` for an address or a number that cannot be.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator {address}: expected HOST:PORT, as in fed.example.org:18000")
    if threads < 1:
        raise ConfigError(f"--threads {threads}: expected at least 1")
    torch.set_num_threads(threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
