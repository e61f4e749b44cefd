"""A node's process: its file, its bundle, what its owner insists on, and the coordinator that it works for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from perfedrec import __version__
from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.federation.agreement import build
from perfedrec.federation.bundles import BUNDLE, read_bundle
from perfedrec.federation.metrics import Expose, nowhere, of_node
from perfedrec.federation.process import Connection
from perfedrec.federation.signing import fingerprint
from perfedrec.privacy.policy import Policy
from perfedrec.runs.config import load
from perfedrec.runtimes.flower import NodeApp, Owner, run_node
from perfedrec.runtimes.flower.keys import private_key
from perfedrec.runtimes.node import Store
from perfedrec.runtimes.node.rules import REQUIRED


def work_for(
    connection: Connection,
    store: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
    bundle: Path | None = None,
    require: str | None = None,
    expose: Expose = nowhere,
) -> None:
    """Work for a coordinator until SIGTERM, SIGINT or ``stop``; the current message is answered first.

    The users are those in the file ``store``. The ``bundle`` is by default the one beside that file, if there is one.
    Runs that protect less than the profile ``require``, or than the one in the rules in the file, are refused; where
    there is neither, :data:`REQUIRED` holds. Rules that change meanwhile are obeyed at once. ``tell`` receives lines
    about what changes, ``expose`` the source of metrics.
    """
    policy_of(require or REQUIRED)  # an unknown profile is refused before anything else
    key = fingerprint(private_key(connection.key).public_key())
    connection.prepare(stop)
    beside = store.parent / BUNDLE
    bundle = bundle or beside
    given = read_bundle(bundle) if bundle.exists() or bundle != beside else None
    with Store.open(store) as users:
        users.rules.start(require)
        users.rules.use_key(key)
        rules = users.rules

        def policies() -> tuple[Policy, ...]:
            return tuple(found for name in rules.read().profiles if (found := policy_of(name)) is not None)

        owner = Owner(policies, profile_of, connection.address)
        app = NodeApp(users, build, __version__, given, owner)
        expose(lambda: of_node(app.activity, users))
        run_node(connection.open, app, stop, tell)


@lru_cache
def policy_of(profile: str) -> Policy | None:
    """What a node whose owner requires a ``profile`` insists on; ``None`` for a profile that protects nothing.

    Raises :class:`ConfigError` for an unknown profile.
    """
    config: Any = load(privacy=profile)
    if not config.privacy.noisy and not config.privacy.sums:
        return None
    return Policy(profile, config.privacy, config.selection.max_participations)


def profile_of(algorithm: AnyAlgorithm) -> str:
    """The strictest profile that the protection of a method satisfies."""
    policies = (policy_of(name) for name in ("private", "secure", "paper"))
    return next((each.profile for each in policies if each is not None and not each.objection(algorithm)), "none")
