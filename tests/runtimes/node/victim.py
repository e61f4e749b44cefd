"""A process to be killed: it changes a node's file, and prints each change that the store has confirmed.

After a number of changes, which take longer than the tests wait at most, it makes no more and waits for its end, so
that it does not run out of items where the tests are slow to kill it.

For every line ``PATH KIND START`` on standard input it forks a child that does the work. Forking is fast, because all
imports are already done.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tests.runtimes.node.test_store import ALGORITHM

from perfedrec.runtimes.flower.diary import Diary, Draft, Owner
from perfedrec.runtimes.node import Store

BATCH = 150


def write(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def add(store: Store, start: int) -> None:
    for number in range(start, start + 3000):
        store.add_interactions(f"u{number % 5}", str(number))
        write("ack", number)


def import_rows(store: Store, start: int) -> None:
    for number in range(start, start + 24):
        items = [str(number * BATCH + each) for each in range(BATCH)]
        store.import_interactions(pl.DataFrame({"user": [f"u{number % 5}"] * BATCH, "item": items}))
        write("ack", number)


def play(store: Store, start: int) -> None:
    """Rounds as a node answers them: with an entry in the journal for each."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    store.join_run(ALGORITHM, "run")
    everyone, diary = store.everyone(), Diary(store, Owner())
    for number in range(start, start + 3000):
        asked = Message(RecordDict(), dst_node_id=1, message_type="train")
        asked.metadata.__dict__["_message_id"] = asked.object_id
        draft = Draft("train", 0, "run", number, users=everyone, said="")

        def work(number: int = number) -> RecordDict:
            store.answer_round(number, b"tables", lambda: count_up(store, everyone))
            return RecordDict()

        diary.answer(asked, draft, work)
        write("ack", number)


def count_up(store: Store, everyone: object) -> bytes:
    client_state = store.load_client_states(everyone, None)  # type: ignore[arg-type]
    client_state = replace(client_state, count=client_state.count + 1)
    store.save_client_states(everyone, None, client_state)  # type: ignore[arg-type]
    return bytes(client_state.count.numpy().tobytes())


if __name__ == "__main__":
    for line in sys.stdin:
        path, kind, start = line.split()
        child = os.fork()
        if not child:
            with Store.open(Path(path)) as opened:
                {"add": add, "import": import_rows, "play": play}[kind](opened, int(start))
                signal.pause()
        write("pid", child)
        os.waitpid(child, 0)
        write("ended")
