"""What is repeated from a log, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perfedrec.runtimes import log
from perfedrec.runtimes.log import Log, Request
from perfedrec.runtimes.worker import Work


def request(number: int, size: int = 1, **users: list[int]) -> Request:
    """A request to shards "s0", "s1"; each user's own number is ten times its own."""
    works = {
        int(shard[1:]): Work(
            number, number, "train", 1, 2, 1, 3, np.array(asked), {"own": np.array([10 * user for user in asked])}
        )
        for shard, asked in users.items()
    }
    return Request(number, works, f"broadcast {number}", size)


def repeated(made: Log, shard: int) -> list[tuple[str, list[int], list[int]]]:
    return [(common, work.users.tolist(), work.own["own"].tolist()) for work, common in made.of(shard)]


def test_what_is_copied_is_not_repeated() -> None:
    made = Log(n_users=6)
    made.add(request(1, s0=[2, 0], s1=[5]))
    made.add(request(2, s0=[1, 2]))
    assert made.users(0).tolist() == [0, 1, 2]
    assert made.users(1).tolist() == [5]
    assert repeated(made, 0) == [("broadcast 1", [2, 0], [20, 0]), ("broadcast 2", [1, 2], [10, 20])]
    assert repeated(made, 1) == [("broadcast 1", [5], [50])]

    made.note_copied(torch.tensor([2]))
    assert repeated(made, 0) == [("broadcast 1", [0], [0]), ("broadcast 2", [1], [10])]
    assert made.users(0).tolist() == [0, 1]
    made.add(request(3, s0=[2]))
    assert repeated(made, 0)[-1] == ("broadcast 3", [2], [20])
    assert made.users(0).tolist() == [0, 1, 2]

    made.note_copied(torch.tensor([0, 1, 2, 5]))
    assert repeated(made, 0) == repeated(made, 1) == []
    made.clear()
    assert made.users(0).numel() == 0
    assert made.number == 3


def test_a_log_is_full_by_its_requests_or_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LOG_REQUESTS", 3)
    monkeypatch.setattr(log, "LOG_BYTES", 10)
    made = Log(n_users=1)
    made.add(request(1, size=9, s0=[0]))
    assert not made.full
    made.add(request(2, size=1, s0=[0]))
    assert made.full
    made.clear()
    for number in (3, 4, 5):
        assert not made.full
        made.add(request(number, s0=[0]))
    assert made.full
