"""A node as its owner uses it, in Python."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runtimes.node.nodes import write_node

from perfedrec import ConfigError, DataError, Node
from perfedrec.data import Dataset, load
from perfedrec.data.details import Details
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.node import Store, StoreError
from perfedrec.runtimes.simulator import Simulator

N_ITEMS = 148
SOME = torch.tensor([3, 11, 40])
OPTIONS: dict[str, Any] = {
    "model": {"embedding_dim": 16, "refresh_every": 2},
    "pretraining": {"kind": "spectral"},
    "clusters": {"n_clusters": 3, "start": 1, "every": 2},
    "selection": {"n_clients_per_round": 60},
    "personal": {"pretrained": 0.5, "neighbourhood": 0.7, "local": 0.4},
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("synthetic:users=120,items=150,clusters=3,interactions_per_user=12,seed=4")


def made(kind: Any, options: dict[str, Any], dataset: Dataset, path: Path) -> None:
    """A node's file with the users ``SOME`` after a few rounds of a simulation."""
    simulator = Simulator(kind(kind.Options.model_validate(options)), dataset, seed=5, device="cpu")
    for _ in range(simulator.n_phases + 4):
        simulator.play()
    write_node(simulator, dataset, SOME, 4, path)


@pytest.fixture(scope="module")
def template(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("node") / "a.node"
    made(PerFedRecPP, OPTIONS, dataset, path)
    return path


@pytest.fixture
def node(template: Path, tmp_path: Path) -> Any:
    path = tmp_path / "a.node"
    path.write_bytes(template.read_bytes())
    with Node.open(path) as opened:
        yield opened


def items(rows: list[dict[str, Any]]) -> list[Any]:
    return [row["item"] for row in rows]


def test_a_list_has_what_is_asked_for(node: Node, dataset: Dataset) -> None:
    user = node.users()[0]
    everything = node.recommend(user, dataset.n_items)
    own = items(node.items_of(user))
    assert sorted(items(everything) + own) == sorted(dataset.train.item_ids.tolist())
    assert items(node.recommend(user, 5)) == items(everything)[:5]
    first, second = items(everything)[:2]
    assert items(node.recommend(user, 5, exclude=[first])) == items(everything)[1:6]
    assert items(node.recommend(user, 5, exclude=[str(first), second])) == items(everything)[2:7]
    some = items(everything)[3::17]
    assert items(node.recommend(user, 100, among=[*reversed(some), own[0]])) == some
    assert node.recommend(user, 5, among=[]) == []
    for row in everything[:3]:
        parts = ("local", "cluster", "global", "pretrained", "neighbourhood")
        assert sum(row[name] for name in parts) == pytest.approx(row["score"], rel=1e-4)
        assert (row["title"], row["picture"], row["attributes"]) == (None, False, {})


def test_what_was_dismissed_or_added_leaves_the_list_at_once(node: Node) -> None:
    user, other = node.users()[:2]
    first, second, third = items(node.recommend(user, 3))
    before = node.recommend(other, 5)
    assert node.dismiss(user, first, first) == 1
    assert node.dismiss(user, first) == 0
    assert items(node.dismissed(user)) == [first]
    assert items(node.recommend(user, 2)) == [second, third]
    with Node.open(node.path) as another:  # as another process does
        assert another.add(user, second) == 1
    assert second not in items(node.recommend(user, 140))
    assert node.remove(user, second) == 1
    assert node.remove(user, second) == 0
    assert node.restore(user, first) == 1
    assert items(node.recommend(user, 3)) == [first, second, third]
    assert node.recommend(other, 5) == before


def test_reasons_are_what_the_own_items_add(node: Node) -> None:
    """The contribution of an item is what the score loses where the item's rows are 0."""
    user, ids = node.users()[1], node._file.ids(np.arange(N_ITEMS))
    rows = node.recommend(user, 4, why=True)
    stored = node._file.stored(user)
    scored = node._file.user(stored)
    assert scored is not None
    own = np.array(stored.items)
    found = scored.contributions(np.arange(N_ITEMS))
    models = scored.models
    rebuilt = sum(each.items @ (each.weight * each.pulled.sum(0)) for each in models.values() if not each.fixed)
    np.testing.assert_allclose(found.sum(1), rebuilt, rtol=1e-3, atol=1e-5)
    for row in rows:
        shares = np.maximum(found[ids.index(row["item"])], 0)
        expected = own[np.argsort(-shares, kind="stable")[:2]]
        assert items(row["because"]) == [ids[number] for number in expected]
        assert row["because"][0]["share"] == pytest.approx(shares.max() / shares.sum(), rel=1e-4)


def test_likeness_is_the_cosine_of_vectors(node: Node) -> None:
    _, model = node._file.served()
    assert model is not None
    vectors = model.vectors().astype(np.float64)
    wanted = vectors[17] @ vectors.T / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[17])
    expected, ids = [number for number in np.argsort(-wanted) if number != 17][:6], node._file.ids(np.arange(N_ITEMS))
    found = node.similar(ids[17], 6)
    assert items(found) == [ids[number] for number in expected]
    assert [row["score"] for row in found] == pytest.approx(wanted[expected].tolist(), abs=1e-5)
    assert len(node.similar(ids[17], 1000)) == N_ITEMS - 1


def test_a_method_whose_vectors_belong_to_no_item_explains_by_likeness(dataset: Dataset, tmp_path: Path) -> None:
    made(FedMF, {"model": {"embedding_dim": 16}, "selection": {"n_clients_per_round": 60}}, dataset, tmp_path / "a")
    with Node.open(tmp_path / "a") as node:
        (row,) = node.recommend(node.users()[0], 1, why=True)
        likeness = {each["item"]: each["score"] for each in node.similar(row["item"], N_ITEMS)}
        own = sorted(items(node.items_of(node.users()[0])), key=lambda each: -likeness[each])
        assert items(row["because"]) == [each for each in own[:2] if likeness[each] > 0]
        total = sum(max(likeness[each], 0) for each in own)
        assert row["because"][0]["share"] == pytest.approx(likeness[own[0]] / total, rel=1e-3)


def test_titles_are_found_whatever_their_case_and_accents(node: Node) -> None:
    star, jar, war = (
        Details("3", "Star Wars", ("image/png", b"bytes"), {"genres": "Sci-Fi"}),
        "Étoile",
        "A Starry Night",
    )
    assert node.describe([star, Details("9", jar), Details("12", war), Details("900", "?")]) == (3, 1)
    assert node.item(3) == {"item": 3, "title": "Star Wars", "picture": True, "attributes": {"genres": "Sci-Fi"}}
    assert node.picture("3") == (b"bytes", "image/png")
    assert node.picture("9") is None
    assert items(node.search("STAR")) == [3, 12]
    assert items(node.search("etoile")) == [9]
    assert items(node.search("12"))[0] == 12  # its id
    assert node.search("100%") == []
    assert node.search("  ") == []
    node.describe([Details("3", "Other")])
    assert node.item(3) == {"item": 3, "title": "Other", "picture": False, "attributes": {}}
    with pytest.raises(DataError, match="expected ids such as 0"):
        node.describe([Details("900")])


def test_a_user_of_whom_nothing_is_known_gets_what_is_popular(node: Node, dataset: Dataset) -> None:
    assert node.add("new") == 0
    ids, counts = dataset.train.item_ids.tolist(), np.bincount(dataset.train.items, minlength=N_ITEMS)
    assert [row["score"] for row in node.popular(150)] == sorted(counts.tolist(), reverse=True)
    rows = node.recommend("new", 20)
    assert [counts[ids.index(row["item"])] for row in rows] == sorted(counts.tolist(), reverse=True)[:20]
    assert all(row["popularity"] == row["score"] for row in rows)


def test_everything_about_a_user_can_be_taken_along_and_deleted(node: Node) -> None:
    user = node.users()[0]
    node.dismiss(user, 5)
    found = node.export(user)
    assert items(found["items"]) == items(node.items_of(user))
    assert items(found["dismissed"]) == [5]
    assert found["identity"] == 3
    assert len(found["trained"]["client states"][0]["private"][0]) == 16
    node.forget(user)
    assert user not in node.users()
    for call in (node.recommend, node.items_of, node.export, node.forget, node.dismissed, node.journal):
        with pytest.raises(DataError, match="unknown user"):
            call(user)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda node: node.recommend("nobody"), DataError, "unknown user 'nobody'"),
        (lambda node: node.recommend("3", 0), ConfigError, "expected 1 or more"),
        (lambda node: node.recommend("3", exclude=["gin"]), DataError, "unknown item 'gin'"),
        (lambda node: node.similar("gin"), DataError, "unknown item 'gin'"),
        (lambda node: node.add(" ", 1), ConfigError, "the id of a user is empty"),
        (lambda node: node.add("a\0", 1), ConfigError, "has U.0000: a control character"),
        (lambda node: node.add("a\tb", 1), ConfigError, "has U.0009"),
        (lambda node: node.add("a\u2028b", 1), ConfigError, "has U.2028"),
        (lambda node: node.add("\ufffd", 1), ConfigError, "has U.FFFD, which stands for damaged text"),
        (lambda node: node.add("\ud800", 1), ConfigError, "half of a UTF-16 pair"),
        (lambda node: node.add("x" * 257, 1), ConfigError, "has 257 characters"),
        (lambda node: node.add("3", 1, "gin"), DataError, "unknown item 'gin'"),
        (lambda node: node.dismiss("3", "gin"), DataError, "unknown item 'gin'"),
        (lambda node: node.set_rules(require="strong"), ConfigError, "expected one of none, paper, private, secure"),
        (lambda node: node.journal(limit=0), ConfigError, "expected 1 or more"),
    ],
)
def test_a_mistake_changes_nothing(call: Any, error: type[Exception], said: str, node: Node) -> None:
    before = node.status()
    with pytest.raises(error, match=said):
        call(node)
    assert {**node.status(), "model": None} == {**before, "model": None}


def test_rules_are_seen_by_other_processes_at_once(node: Node) -> None:
    assert node.rules() == {"require": ["secure"], "chosen": None, "paused": False, "left": False}
    with Node.open(node.path) as another:
        another.set_rules(require="private", paused=True)
        assert node.rules() == {"require": ["private"], "chosen": "private", "paused": True, "left": False}
        another.leave()
        assert node.rules()["left"]
        assert another.set_rules(left=False, require=None, paused=False) == node.rules()
    assert node.rules() == {"require": ["secure"], "chosen": None, "paused": False, "left": False}
    assert node.journal() == []
    assert node.privacy()["runs"] == []


def test_a_node_without_a_model_has_no_lists(tmp_path: Path) -> None:
    Store.create(tmp_path / "a.node", np.array(["tea", "milk"], dtype=object)).close()
    with Node.open(tmp_path / "a.node") as node:
        node.add("ann", "tea")
        assert items(node.search("T")) == ["tea"]
        for call in (lambda: node.recommend("ann"), lambda: node.similar("tea"), node.popular):
            with pytest.raises(StoreError, match="has received no model yet"):
                call()


def test_threads_use_one_node_together(node: Node) -> None:
    users = node.users()
    expected = {user: node.recommend(user, 10) for user in users}
    wrong = list[object]()

    def work(number: int) -> None:
        try:
            for step in range(10):
                user = users[(number + step) % len(users)]
                node.add(f"thread {number}", step)
                if node.recommend(user, 10) != expected[user]:
                    wrong.append((number, step))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []
    assert len(node.items_of("thread 3")) == 10


def test_torch_is_not_loaded(template: Path) -> None:
    code = (
        "import sys; from perfedrec import Node\n"
        f"with Node.open({str(template)!r}) as node:\n"
        "    user = node.users()[0]; node.recommend(user, 5, why=True); node.similar(3); node.popular()\n"
        "    node.status(); node.export(user); node.search('1'); node.journal(); node.privacy(); node.rules()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
