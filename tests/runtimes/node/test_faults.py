"""Killed processes, full disks, and files that are damaged, old, of another program or shared: no confirmed change is
lost, and each error is one line that says why."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save
from tests.runtimes.node.test_store import ALGORITHM
from tests.runtimes.node.victim import BATCH, count_up
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.runtimes.node import Store, StoreError, database
from perfedrec.runtimes.node.database import MIGRATIONS

ROOT = Path(__file__).parents[3]
ITEMS = np.arange(200 * BATCH)


@pytest.fixture(scope="module")
def killer() -> Iterator[subprocess.Popen[str]]:
    """A process that forks the children that are killed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.runtimes.node.victim"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, bufsize=1, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.stdin.close()


def killed(killer: subprocess.Popen[str], path: Path, kind: str, start: int, delay: float) -> list[int]:
    """The changes that were confirmed to a child before it was killed, ``delay`` seconds after the first of them."""
    assert killer.stdin is not None
    assert killer.stdout is not None
    killer.stdin.write(f"{path} {kind} {start}\n")
    confirmed, child, alive = list[int](), 0, True
    for line in killer.stdout:
        word, *rest = line.split()
        if word == "pid":
            child = int(rest[0])
        if word == "ack":
            confirmed.append(int(rest[0]))
        if child and confirmed and alive:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)  # it is there: it makes its changes and waits for this
            alive = False
        if word == "ended":
            return confirmed
    raise AssertionError("the process ended")


def check_intact(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize("kind", ["add", "import", "play"])
def test_confirmed_changes_survive_a_kill(kind: str, killer: subprocess.Popen[str], tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    with Store.create(path, ITEMS) as store:
        store.import_interactions(pl.DataFrame({"user": ["a", "b"], "item": [1, 2]}), first_identity=0)
    rng, start = random.Random(3), 0
    for _ in range(8):
        confirmed = killed(killer, path, kind, start, rng.uniform(0, 0.03))
        assert confirmed == list(range(start, confirmed[-1] + 1))
        check_intact(path)
        with Store.open(path) as store:
            if kind == "play":
                store.join_run(ALGORITHM, "run")
                played = store.status()["last_round"]
                assert played in (confirmed[-1], confirmed[-1] + 1)
                everyone = store.everyone()
                counts = store.load_client_states(everyone, everyone).count
                assert counts.tolist() == [played + 1] * 2  # client states and round were stored together
                assert store.answer_round(played, b"tables", lambda: b"again") == counts.numpy().tobytes()
                assert [each["round"] for each in store.journal.read()] == list(range(played, -1, -1))
                assert {each["users"] for each in store.journal.read("a")} == {2}
                start = played + 1
                continue
            store.register({each: number for number, each in enumerate(store.unregistered(), store.n_users)})
            there = set(store.rows(store.everyone())[0].items.tolist()) - {1, 2}
            size = 1 if kind == "add" else BATCH
            expected = {
                item for number in range(confirmed[-1] + 1) for item in range(number * size, (number + 1) * size)
            }
            more = set(range((confirmed[-1] + 1) * size, (confirmed[-1] + 2) * size))
            # The change after the last confirmed one is there completely or not at all.
            assert there in (expected - {1, 2}, (expected | more) - {1, 2})
            start = confirmed[-1] + 1


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """No file can become larger than the largest file of the node is now, plus 8 kB."""
    size = max(each.stat().st_size for each in path.parent.iterdir() if each.name.startswith(path.name))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_gives_one_line_and_loses_nothing(tmp_path: Path) -> None:
    path, file = tmp_path / "a.node", tmp_path / "mine.csv"
    with Store.create(path, ITEMS[:2000]) as store:
        store.add_interactions("ann", "5")
    rows = pl.DataFrame({"user": np.arange(50).repeat(2000), "item": np.tile(ITEMS[:2000], 50)})
    rows.write_csv(file)
    with full_disk(path):
        refused = CliRunner().invoke(app, ["node", "import", str(file), "--store", str(path)])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "the disk is full" in refused.stderr
    check_intact(path)
    with Store.open(path) as store:
        assert store.status()["interactions"] == 1
    accepted = CliRunner().invoke(app, ["node", "import", str(file), "--store", str(path)])
    assert accepted.exit_code == 0, accepted.output
    with Store.open(path) as store:
        assert store.status()["interactions"] == rows.height + 1


def test_a_round_on_a_full_disk_is_not_played(tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    with Store.create(path, ITEMS[:50]) as store:
        store.import_interactions(pl.DataFrame({"user": ["a", "b"], "item": [1, 2]}), first_identity=0)
        store.join_run(ALGORITHM, "run")
        everyone = store.everyone()
        large = bytes(3_000_000)
        with full_disk(path), pytest.raises(StoreError, match="the disk is full"):
            store.answer_round(0, b"tables", lambda: count_up(store, everyone) + large)
        assert store.status()["last_round"] is None
        assert store.load_client_states(everyone, everyone).count.tolist() == [0, 0]
        answered = store.answer_round(0, b"tables", lambda: count_up(store, everyone) + large)
        assert answered == np.array([1, 1]).tobytes() + large


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "no database":
        content = bytearray(b"user,item\n1,2\n" * 100)
    elif how == "half of it":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    elif how == "pages overwritten":
        content[4096:12288] = bytes(range(256)) * 32
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["no database", "half of it", "empty", "pages overwritten"])
def test_a_damaged_file_gives_one_line(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    with Store.create(path, ITEMS) as store:
        store.add_interactions("ann", "5")
    damage(path, how)
    content = path.read_bytes()
    for command in (["status"], ["add", "ann", "6"], ["recommend", "--user", "ann"], ["forget", "--user", "ann"]):
        refused = CliRunner().invoke(app, ["node", *command, "--store", str(path)])
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.count("\n") == 1
        assert "is damaged" in refused.stderr or "not a node's file" in refused.stderr
    assert path.read_bytes() == content


def play_a_round(store: Store) -> None:
    """Give a new file one user, and let it answer the first round of a run."""
    store.import_interactions(pl.DataFrame({"user": ["a"], "item": [1]}), first_identity=0)
    store.join_run(ALGORITHM, "run")
    store.answer_round(0, b"tables", lambda: count_up(store, store.everyone()))


def test_damage_within_a_cell_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.node"
    with Store.create(path, ITEMS[:50]) as store:
        play_a_round(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE memories SET content = zeroblob(20)")
        with pytest.raises(StoreError, match="is damaged"):
            store.answer_round(1, b"tables", lambda: count_up(store, store.everyone()))
    refused = CliRunner().invoke(app, ["node", "status", "--store", str(path)])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda array: np.full_like(array, np.nan), "has numbers that are not finite: the file is damaged, or"),
        (lambda array: np.concatenate([array, array]), "has 2 rows\\)"),
    ],
)
def test_numbers_that_cannot_be_right_are_refused(
    change: Callable[[NDArray[Any]], NDArray[Any]], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.node"
    with Store.create(path, ITEMS[:50]) as store:
        play_a_round(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            (content,) = other.execute("SELECT content FROM memories").fetchone()
            arrays = load(content)
            numbers = (name for name, array in arrays.items() if array.dtype.kind == "f" and array.size)
            name = next(name for name in numbers if arrays[name].shape[0] == 1)
            arrays[name] = change(arrays[name])
            other.execute("UPDATE memories SET content = ?", (save(arrays),))
        with pytest.raises(StoreError, match=rf"a.node: .*{name} {why}.*; expected .* backup"):
            store.find_client_states(store.everyone())


def test_a_database_of_another_program_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "b.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE users (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a node's file"):
        Store.open(path)
    assert path.read_bytes() == before


def test_an_old_file_gets_the_newest_schema(tmp_path: Path) -> None:
    """With the tables that version 1 of the schema had."""
    path = tmp_path / "a.node"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(MIGRATIONS[0])
        connection.execute("INSERT INTO node VALUES (1, x'0102', 'abc', 0)")
        connection.executemany("INSERT INTO items VALUES (?, ?)", enumerate(["tea", "milk"]))
        connection.execute("INSERT INTO users VALUES (4, 'ann', 17, NULL)")
        connection.execute("INSERT INTO interactions VALUES (4, 1)")
        connection.execute("INSERT INTO runs VALUES (1, 'run', 6, x'00', NULL)")
        connection.execute(f"PRAGMA application_id = {database.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    with Store.open(path) as store:
        found = store.status()
        assert (found["schema"], found["interactions"], found["last_round"]) == (len(MIGRATIONS), 1, 6)
        assert store.rows(store.everyone())[0].items.tolist() == [1]
        assert found["model"] is None
        store.add_interactions("ann", "tea")
    with Store.open(path) as store:
        assert store.status()["interactions"] == 2
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(
        StoreError, match=f"has schema 99, from a newer perfedrec; this one knows up to {len(MIGRATIONS)}"
    ):
        Store.open(path)


def test_a_writer_waits_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.node"
    monkeypatch.setattr(database, "LOCK_TIMEOUT", 0.3)
    with Store.create(path, ITEMS[:50]) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"another process .* for 0\.3 s; nothing was changed"):
            Store.open(path).add_interactions("ann", "5")
        assert store.status()["interactions"] == 0  # reading is possible meanwhile
        other.execute("COMMIT")
        assert store.add_interactions("ann", "5") == 1


def test_many_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.node"
    monkeypatch.setattr(database, "LOCK_TIMEOUT", 600.0)  # SQLite does not serve the one first that has waited longest
    Store.create(path, ITEMS[:200]).close()

    def write(name: str) -> None:
        with Store.open(path) as store:
            for item in range(40):
                store.add_interactions(name, str(item))

    threads = [Thread(target=write, args=(f"u{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store.open(path) as store:
        assert store.status()["interactions"] == 160
    check_intact(path)
