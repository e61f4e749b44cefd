"""What a node's store accepts, returns and refuses."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.core.keys import Key, uniform
from perfedrec.core.types import Rows
from perfedrec.runtimes.node import RoundError, Store, StoreError

ITEMS = np.array(["tea", "milk", "007", "7", "bread", "jam"], dtype=object)


@dataclass(frozen=True)
class ExampleState:
    """A client state with all layouts: a number, a vector, an empty tensor, and a vector for each interaction."""

    count: Tensor
    vector: Tensor
    nothing: Tensor
    each: Tensor = field(metadata={"per": "row"})


class ExampleAlgorithm:
    """The only method of an algorithm that a store calls."""

    def init_clients(self, rows: Rows, key: Key) -> ExampleState:
        return ExampleState(
            count=torch.zeros(rows.n_users, dtype=torch.int64),
            vector=uniform(key.spread(rows.users), 3),
            nothing=torch.zeros(rows.n_users, 0, 3),
            each=torch.full((rows.items.numel(), 2), -1.0),
        )


ALGORITHM: Any = ExampleAlgorithm()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "home.node", ITEMS) as made:
        frame = pl.DataFrame({"user": ["ann", "bob", "ann", "bob", "ann"], "item": ["jam", "7", "tea", "007", "tea"]})
        assert made.import_interactions(frame, identities={"bob": 9, "ann": 30}) == (2, 4, 0)
        yield made


def reopened(store: Store) -> Store:
    store.close()
    return Store.open(store.path)


def test_rows_follow_the_order_of_the_users_that_are_asked_for(store: Store) -> None:
    assert store.everyone().tolist() == [9, 30]
    rows, _ = store.rows(torch.tensor([30, 9]))
    assert rows.users.tolist() == [30, 9]
    assert rows.offsets.tolist() == [0, 2, 4]
    assert rows.items.tolist() == [0, 5, 2, 3]  # "007" and "7" are two items
    assert rows.segments.tolist() == [0, 0, 1, 1]
    assert store.offsets.tolist() == [0, 2, 4]
    with pytest.raises(PerfedrecError, match="does not host; it hosts 2"):
        store.rows(torch.tensor([9, 10]))


def test_an_import_is_all_or_nothing_and_can_be_repeated(store: Store) -> None:
    frame = pl.DataFrame({"user": ["bob", "eve", "bob"], "item": ["jam", "tea", "gin"]})
    with pytest.raises(DataError, match=r"1 of 3 interactions .*'gin'.*--skip-unknown"):
        store.import_interactions(frame)
    assert store.rows(store.everyone())[0].items.tolist() == [2, 3, 0, 5]
    assert store.import_interactions(frame, skip_unknown=True) == (1, 2, 1)
    assert store.import_interactions(frame, skip_unknown=True) == (0, 0, 1)
    assert store.unregistered() == ["eve"]
    assert store.everyone().tolist() == [9, 30]


def test_interactions_are_added_one_at_a_time(store: Store) -> None:
    assert store.add_interactions("bob", "bread")
    assert not store.add_interactions("bob", "bread")
    assert reopened(store).rows(torch.tensor([9]))[0].items.tolist() == [2, 3, 4]
    with pytest.raises(DataError, match="unknown item 'gin'"):
        Store.open(store.path).add_interactions("new", "gin")
    assert Store.open(store.path).unregistered() == []


def test_identities_are_given_once_and_to_one_user(store: Store) -> None:
    store.add_interactions("eve", "tea")
    store.add_interactions("zoe", "tea")
    for wrong, said in (
        ({"eve": 9}, "another user's"),
        ({"eve": -1}, "negative"),
        ({"bob": 8}, "cannot become 8"),
        ({"eve": 1, "nobody": 2}, "unknown user 'nobody'"),
    ):
        with pytest.raises(DataError, match=said):
            store.register(wrong)
        assert store.unregistered() == ["eve", "zoe"]
    store.register({"zoe": 4, "bob": 9})
    assert store.everyone().tolist() == [4, 9, 30]


def test_integer_catalogues_keep_integers(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a.node", np.array([30, 10, 20])) as store:
        assert store.item_ids.tolist() == [30, 10, 20]
        store.import_interactions(pl.DataFrame({"user": [1, 2], "item": [20, 30]}), identities={"1": 0, "2": 1})
        assert store.add_interactions("1", "10")
        assert store.rows(store.everyone())[0].items.tolist() == [1, 2, 0]
        first = store.catalogue
    with Store.create(tmp_path / "b.node", np.array([10, 20, 30])) as other:
        assert other.catalogue != first  # the order counts


def test_client_states_are_stored_by_user_and_by_item(store: Store) -> None:
    store.join_run(ALGORITHM, "run")
    both = torch.tensor([30, 9])
    rows, positions = store.rows(both)
    start = store.load_client_states(both, positions)
    assert start.each.tolist() == [[-1.0, -1.0]] * 4
    store.save_client_states(
        both,
        positions,
        replace(
            start, count=torch.tensor([3, 4]), vector=start.vector + 1, each=rows.items[:, None].repeat(1, 2) * 1.0
        ),
    )
    store.add_interactions("ann", "milk")  # its row is between the rows of the two items that were there
    store.add_interactions("bob", "tea")
    store = reopened(store)
    store.join_run(ALGORITHM, "run")
    rows, positions = store.rows(both.flip(0))
    client_state = store.load_client_states(both.flip(0), positions)
    assert rows.items.tolist() == [0, 2, 3, 0, 1, 5]
    assert client_state.each[:, 0].tolist() == [-1.0, 2.0, 3.0, 0.0, -1.0, 5.0]
    assert client_state.count.tolist() == [4, 3]
    assert torch.equal(client_state.vector, start.vector.flip(0) + 1)
    assert client_state.nothing.shape == (2, 0, 3)


def test_client_states_of_another_method_are_refused(store: Store) -> None:
    class Other(ExampleAlgorithm):
        def init_clients(self, rows: Rows, key: Key) -> ExampleState:
            return replace(super().init_clients(rows, key), vector=torch.zeros(rows.n_users, 4))

    everyone = store.everyone()
    store.join_run(ALGORITHM, "run")
    store.save_client_states(
        everyone, store.rows(everyone)[1], store.load_client_states(everyone, store.rows(everyone)[1])
    )
    store.join_run(Other(), "run")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="another method or configuration; vector does not fit"):
        store.load_client_states(everyone, store.rows(everyone)[1])


def count_up(store: Store, times: int = 1) -> bytes:
    """The work of a round: the count of every user goes up by ``times``, and the new counts are the answer."""
    everyone = store.everyone()
    _, positions = store.rows(everyone)
    client_state = store.load_client_states(everyone, positions)
    store.save_client_states(everyone, positions, replace(client_state, count=client_state.count + times))
    return bytes(store.load_client_states(everyone, positions).count.tolist())


def test_a_round_is_answered_once(store: Store) -> None:
    store.join_run(ALGORITHM, "run")
    assert store.answer_round(0, b"tables", lambda: count_up(store)) == bytes([1, 1])
    assert store.answer_round(3, b"tables", lambda: count_up(store)) == bytes([2, 2])
    store = reopened(store)
    store.join_run(ALGORITHM, "run")
    assert store.answer_round(3, b"tables", lambda: count_up(store)) == bytes([2, 2])  # the stored answer
    for number, request, said in ((3, b"others", "with other content"), (2, b"tables", "is past")):
        with pytest.raises(RoundError, match=said):
            store.answer_round(number, request, lambda: count_up(store))
    assert store.answer_round(4, b"tables", lambda: count_up(store) and None) is None
    with pytest.raises(RoundError, match="not kept"):
        store.answer_round(4, b"tables", lambda: count_up(store))
    assert count_up(store, 0) == bytes([3, 3])


def test_a_round_that_fails_leaves_nothing(store: Store) -> None:
    store.join_run(ALGORITHM, "run")

    def broken() -> bytes:
        count_up(store)
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        store.answer_round(0, b"tables", broken)
    assert count_up(store, 0) == bytes([0, 0])
    assert store.answer_round(0, b"other tables", lambda: count_up(store)) == bytes([1, 1])


def test_each_run_and_each_node_has_its_own_seed(store: Store, tmp_path: Path) -> None:
    first = store.join_run(ALGORITHM, "first")
    count_up(store)
    assert reopened(store).join_run(ALGORITHM, "first") == first
    store = Store.open(store.path)
    assert store.join_run(ALGORITHM, "second") != first
    assert count_up(store, 0) == bytes([0, 0])  # client states belong to a run
    with pytest.raises(RoundError, match="left the run first"):
        store.join_run(ALGORITHM, "first")
    with Store.create(tmp_path / "other.node", ITEMS) as other:
        assert other.join_run(ALGORITHM, "first") != first


def test_a_run_has_one_configuration(store: Store) -> None:
    store.join_run(ALGORITHM, "first", configuration="epsilon = 8")
    with reopened(store) as opened:
        opened.join_run(ALGORITHM, "first", configuration="epsilon = 8")
        with pytest.raises(RoundError, match="run first began with another configuration"):
            opened.join_run(ALGORITHM, "first", configuration="epsilon = 9")
        opened.join_run(ALGORITHM, "second", configuration="epsilon = 9")


def test_only_the_owner_can_read_the_file(store: Store) -> None:
    store.add_interactions("ann", "bread")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.path.parent.iterdir()}
    assert modes == {"home.node": 0o600, "home.node-wal": 0o600, "home.node-shm": 0o600}


def test_a_file_is_never_overwritten(store: Store) -> None:
    before = store.path.read_bytes()
    with pytest.raises(StoreError, match="exists already"):
        Store.create(store.path, ITEMS)
    assert store.path.read_bytes() == before
    assert len(list(store.path.parent.iterdir())) == 3


def test_a_sum_is_opened_only_with_the_same_nodes(store: Store) -> None:
    store.join_run(ALGORITHM, "first")
    for number in (-1, 0, 1):
        store.open_sum(number, b"all", [7, 3, 5])
    store.open_sum(0, b"all", [3, 5, 7])  # the order does not matter
    for request, others in ((b"all", [3, 5]), (b"all", [3, 5, 7, 9]), (b"all", []), (b"all but one", [3, 5, 7])):
        with pytest.raises(RoundError, match="round 0 of run first was opened with other nodes"):
            store.open_sum(0, request, others)
    with reopened(store) as opened:
        opened.join_run(ALGORITHM, "first")
        with pytest.raises(RoundError, match="the sum of the item degrees of run first was"):
            opened.open_sum(-1, b"all", [3, 5])
        opened.join_run(ALGORITHM, "second")
        opened.open_sum(-1, b"all", [3, 5])  # a sum of another run


def test_the_users_of_a_file_can_be_listed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a.node", np.arange(5)) as store:
        frame = pl.DataFrame({"user": ["eve", "ann", "bob"], "item": [0, 1, 2]})
        store.import_interactions(frame, identities={"ann": 7})
        listed = store.user_ids()
        assert list(listed) == ["eve", "ann", "bob"]
        assert listed["ann"] == 7
        assert all(store.identity(name) == identity for name, identity in listed.items())
