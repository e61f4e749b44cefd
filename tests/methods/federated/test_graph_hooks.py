"""Every hook that PerFedRec++ adds to the engine has an effect as well, in a world where it is used."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.methods.federated.test_hooks import differ, with_super
from tests.methods.federated.toys import population, settings
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.types import Published, Spec
from perfedrec.methods.federated.base import Federated
from perfedrec.methods.federated.contrastive import Contrastive
from perfedrec.methods.federated.graph import GraphMethod
from perfedrec.methods.federated.network import Network
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import ClusterSettings
from perfedrec.runtimes.round import play_round
from perfedrec.runtimes.simulator import PersonalRecommender

SEED = 3
SECURE = {"privacy__aggregation": "secure", "privacy__norm": "l2", "privacy__clip": 0.5}
WORLDS: dict[str, dict[str, Any]] = {
    "spectral": {"pretraining__kind": "spectral", "pretraining__passes": 2, "pretraining__cluster_passes": 1},
    "contrastive": {
        "pretraining__kind": "contrastive",
        "privacy__pseudo_items": 0.5,
        "privacy__masking": 0.2,
    },
    "secure": {"pretraining__kind": "spectral", "pretraining__passes": 2, **SECURE},
    "noisy": {
        **{"pretraining__kind": "spectral", "pretraining__passes": 2, **SECURE, "clusters__n_clusters": 0},
        "privacy__noise": {"degrees": 0.3, "spectral": 0.2, "join": 0.1, "training": 0.1},
    },
    "by item": {"pretraining__kind": "spectral", "pretraining__passes": 2, **SECURE, "privacy__rank": 0},
}


def outcome(kind: type[PerFedRecPP], world: str) -> dict[str, Any]:
    """What a run leads to: scores, vectors, tables, client states, phases, and what is asked of others."""
    method, people = kind(settings(clusters__start=1, **WORLDS[world])), population(attributes=True)
    spec = Spec(people.n_users, people.n_items, torch.bincount(people.items, minlength=people.n_items))
    state = method.init(spec, Key(SEED).fold("init"))
    people.init_clients(method, SEED)
    reports = []
    for _ in range(len(method.phases) + 5):
        state, report = play_round(method, state, people, SEED)
        reports.append(report)
    recommender, everyone = PersonalRecommender(method, method.serving(state), people), people.everyone()
    placed = recommender.embedding(everyone)
    given = method.broadcast(state, everyone), *_own(people, everyone)
    shown = [each for each in fields(people.client_state) if each.name != "secret"]
    return {
        "scores": recommender.raw_scores(everyone),
        "embedding": torch.zeros(0) if placed is None else placed.users,
        "seen by an attacker": method.user_vectors(*given),
        "final": method.final(*given)[0],
        "kept": [getattr(people.client_state, each.name) for each in shown],
        "tables": [each for each in (state.items, state.offsets, state.neighbours) if each is not None],
        "losses": [each.loss for each in reports],
        "phases": [each.phase for each in reports],
        "asks": (method.needs_degrees, method.needs_service, method.finetune_rounds, state.tokens is None),
        "apart": method.without_tokens(state).tokens is None,
    }


def _own(people: Any, users: Tensor) -> tuple[Any, Any]:
    rows, positions = people.rows(users)
    return rows, people.load_client_states(users, positions)


@cache
def base(world: str) -> dict[str, Any]:
    return outcome(PerFedRecPP, world)


def fixed(value: Any) -> property:
    return property(lambda self: value)


def same_state(self: Any, state: Any, *_: Any) -> Any:
    return state


def more_items(state: Any) -> Any:
    return replace(state, items=state.items + 1)


def one_layer(network: Network) -> Network:
    return replace(network, n_layers=1)


HOOKS: list[tuple[str, str, Any]] = [
    ("network", "spectral", property(lambda self: one_layer(super(type(self), self).network))),
    ("neighbours", "spectral", fixed(False)),
    ("joins", "spectral", fixed(False)),
    ("pretraining_phases", "by item", fixed(())),
    ("service_pretrains", "spectral", fixed(False)),
    ("refreshes", "spectral", lambda self, trained: trained == 0),
    ("prepare", "spectral", same_state),
    ("restart", "spectral", with_super("restart", more_items)["restart"]),
    ("serve", "spectral", with_super("serve", lambda pair: (pair[0], replace(pair[1], neighbours=None)))["serve"]),
    ("coordinate", "spectral", with_super("coordinate", more_items)["coordinate"]),
    ("regroup", "spectral", same_state),
    ("exponents", "spectral", fixed((0.3, 0.2))),
    ("asked_before_training", "spectral", lambda self, n_users: n_users - 2),
    (
        "clustered",
        "spectral",
        with_super("clustered", lambda found: replace(found, labels=0 * found.labels))["clustered"],
    ),
    ("layers", "spectral", with_super("layers", lambda layers: layers + 1)["layers"]),
    ("final", "spectral", with_super("final", lambda pair: (pair[0] + 1, pair[1]))["final"]),
    ("finish", "spectral", lambda self, vectors: 2 * vectors),
    ("without_tokens", "contrastive", same_state),
    ("clusters", "spectral", fixed(ClusterSettings(n_clusters=2, start=1))),
    ("mixture", "spectral", with_super("mixture", lambda found: _half(found))["mixture"]),
    ("diffuses", "spectral", fixed(True)),
    ("weights", "spectral", fixed(torch.tensor([1.0, 0.0, 0.0, 0.0]))),
    ("noisy", "noisy", fixed(False)),
    ("pretrain", "contrastive", lambda self, service, aggregate, key: (service, Published())),
    ("use_graph", "spectral", lambda self, service, published, graph, counts, key: (service, published)),
    ("makes_neighbours", "secure", fixed(True)),
    ("n_views", "contrastive", fixed(1)),
    ("contrasts", "contrastive", fixed(False)),
    ("placed", "secure", lambda self, broadcast, rows, own: replace(broadcast, groups=torch.zeros_like(rows.users))),
    ("clustering_phases", "secure", fixed(())),
    ("pretrains_basis", "secure", fixed(False)),
    ("trains_clusters", "by item", fixed(False)),
    ("clustering", "by item", lambda self, broadcast: None),
    ("cluster_by_sums", "by item", same_state),
    ("recluster", "by item", with_super("recluster", lambda state: _shifted(state))["recluster"]),
]
"""Hooks, each with a world in which it is used and an override."""

NOT_PLAYED = {
    "broadcast_type": "a record type",
    "Options": "a record type",
    "chooses_table": "test_hooks.py",
    "handover": "chosen by privacy.aggregation: test_sums.py",
    "item_attributes": "tests/parity/test_attributes.py",
    "n_reported": "follows from layers and neighbours",
    "open_service": "an empty service: each client's first report overwrites it",
    "n_models_of": "what n_models is for a client: test_sums.py",
    "inference_options": "tests/runtimes/node/test_scorer.py",
    "scored_in_numpy": "tests/runtimes/node/test_scorer.py",
    "leaves_rows_unread": "tests/runtimes/test_population.py",
    "centroids": "clusters keep their numbers: test_server.py",
}
"""What is tested elsewhere, or is no function."""


def _half(mixture: Any) -> Any:
    mixture.mix = mixture.mix * 0.5 + torch.tensor([1.0, 0.0, 0.0, 0.0])
    return mixture


def _shifted(state: Any) -> Any:
    return replace(state, clusters=replace(state.clusters, centroids=state.clusters.centroids.flip(0)))


@pytest.mark.parametrize(("name", "world", "override"), HOOKS, ids=[name for name, *_ in HOOKS])
def test_overriding_a_hook_changes_the_run(name: str, world: str, override: Any) -> None:
    body = override if isinstance(override, dict) else {name: override}
    other = outcome(type("Other", (PerFedRecPP,), body), world)
    assert any(differ(base(world)[key], other[key]) for key in other), f"{name} changes nothing"


def test_every_hook_is_tested() -> None:
    """Those that the engine has as well are tested with it."""
    engine = set(dir(Federated))
    mine = {name for kind in (GraphMethod, Contrastive, PerFedRec, PerFedRecPP) for name in vars(kind)}
    public = {name for name in mine if not name.startswith("_")} - engine
    tested = {name for name, *_ in HOOKS}
    assert public - tested == {name for name in NOT_PLAYED if name in public}


def test_the_same_method_plays_the_same_run() -> None:
    same: Callable[[str], dict[str, Any]] = lambda world: outcome(type("Same", (PerFedRecPP,), {}), world)  # noqa: E731
    assert not any(differ(value, same(world)[key]) for world in WORLDS for key, value in base(world).items())
