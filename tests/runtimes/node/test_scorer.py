"""Lists from a node's file without torch: those that torch makes, for all kinds of users and options."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.runtimes.node.nodes import write_node

from perfedrec.core.inference import InferenceOptions
from perfedrec.core.keys import Key, normal, shuffle
from perfedrec.core.sampling import draw_outside
from perfedrec.core.types import Rows
from perfedrec.core.words import WordKey, symmetric
from perfedrec.core.words import draw_outside as draw_in_numpy
from perfedrec.core.words import shuffle as shuffle_in_numpy
from perfedrec.data import Dataset, load
from perfedrec.evaluation.lists import explained
from perfedrec.methods.federated.fedgnn import FedGNN
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.gpfedrec import GPFedRec
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.nn.inference import Client, Model, User
from perfedrec.runtimes.node import LocalRecommender, Scorer, Store, StoreError
from perfedrec.runtimes.simulator import Simulator

SOME = torch.tensor([3, 11, 40, 41, 90])
SIZES: dict[str, Any] = {"model": {"embedding_dim": 16}, "selection": {"n_clients_per_round": 60}}
GRAPH: dict[str, Any] = {**SIZES, "model": {"embedding_dim": 16, "refresh_every": 2}}
LARGE = {"client": {"learning_rate": 5.0, "user_learning_rate": 0.02, "local_steps": 2}}
CLUSTERS = {"clusters": {"n_clusters": 3, "start": 1, "every": 2}, "server": {"averaging": 0.9}}
MIX = {"pretrained": 0.5, "neighbourhood": 0.7, "local": 0.4}
SPECTRAL = {"pretraining": {"kind": "spectral"}, "personal": MIX}
SAMPLE = {"pretraining": {"kind": "spectral", "clients": 50, "cluster_passes": 1}, "personal": MIX}
SECURE = {"privacy": {"aggregation": "secure", "norm": "l2", "clip": 0.5}}
SOFTMAX = {"client": {"loss": "softmax", "n_negatives": 9, "similarity": "cosine", "learning_rate": 1.0}}
DETAILS = {"client": {"leave_one_out": True, "l2": 0.01, "local_steps": 3, "learning_rate": 3.0}}
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "fedmf": (FedMF, SIZES | LARGE),
    "fedmf, softmax of cosines": (FedMF, SIZES | SOFTMAX),
    "fedgnn": (FedGNN, GRAPH | LARGE),
    "perfedrec": (PerFedRec, GRAPH | CLUSTERS | DETAILS | {"pretraining": {"kind": "none"}}),
    "contrastive": (PerFedRecPP, GRAPH | CLUSTERS | {"pretraining": {"kind": "contrastive", "batch_size": 32}}),
    "softmax of cosines": (PerFedRecPP, GRAPH | CLUSTERS | SPECTRAL | SOFTMAX),
    "spectral start": (PerFedRecPP, GRAPH | CLUSTERS | SPECTRAL | LARGE),
    "sample": (PerFedRecPP, GRAPH | LARGE | SAMPLE),
    "start by other exponents": (
        PerFedRecPP,
        GRAPH | SPECTRAL | {"pretraining": {"kind": "spectral", "user_exponent": 0.2, "item_exponent": 0.35}},
    ),
    "choice": (PerFedRecPP, GRAPH | CLUSTERS | SPECTRAL | LARGE | {"personal": MIX | {"chosen": True}}),
    "sums": (PerFedRecPP, GRAPH | CLUSTERS | SPECTRAL | LARGE | SECURE),
    "spectral encoder": (
        PerFedRecPP,
        GRAPH | CLUSTERS | SPECTRAL | {"model": {"embedding_dim": 16, "encoder": "spectral"}},
    ),
    "no layers": (PerFedRec, GRAPH | {"model": {"embedding_dim": 16, "n_layers": 0}, "pretraining": {"kind": "none"}}),
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("synthetic:users=120,items=150,clusters=3,interactions_per_user=12,seed=4")


def node_of(name: str, rounds: int, dataset: Dataset, path: Path) -> Any:
    """A node's file with the users ``SOME`` after some rounds of a simulation; returns the method."""
    kind, options = METHODS[name]
    simulator = Simulator(kind(kind.Options.model_validate(options)), dataset, seed=5, device="cpu")
    for number in range(simulator.n_phases + rounds):
        simulator.play()
        if simulator.algorithm.n_choices > 1 and number == simulator.n_phases + 1:
            simulator.state = simulator.algorithm.choose(simulator.state, 3)
    write_node(simulator, dataset, SOME, rounds, path)
    return simulator.algorithm


def rows_with_torch(path: Path, algorithm: Any, user: str, k: int) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    with Store.open(path) as store:
        scores, parts = LocalRecommender(store, algorithm).scores(torch.tensor([store.identity(user)]))
        own = {name: each[0] for name, each in parts.items()}
        return scores[0], explained(scores[0], own, user, store.item_ids, k).to_dicts()


@pytest.mark.parametrize("rounds", [0, 5])
@pytest.mark.parametrize("name", METHODS)
def test_lists_are_those_of_torch(name: str, rounds: int, dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    algorithm = node_of(name, rounds, dataset, path)
    assert algorithm.inference is not None
    trained, changed = (str(dataset.train.user_ids[int(number)]) for number in SOME[:2])
    with Store.open(path) as store:
        before = set(store.rows(SOME[1:2])[0].items.tolist())
        other = next(each for each in range(dataset.n_items) if each not in before)
        store.add_interactions(changed, str(dataset.train.item_ids[other]))
        store.add_interactions("new", *(str(each) for each in dataset.train.item_ids[[5, 9, 77]]))
        store.add_interactions("empty")
        store.import_interactions(
            pl.DataFrame({"user": ["known"], "item": [dataset.train.item_ids[8]]}), first_identity=900
        )
    with Scorer.open(path) as scorer:
        for user in (trained, changed, "new", "known", "empty"):
            expected, rows = rows_with_torch(path, algorithm, user, 10)
            found = scorer.scores(user)
            assert found is not None
            scores, parts = found
            assert len(rows) == 10
            size = float(expected[expected > -torch.inf].abs().max())
            np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-5 * size)
            hidden = scores == -np.inf
            np.testing.assert_allclose(
                np.sum(list(parts.values()), axis=0)[~hidden], scores[~hidden], rtol=1e-4, atol=1e-5 * size
            )
            listed = scorer.recommend(user, 10)
            assert listed is not None
            assert [list(row) for row in listed] == [list(row) for row in rows]
            for row, like in zip(listed, rows, strict=True):
                assert (row["item"], row["rank"], row["moved"]) == (like["item"], like["rank"], like["moved"])
                for key in row.keys() - {"item", "rank", "moved"}:
                    assert row[key] == pytest.approx(like[key], rel=1e-3, abs=1e-4 * size)


def test_a_later_model_is_read_by_an_open_file(dataset: Dataset, tmp_path: Path) -> None:
    path, user = tmp_path / "a.node", str(dataset.train.user_ids[3])
    algorithm = node_of("fedmf", 2, dataset, path)
    with Scorer.open(path) as scorer:
        first = scorer.scores(user)
        with Store.open(path) as store:
            broadcast = store.broadcast(algorithm.broadcast_type, SOME[:1])
            zeros = replace(
                broadcast, items=torch.zeros_like(broadcast.items), groups=torch.zeros(2, dtype=torch.int64)
            )
            store.receive(zeros, SOME[:1], "other", 7, "", algorithm.inference)
        second = scorer.scores(user)
    assert first is not None
    assert second is not None
    assert first[0].max() > 0
    assert first[0][first[0] > -np.inf].tolist() != second[0][second[0] > -np.inf].tolist()


def test_equal_scores_come_in_the_order_of_ids(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    algorithm = node_of("fedmf", 0, dataset, path)
    with Store.open(path) as store:
        broadcast = store.broadcast(algorithm.broadcast_type, SOME[:1])
        few = broadcast.items.clone()
        few[:] = few[torch.arange(few.shape[0]) % 3]  # three kinds of items
        few[:50] = 0
        alike = replace(broadcast, items=few, groups=torch.zeros(6, dtype=torch.int64))
        store.receive(alike, SOME, "simulated", 0, "", algorithm.inference)
    for number in SOME.tolist():
        user = str(dataset.train.user_ids[number])
        scores, rows = rows_with_torch(path, algorithm, user, 150)
        with Scorer.open(path) as scorer:
            for k in (1, 3, 20, 150):
                ranked = scorer.ranked(user, scores.numpy(), k)
                assert scorer.ids(ranked) == [row["item"] for row in rows[:k]]
            other = np.arange(scores.numel(), dtype=np.float32) % 4
            _, listed = scorer.listed(user, scores.numpy(), {"global": other}, 150)
            alone = scorer.ranked(user, np.where(scores > -np.inf, other, np.float32(-np.inf)), 150)
            places = {item: place for place, item in enumerate(scorer.ids(alone))}
            assert [row["moved"] for row in listed] == [places[row["item"]] - row["rank"] + 1 for row in listed]


def test_what_needs_torch_is_said(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    algorithm = node_of("fedmf", 1, dataset, path)
    with Store.open(path) as store:
        store.add_interactions("greedy", *(str(each) for each in dataset.train.item_ids[:100]))
        store.add_interactions("new", str(dataset.train.item_ids[0]))
    with Scorer.open(path) as scorer:
        assert scorer.scores("greedy") is None  # has more than half of all items: negatives are used several times
        assert scorer.scores("new") is not None
    assert algorithm.inference is not None

    class Other(FedMF):
        """May score in another way."""

    assert Other().inference is None
    assert GPFedRec().inference is None
    learned = PerFedRecPP.Options.model_validate({"personal": {"learned": True}})
    assert PerFedRecPP(learned).inference is None


def test_options_of_another_version_need_torch() -> None:
    options = FedMF().inference
    assert options is not None
    assert InferenceOptions.load(options.dump()) == options
    assert InferenceOptions.load(options.dump().replace('"l2"', '"l3"')) is None


def test_a_model_of_an_older_version_is_scored_with_torch_once(dataset: Dataset, tmp_path: Path) -> None:
    path, user = tmp_path / "a.node", str(dataset.train.user_ids[3])
    algorithm = node_of("fedmf", 1, dataset, path)
    with Store.open(path) as store:
        store.receive(store.broadcast(algorithm.broadcast_type, SOME), SOME[:-1], "simulated", 1, "")
    with Scorer.open(path) as scorer:
        assert scorer.scores(user) is None
        rows_with_torch(path, algorithm, user, 3)
        assert scorer.scores(user) is not None


def test_client_states_of_another_method_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    algorithm = node_of("fedmf", 1, dataset, path)
    with Store.open(path) as store:
        broadcast = store.broadcast(algorithm.broadcast_type, SOME)
        options = replace(algorithm.inference, embedding_dim=8)
        store.receive(replace(broadcast, items=broadcast.items[:, :8]), SOME[:-1], "simulated", 1, "", options)
    with Scorer.open(path) as scorer, pytest.raises(StoreError, match="private does not fit"):
        scorer.scores(str(dataset.train.user_ids[3]))


@pytest.mark.parametrize("size", [1, 5, 40, 5000])
def test_draws_in_numpy_are_those_of_torch(size: int) -> None:
    key, word = Key(7).fold("a", 3), WordKey(7).fold("a", 3)
    users = torch.tensor([0, 5, -2, 2**40])
    keys, words = key.spread(users), word.words(users.numpy())
    assert keys.numpy().view(np.uint64).tolist() == words.tolist()
    for own, expected in zip(words, normal(keys, 7), strict=True):
        assert (1 + symmetric(own, 7)).tolist() != [1.0] * 7
        torch.testing.assert_close(torch.erfinv(torch.tensor(symmetric(own, 7))).float() * 2**0.5, expected)
    positions = np.arange(size, dtype=np.uint64)
    for one, own in zip(keys, words, strict=True):
        images = shuffle(one.expand(size), torch.arange(size), size)
        assert images.tolist() == shuffle_in_numpy(own, positions, size).tolist()
        items = torch.arange(0, size, 3)
        rows = Rows(users[:1], torch.tensor([0, items.numel()]), items, torch.zeros_like(items))
        for count in (0, 3, size):
            drawn, _ = draw_outside(rows, size, torch.tensor([count]), one[None])
            assert drawn.tolist() == draw_in_numpy(items.numpy(), size, count, own).tolist()


def test_recommending_does_not_load_torch(dataset: Dataset, tmp_path: Path) -> None:
    path, user = tmp_path / "a.node", str(dataset.train.user_ids[3])
    node_of("choice", 2, dataset, path)
    heavy = "{'torch', 'polars', 'scipy', 'pydantic'}"
    check = f"import sys; from perfedrec.cli import app; app(standalone_mode=False); print({heavy} & set(sys.modules))"
    for words in (["recommend", "--user", user], ["add", "ann", str(dataset.train.item_ids[0])]):
        done = subprocess.run(
            [sys.executable, "-c", check, "node", *words, "--store", str(path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "set()"


def test_where_the_models_that_count_know_nothing_all_are_mixed() -> None:
    """The neighbourhood model has all of the weight, and its row of the user's only item is zero."""
    options = InferenceOptions(
        mixed=True,
        encoder="none",
        n_layers=0,
        neighbours=False,
        chooses_cluster=False,
        starts_itself=False,
        cosine=False,
        embedding_dim=2,
        init_scale=0.1,
        finetune_rounds=0,
        local_steps=1,
        learning_rate=1.0,
        user_learning_rate=0.1,
        n_negatives=None,
        temperature=1.0,
        leave_one_out=False,
        l2=0.0,
        weights=(0.0, 0.0, 0.0, 0.0, 1.0),
    )
    items = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    low_rank = np.array([[0.0], [1.0], [2.0]], dtype=np.float32)
    shared = {"items": items, "degrees": np.ones(3, dtype=np.int64), "low_rank": low_rank}
    model = Model(options, shared, {"trained": True})
    zero = np.zeros(2, dtype=np.float32)
    weights = np.log(np.maximum(np.array(options.weights, dtype=np.float32), np.float32(1e-12)))

    def user(own: int) -> User:
        client = Client(np.array([3, 1], dtype=np.float32), zero, zero, 1, np.zeros((1, 2), dtype=np.float32), weights)
        return User(model, np.array([own]), {"groups": np.array([0])}, client)

    scores, parts = user(1).scores()  # the neighbourhood model knows item 1
    assert abs(parts["global"]).max() < 1e-9
    assert scores.argmax() == 2
    scores, parts = user(0).scores()
    expected = items @ np.array([3, 1]) / 4  # local, cluster and global model are alike, and the fourth says nothing
    np.testing.assert_allclose(parts["global"], expected, rtol=1e-5)
    np.testing.assert_allclose(scores, 3 * expected, rtol=1e-5)
