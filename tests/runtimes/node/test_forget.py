"""No byte of a forgotten user is left in the file, or in the log and the index beside it."""

from __future__ import annotations

import sqlite3
import struct
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.errors import DataError
from perfedrec.data import Encoding
from perfedrec.evaluation.holdout import TEST, HoldOut
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.methods.federated.state import PerFedRecBroadcast
from perfedrec.runtimes.node import Entry, RoundError, Store, StoreError, database

N_ITEMS, DIM = 600, 16
SETTINGS = {
    "model": {"embedding_dim": DIM},
    "clusters": {"n_clusters": 3},
    "privacy": {"pseudo_items": 0.2, "sticky": True},
}
ALGORITHM = PerFedRecPP(PerFedRecSettings.model_validate(SETTINGS))
WANTED, OTHER = "Wanda Wanted", "Otto Other"


@dataclass(frozen=True)
class Traces:
    """Bytes that are in the file as long as a user is."""

    name: bytes
    identity: bytes
    rows: list[bytes]
    items: bytes
    vector: bytes
    moments: bytes
    tuned: bytes
    secret: bytes
    start: bytes
    attributes: bytes
    epsilon: bytes

    def found(self, content: bytes) -> set[str]:
        names = {name for name in vars(self) if name != "rows" and getattr(self, name) in content}
        return names | {f"row {number}" for number, row in enumerate(self.rows) if row in content}


EVERYTHING = {"name", "identity", "items", "vector", "moments", "tuned", "secret", "start", "attributes", "epsilon"}
EVERYTHING |= {f"row {number}" for number in range(21)}


def build(path: Path) -> tuple[Store, dict[str, Traces]]:
    """A node of 300 users who all have client states, with a served model and an answer to the last round."""
    rng = np.random.default_rng(1)
    store = Store.create(path, np.arange(N_ITEMS), encoding=Encoding(("a", "b", "c"), ((0.0, 1.0),) * 3))
    names = [f"user {number}" for number in range(298)] + [WANTED, OTHER]
    items = {name: np.sort(rng.choice(np.arange(256, N_ITEMS), 20, replace=False)) for name in names}
    attributes = {name: rng.random(3).astype(np.float32) for name in names}
    identities = {name: 0x51525300 + 7 * number for number, name in enumerate(names)}
    for part in (names[:298], names[298:]):
        pairs = [(name, int(item)) for name in part for item in rng.permutation(items[name])]
        store.import_interactions(
            pl.DataFrame(pairs, schema=["user", "item"], orient="row"), identities=identities, attributes=attributes
        )
    store.join_run(ALGORITHM, "run", hold_out=HoldOut("leave-one-out"))
    users = store.everyone()
    broadcast = PerFedRecBroadcast(
        items=torch.randn(N_ITEMS, DIM),
        degrees=torch.ones(N_ITEMS),
        groups=torch.zeros(users.numel() + 1, dtype=torch.int64),
        start=torch.randn(users.numel() + 1, DIM),
    )
    store.receive(broadcast, users, "run", 4, "")
    rows, positions = store.rows(users)

    def work() -> bytes:
        client_state = store.load_client_states(users, positions)
        for name in ("private", "first", "second", "rows"):
            getattr(client_state, name).normal_()
        store.save_client_states(users, positions, client_state)
        return client_state.private.numpy().tobytes()

    for number in range(3):  # pages are freed and used again
        store.answer_round(number, b"tables", work)
    store.keep_states(3, [])
    keys = store.keys_of(users)  # the last users have the largest epsilon
    spent = {key: 1 / 3 + place for place, key in enumerate(keys)}
    store.journal.write(Entry("train", run="run", round=2, users=spent, count=len(spent), against="somebody"))
    client_state, traces = store.load_client_states(users, positions), {}
    for name in (WANTED, OTHER):
        place = users.tolist().index(store.identity(name))
        with closing(sqlite3.connect(path)) as connection:
            (key,) = connection.execute("SELECT user FROM users WHERE id = ?", (name,)).fetchone()
        assert key > 255
        pair = {int(item): key.to_bytes(2, "big") + int(item).to_bytes(2, "big") for item in items[name]}
        # A row of interactions as SQLite writes it: lengths and types of two numbers of two bytes each, and no part.
        cells = [b"\x08\x04\x02\x02\x00" + each for each in pair.values()]
        tested = int(store.held_out(torch.tensor([store.identity(name)]), TEST).items)
        cells.append(b"\x0a\x05\x09\x02\x02\x01" + pair[tested] + b"\x02")  # of run 1, as part 2
        traces[name] = Traces(
            name=name.encode(),
            identity=store.identity(name).to_bytes(4, "big"),
            rows=cells,
            items=rows.items[rows.offsets[place] : rows.offsets[place + 1]].numpy().tobytes(),
            vector=client_state.private[place].numpy().tobytes(),
            moments=client_state.first[place].numpy().tobytes(),
            tuned=client_state.rows[rows.offsets[place] : rows.offsets[place + 1]].numpy().tobytes(),
            secret=client_state.secret[place].numpy().tobytes(),
            attributes=attributes[name].tobytes(),
            start=broadcast.start[place].numpy().tobytes(),  # type: ignore[index]
            epsilon=struct.pack(">d", 1 / 3 + place),  # as SQLite writes it
        )
    return store, traces


def content(path: Path) -> bytes:
    """All bytes of the file, its log and its index."""
    return b"|".join(each.read_bytes() for each in path.parent.iterdir() if each.name.startswith(path.name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.node"


def test_no_byte_of_a_forgotten_user_is_left(path: Path) -> None:
    store, traces = build(path)
    wanted, other = traces[WANTED], traces[OTHER]
    assert wanted.found(content(path)) == EVERYTHING  # the search works
    store.forget(WANTED)
    assert wanted.found(content(path)) == set()
    assert other.found(content(path)) == EVERYTHING
    with pytest.raises(DataError, match="unknown user"):
        store.identity(WANTED)
    with pytest.raises(RoundError, match="answer was not kept"):  # it contained a part of the user
        store.answer_round(2, b"tables", lambda: b"")
    found = store.status()
    assert (found["users"], found["interactions"]) == (299, 299 * 20)
    with pytest.raises(DataError, match="unknown user"):
        store.forget(WANTED)
    (entry,) = store.journal.read()
    assert (entry["users"], entry["epsilon"]) == (300, 1 / 3 + 299)
    store.forget(OTHER)  # who had the largest epsilon
    (entry,) = store.journal.read()
    assert (entry["users"], entry["epsilon"], entry["against"]) == (300, 1 / 3 + 297, "somebody")
    assert store.journal.totals()["runs"][0]["epsilon"] == 1 / 3 + 297
    store.close()
    assert wanted.found(content(path)) == set()


def test_deleting_alone_would_leave_traces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database.Database, "scrub", lambda self: None)
    store, traces = build(path)
    store.forget(WANTED)
    assert {"name", "vector", "row 3"} <= traces[WANTED].found(content(path))
    monkeypatch.undo()
    with Store.open(path):  # opening completes the overwriting, as after a kill
        assert traces[WANTED].found(content(path)) == set()


def test_another_reader_delays_the_overwriting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT", 0.2)
    first, traces = build(path)
    first.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as reader, Store.open(path) as store:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM users").fetchone()
        with pytest.raises(StoreError, match="deleted, but another process is reading"):
            store.forget(WANTED)
        assert store.unregistered() == []
        with Store.open(path) as second:  # other processes can open the file meanwhile
            assert second.status()["users"] == 299
        reader.execute("COMMIT")
    with Store.open(path):
        assert traces[WANTED].found(content(path)) == set()


def test_the_command(path: Path) -> None:
    store, traces = build(path)
    store.close()
    forgotten = CliRunner().invoke(app, ["node", "forget", "--store", str(path), "--user", WANTED])
    assert forgotten.exit_code == 0, forgotten.output
    assert traces[WANTED].found(content(path)) == set()
    again = CliRunner().invoke(app, ["node", "forget", "--store", str(path), "--user", WANTED])
    assert again.exit_code == 2
    assert again.stderr.count("\n") == 1
