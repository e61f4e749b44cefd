"""Recommending from a node's file: the lists of the simulator for the same state, and lists for new users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from perfedrec.data import Dataset, Interactions, SyntheticTruth, load, split
from perfedrec.evaluation.lists import explained
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.gpfedrec import GPFedRec
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.node import LocalRecommender, Store, StoreError, serving_broadcast
from perfedrec.runtimes.simulator import Simulator

SOME = torch.tensor([3, 11, 40, 41, 90])
SMALL: dict[str, dict[str, Any]] = {
    "model": {"embedding_dim": 16, "refresh_every": 2},
    "selection": {"n_clients_per_round": 60},
}
CLUSTERS = {"clusters": {"n_clusters": 3, "start": 1, "every": 2}, "server": {"averaging": 0.9}}
SPECTRAL = {"pretraining": {"kind": "spectral"}, "personal": {"pretrained": 0.5}}
CONTRASTIVE = {"pretraining": {"kind": "contrastive", "batch_size": 32}}
SECURE = SPECTRAL | {"privacy": {"aggregation": "secure", "norm": "l2", "clip": 0.5}}
FAST = {
    "client": {"learning_rate": 10.0, "user_learning_rate": 0.02, "local_steps": 2},
    "server": {"learning_rate": 0.02},
}
METHODS = {
    "spectral start": (PerFedRecPP, SMALL | CLUSTERS | SPECTRAL),
    "contrastive start, learned mix": (PerFedRecPP, SMALL | CLUSTERS | CONTRASTIVE | {"personal": {"learned": True}}),
    "sums": (PerFedRecPP, SMALL | CLUSTERS | SECURE),
    "fedmf": (FedMF, {"model": {"embedding_dim": 16}, "selection": SMALL["selection"]} | FAST),
    "gpfedrec": (GPFedRec, {"model": {"embedding_dim": 16}, "selection": SMALL["selection"]}),
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("synthetic:users=120,items=150,clusters=3,interactions_per_user=12,seed=4")


def trained(name: str, dataset: Dataset, rounds: int) -> Simulator:
    kind, options = METHODS[name]
    simulator = Simulator(kind(kind.Options.model_validate(options)), dataset, seed=5, device="cpu")
    for _ in range(simulator.n_phases + rounds):
        simulator.play()
    return simulator


def node_of(simulator: Simulator, dataset: Dataset, path: Path) -> Store:
    """A node of the users ``SOME`` with the simulator's data, client states and served model."""
    store = Store.create(path, dataset.train.item_ids)
    ids = dataset.train.user_ids[SOME.numpy()]
    frame = dataset.train.frame().filter(pl.col("user").is_in(ids.tolist()))
    store.import_interactions(
        frame, identities={str(name): place for name, place in zip(ids, SOME.tolist(), strict=True)}
    )
    store.join_run(simulator.algorithm, "simulated")
    store.save_client_states(
        SOME, torch.zeros(0), simulator.population.load_client_states(SOME, simulator.population.rows(SOME)[1])
    )
    broadcast = serving_broadcast(simulator.algorithm, simulator.state, SOME)
    store.receive(broadcast, SOME, "simulated", simulator.state.round, "algorithm = 'x'")
    return store


@pytest.mark.parametrize("name", METHODS)
def test_a_node_recommends_what_the_simulator_recommends(name: str, dataset: Dataset, tmp_path: Path) -> None:
    simulator = trained(name, dataset, 6)
    node_of(simulator, dataset, tmp_path / "a.node").close()
    with Store.open(tmp_path / "a.node") as store:
        local, recommender = LocalRecommender(store, simulator.algorithm), simulator.recommender()
        for users in (SOME, SOME[2:3]):
            scores, parts = local.scores(users)
            expected = recommender.scores(users)
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(scores.argsort(1, descending=True)[:, :20], expected.argsort(1, descending=True)[:, :20])
            for key, part in recommender.explain(users).items():
                torch.testing.assert_close(parts[key], part, rtol=1e-5, atol=1e-6)
        before = store.load_client_states(SOME, torch.zeros(0))
        served = store.served()
        assert (served.run, served.round) == ("simulated", simulator.state.round)
        # A new interaction: its item leaves the list and the scores change, but the stored client states do not.
        best = int(scores.argmax())
        store.add_interactions(str(dataset.train.user_ids[int(SOME[2])]), str(dataset.train.item_ids[best]))
        after, _ = local.scores(SOME[2:3])
        assert after[0, best] == -torch.inf
        others = torch.arange(scores.shape[1]) != best
        assert not torch.allclose(after[0, others], scores[0, others])
        kept = store.load_client_states(SOME, torch.zeros(0))
        assert torch.equal(kept.participations, before.participations)
        unchanged, _ = local.scores(SOME[[0, 1, 3, 4]])
        torch.testing.assert_close(unchanged, recommender.scores(SOME[[0, 1, 3, 4]]), rtol=1e-5, atol=1e-6)


class Indifferent(FedMF):
    """Gives all items of a user the same score."""

    def scores(self, broadcast: Any, rows: Any, client_state: Any) -> torch.Tensor:
        return torch.zeros_like(super().scores(broadcast, rows, client_state))


def test_equal_scores_come_in_the_same_order_on_a_node(dataset: Dataset, tmp_path: Path) -> None:
    simulator = Simulator(Indifferent(FedMF.Options.model_validate(METHODS["fedmf"][1])), dataset, seed=5, device="cpu")
    simulator.play()
    expected, _ = simulator.recommender().recommend(SOME, 20)
    with node_of(simulator, dataset, tmp_path / "a.node") as store:
        for user, own in zip(dataset.train.user_ids[SOME.numpy()], expected.numpy(), strict=True):
            scores, parts = LocalRecommender(store, simulator.algorithm).scores(
                torch.tensor([store.identity(str(user))])
            )
            frame = explained(scores[0], {name: each[0] for name, each in parts.items()}, str(user), store.item_ids, 20)
            assert frame["item"].to_list() == dataset.train.item_ids[own].tolist()


def test_a_served_broadcast_contains_only_its_own_users(dataset: Dataset) -> None:
    simulator = trained("contrastive start, learned mix", dataset, 3)
    broadcast = serving_broadcast(simulator.algorithm, simulator.state, SOME)
    assert broadcast.groups.tolist() == [*simulator.state.clusters.labels[SOME].tolist(), -1]
    assert torch.equal(broadcast.start[:-1], simulator.state.service.start[SOME])
    assert not broadcast.start[-1].any()  # a new user does not get the vector of the last user
    assert broadcast.tokens is None


def test_recommending_requires_a_model(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a.node", np.arange(4)) as store:
        store.add_interactions("u", "2")
        with pytest.raises(StoreError, match="has received no model yet"):
            LocalRecommender(store, FedMF())


def test_client_states_are_kept_while_their_model_is_served(dataset: Dataset, tmp_path: Path) -> None:
    simulator = trained("fedmf", dataset, 3)
    store = node_of(simulator, dataset, tmp_path / "a.node")
    expected = simulator.recommender().scores(SOME)
    store.join_run(simulator.algorithm, "next")  # a new run without a served model
    torch.testing.assert_close(
        LocalRecommender(store, simulator.algorithm).scores(SOME)[0], expected, rtol=1e-5, atol=1e-6
    )
    broadcast = serving_broadcast(simulator.algorithm, simulator.state, SOME)
    store.receive(broadcast, SOME, "next", 1, "")
    assert not torch.allclose(LocalRecommender(store, simulator.algorithm).scores(SOME)[0], expected)


@dataclass(frozen=True)
class Planted:
    """Users who were never in training, with the taste clusters of users and items."""

    dataset: Dataset
    truth: SyntheticTruth
    histories: list[list[int]]
    clusters: list[int]


@pytest.fixture(scope="module")
def planted() -> Planted:
    whole = load("synthetic:users=500,items=300,clusters=5,interactions_per_user=14,seed=8")
    assert whole.truth is not None
    frame = whole.train.frame().filter(pl.col("user") < 400)
    dataset = split(Interactions.from_frame(frame), "leave-one-out", "random", seed=0)
    known = {int(each): place for place, each in enumerate(whole.train.item_ids)}
    truth = whole.truth.take(np.arange(500), np.array([known[int(each)] for each in dataset.train.item_ids]))
    index = {int(each): place for place, each in enumerate(dataset.train.item_ids)}
    histories, clusters = [], []
    for user in range(400, 500):
        own = whole.train.items[whole.train.offsets[user] : whole.train.offsets[user + 1]]
        items = [index[int(each)] for each in whole.train.item_ids[own] if int(each) in index]
        if len(items) >= 8:
            histories.append(items)
            clusters.append(int(whole.truth.user_clusters[user]))
    return Planted(dataset, truth, histories, clusters)


@pytest.mark.parametrize(
    ("name", "expected"), [("spectral start", (0.75, 0.9)), ("sums", (0.75, 0.9)), ("fedmf", (0.4, 0.55))]
)
def test_new_users_get_items_of_their_taste_after_one_and_five_interactions(
    name: str, expected: tuple[float, float], planted: Planted, tmp_path: Path
) -> None:
    simulator = trained(name, planted.dataset, 80)
    nobody = torch.zeros(0, dtype=torch.int64)
    broadcast = serving_broadcast(simulator.algorithm, simulator.state, nobody)
    popular = torch.tensor(planted.dataset.train.item_degrees).argsort(descending=True)
    ids = planted.dataset.train.item_ids
    shares: dict[str, list[float]] = {"popular": [], "1": [], "5": []}
    with Store.create(tmp_path / "a.node", ids) as store:
        store.receive(broadcast, nobody, "simulated", simulator.state.round, "")
        local = LocalRecommender(store, simulator.algorithm)
        rng = np.random.default_rng(0)
        for number, (history, cluster) in enumerate(zip(planted.histories, planted.clusters, strict=True)):
            own = torch.tensor(planted.truth.item_clusters == cluster)
            shown = rng.permutation(history)[:5]
            shares["popular"].append(float(own[popular[~torch.isin(popular, torch.tensor(shown))][:20]].float().mean()))
            for count in (1, 5):
                for item in shown[:count]:
                    store.add_interactions(f"new {number}", str(ids[item]))
                scores, _ = local.scores(torch.tensor([store.identity(f"new {number}")]))
                shares[str(count)].append(float(own[scores[0].topk(20).indices].float().mean()))
    means = {name: float(np.mean(values)) for name, values in shares.items()}
    assert len(planted.histories) > 50
    assert means["popular"] < 0.2  # which is chance, with five clusters of one size
    assert means["1"] > expected[0]
    assert means["5"] > expected[1]
