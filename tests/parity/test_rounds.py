"""The simulator and Flower compute the same tables, client states and clusters from the same keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from tests.parity.federation import N_ITEMS, N_USERS, PROTECTED, SINGLE, UNEQUAL, Twins, settings

from perfedrec import configure
from perfedrec.core.aggregate import Aggregate, Sum
from perfedrec.runs.config import default_preset
from perfedrec.runtimes.flower import secagg

SPECTRAL = {
    "model": {"encoder": "spectral"},
    "pretraining": {"kind": "spectral"},
    "client": {"loss": "softmax", "n_negatives": 9, "leave_one_out": True},
}
WORLDS: dict[str, dict[str, dict[str, Any]]] = {
    "bpr": {},
    "bpr, protected": {"privacy": PROTECTED},
    "softmax": {"client": {"loss": "softmax", "n_negatives": 9, "similarity": "cosine", "local_steps": 2, "l2": 0.01}},
    "softmax, protected": {"client": {"loss": "softmax", "n_negatives": 9}, "privacy": PROTECTED},
    "contrastive, protected": {"pretraining": {"kind": "contrastive"}, "privacy": PROTECTED},
    "spectral": SPECTRAL,
    "spectral, protected": SPECTRAL | {"privacy": PROTECTED},
    "spectral start": {"pretraining": {"kind": "spectral"}},
    "sample": {
        "pretraining": {"kind": "spectral", "clients": 12, "cluster_passes": 1},
        "personal": {"neighbourhood": 0.5, "pretrained": 0.5},
    },
    "spectral start, mixed in, learned": {
        "pretraining": {"kind": "spectral"},
        "personal": {"pretrained": 0.5, "learned": True},
    },
    "weighted, learned mix": {"server": {"weighting": "interactions"}, "personal": {"learned": True}},
}
PHASES = {
    "contrastive, protected": ["join"],
    "spectral": ["join", "clusters"],
    "spectral, protected": ["join", "clusters"],
    "spectral start": ["join", "clusters"],
    "spectral start, mixed in, learned": ["join", "clusters"],
    "sample": ["join", "clusters"],
}


@pytest.mark.parametrize("sizes", [SINGLE, UNEQUAL], ids=["one user a node", "many users a node"])
@pytest.mark.parametrize("world", WORLDS)
def test_flower_plays_the_rounds_of_the_simulator(world: str, sizes: tuple[int, ...]) -> None:
    twins = Twins(settings(**WORLDS[world]), sizes)
    before, played_phases = twins.flower.items.clone(), []
    phases = PHASES.get(world, ["join"])
    for _ in range(len(phases) + 4):
        expected, played = twins.simulate(), twins.play()
        assert (played.round, played.phase, played.cohort) == (expected.round, expected.phase, expected.cohort)
        assert played.clients == expected.clients == played.cohort
        assert twins.difference() == 0, f"after round {played.round} ({played.phase})"
        played_phases.append(played.phase)
    assert played_phases == phases + ["train"] * 4
    if world == "sample":  # clients choose their clusters
        assert twins.flower.clusters.labels is None
        assert twins.flower.clusters.centroids is not None
    else:
        assert twins.flower.clusters.labels.unique().numel() > 1
    assert float(twins.flower.offsets.abs().max()) > 0
    assert float((twins.flower.items - before).abs().max()) > 1e-3  # and not equal only because nothing happened


def test_attribute_networks_agree_within_rounding() -> None:
    """Their matrix products pick kernels by shape, so that users hosted together may differ in the last bit."""
    twins = Twins(settings(model={"attributes": True}), UNEQUAL, attributes=True)
    for _ in range(4):
        twins.simulate()
        twins.play()
        assert twins.difference() < 1e-5
    assert twins.flower.dense is not None


def test_users_of_no_node_do_not_take_part() -> None:
    twins = Twins(settings(), UNEQUAL)
    away = twins.hosts.pop(101)
    report = twins.play()
    assert (report.cohort, report.clients) == (N_USERS, N_USERS - away.numel())
    assert not torch.isin(twins.flower.service.graph.by_item.columns, away).any()
    assert float(twins.flower.service.reports[away].abs().max()) == 0


class Watched(Sum):
    """A rule that compares clients. It notes the number of clients in each part."""

    separate: ClassVar[bool] = True

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        found = list(parts)
        self.seen.append([part.clients for part in found])
        return super().combine(phase, found, empty)


def test_the_methods_aggregator_combines_the_answers_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is one part, and an empty round has none. Nodes of one user serve a rule that compares clients."""
    twins, watched = Twins(settings(), SINGLE), Watched()
    monkeypatch.setattr(twins.algorithm, "aggregator", watched)
    twins.play()
    assert watched.seen == [list(SINGLE)]
    twins.hosts = {}
    assert twins.play().clients == 0
    assert watched.seen == [list(SINGLE), []]


SUMS = {"kind": "spectral", "cluster_passes": 0}


@pytest.mark.parametrize("sizes", [SINGLE, UNEQUAL])
def test_the_same_tables_where_clients_contribute_only_to_sums(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secagg, "MOST_PEERS", 4)  # Shamir's shares take most of the time
    secure = {"aggregation": "secure", "norm": "l2", "clip": 0.5}
    twins = Twins(settings(pretraining=SUMS, privacy=secure), sizes)
    for _ in range(9):
        twins.simulate()
        twins.play()
        assert twins.difference() == 0.0
    assert twins.flower.clusters.labels is None
    assert twins.flower.clusters.centroids is not None


@pytest.mark.parametrize("changes", [{"privacy": {"rank": 0}}, {"clusters": {"n_clusters": 0}}], ids=["rows", "basis"])
def test_each_node_adds_the_noise_of_its_own_clients(changes: dict[str, Any]) -> None:
    noise = {"degrees": 0.5, "spectral": 0.5, "join": 0.5, "training": 0.5}
    private = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "noise": noise, "dropout_tolerance": 0.0}
    twins = Twins(
        settings(**{**changes, "pretraining": SUMS, "privacy": private | changes.get("privacy", {})}), UNEQUAL
    )
    exact = torch.bincount(twins.population.items, minlength=N_ITEMS).float()
    twins.play()
    degrees = twins.flower.degrees
    assert bool((degrees > 0).all())
    assert not torch.equal(degrees, exact)
    for _ in range(6):
        twins.play()
    assert bool(twins.flower.items.isfinite().all())


METHODS: dict[str, tuple[str, ...]] = {
    "fedmf": (),
    "fedncf": (),
    "fedgnn": ("model.refresh_every=2",),
    "pfedrec": (),
    "gpfedrec": ("graph.every=1", "graph.n_landmarks=3"),
    "fedrap": (),
    "fedca": ("composite.every=1", "composite.n_landmarks=3"),
    "cofedrec": ("cocluster.n_categories=3",),
    "fedcia": (),
    "fastpfrec": ("nodes.n_nodes=3", "pretraining.steps=2", "pretraining.batch_size=16"),
    "colr": ("update.rank=3",),
    "pfedclr": ("buffer.rank=2",),
    "ptf_fedrec": ("exchange.n_received=4",),
}

INEXACT = dict.fromkeys(("fedncf", "fedcia", "colr", "ptf_fedrec"), 1e-5) | {
    "gpfedrec": 1e-6,
    "fedca": 1e-4,
    "cofedrec": 1e-4,
}
"""The largest difference, for methods that multiply matrices of several clients: such products pick their kernels by
size. FedCA takes angles of such products, and an angle near 0 has half as many digits as its cosine. CoFedRec's term is
a difference of two of them, which the server's FedAdam brings to the length of its step."""


@pytest.mark.parametrize("sizes", [SINGLE, UNEQUAL], ids=["one user a node", "many users a node"])
@pytest.mark.parametrize("method", METHODS)
def test_flower_plays_the_rounds_of_every_method(method: str, sizes: tuple[int, ...]) -> None:
    """Groups that a method makes itself, such as GPFedRec's landmarks, reach the sum with their own numbers."""
    small = ("model.embedding_dim=8", "selection.n_clients_per_round=12", *METHODS[method])
    algorithm = configure(default_preset(method), overrides=small, algorithm=method).build()
    twins = Twins(settings(), sizes, algorithm=algorithm)
    for _ in range(len(algorithm.phases) + 4):
        assert twins.simulate().clients == twins.play().clients > 0
        assert twins.difference() <= INEXACT.get(method, 0)
