"""What stands out among the sums of a round, by hand, and what an overseer makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import e, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.federation.test_admission import KEYS
from tests.federation.test_members import keys

from perfedrec.federation.admission import Admission, Limits
from perfedrec.federation.hosts import Hosts
from perfedrec.federation.members import Register
from perfedrec.federation.metrics import Watch
from perfedrec.federation.overseer import Overseer
from perfedrec.federation.unusual import large_share, standing_out
from perfedrec.runs.files import UNUSUAL, read_lines
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes.flower import Apart, Seen

NAMES = {number: f"n{number}" for number in range(9)}
LIKE = Seen((0,), 7, "train", clients=4, norm=8.0, rows=40)


def sums(*norms: float, rows: int = 40, clients: int = 4) -> list[Seen]:
    return [replace(LIKE, nodes=(place,), norm=norm, rows=rows, clients=clients) for place, norm in enumerate(norms)]


def test_the_robust_z_of_a_norm() -> None:
    """Logarithms of norms 0, 1, 2, 3 and 12: median 2, absolute deviations 2, 1, 0, 1, 10 with median 1."""
    found = standing_out(sums(1, e, e**2, e**3, e**12), NAMES)
    assert [(each.nodes, each.statistic, each.round, each.phase) for each in found] == [(("n4",), "norm", 7, "train")]
    (each,) = found
    assert each.z == pytest.approx(10 / 1.4826)
    assert (each.value, each.median) == (pytest.approx(e**12 / 4), pytest.approx(e**2 / 4))
    times = f"{e**10:.3g} times the median {e**2 / 4:.3g} of 5 nodes (robust z 6.7)"
    assert each.text == f"the norm of its sum per client is {e**12 / 4:.3g}, {times}"


def test_where_all_are_alike_one_has_to_be_six_times_as_large() -> None:
    assert standing_out(sums(1, 1, 1, 1, 1, 6.0), NAMES) == []
    (each,) = standing_out(sums(1, 1, 1, 1, 1, 6.1), NAMES)
    assert each.z == pytest.approx(log(6.1) / 0.3)
    assert standing_out(sums(10, 10, 10, 10, 10, 0.01), NAMES) == []  # small ones do no harm


def test_values_are_per_client_and_four_sums_are_too_few() -> None:
    many = [replace(each, clients=400) if each.nodes == (5,) else each for each in sums(1, 1, 1, 1, 1, 100)]
    assert standing_out(many, NAMES) == []
    assert standing_out(sums(1, 1, 1, 1e9), NAMES) == []
    nothing = [replace(each, clients=0) for each in sums(1, 1)] + sums(1, 1, 1, 1e9)
    assert standing_out(nothing, NAMES) == []


def test_rows_are_compared_too_and_groups_are_named_together() -> None:
    groups = [replace(LIKE, nodes=(place, place + 1), rows=40 if place else 4000) for place in range(0, 8)]
    (each,) = standing_out(groups, NAMES)
    assert (each.nodes, each.statistic) == (("n0", "n1"), "rows")
    assert "the number of rows in its sum per client is 1e+03, 100 times the median 10 of 8 groups" in each.text


def test_a_node_with_most_users_stands_out() -> None:
    assert large_share({"a": 50, "b": 25, "c": 25}) == []
    assert large_share({"a": 90, "b": 10}) == []  # of two nodes one always has half
    (each,) = large_share({"a": 51, "b": 25, "c": 24})
    assert (each.nodes, each.statistic, each.value, each.median, each.round) == (("a",), "share", 0.51, 0.25, -1)
    assert each.text.startswith("it hosts 51 of 100 users, more than half")


def test_an_overseer_writes_down_what_stood_out_what_was_decided_and_what_was_refused(tmp_path: Path) -> None:
    folder, told, news = RunFolder(tmp_path), list[str](), [(2, "more than 30 joins a minute")]
    names = {1: "a", 2: "b", **{number: f"n{number}" for number in range(3, 8)}}
    registered = KEYS | {name.encode(): name for name in names.values() if name not in "ab"}
    register = Register(keys(tmp_path / "keys", *names.values()))
    admission, watch = Admission(register, Limits(quarantine=9), registered, told.append), Watch(names, 9, 60.0, {})
    admission.know(names)
    progress, users = SimpleNamespace(done=0), torch.arange(100, 150)
    run: Any = SimpleNamespace(
        folder=folder, progress=progress, n_phases=2, setup=SimpleNamespace(run="r"), users=users
    )
    coordinator: Any = SimpleNamespace(seen=[], apart={}, present=frozenset(names))
    overseer = Overseer(run, coordinator, admission, watch, SimpleNamespace(news=lambda: [news.pop()] if news else []))  # type: ignore[arg-type]
    overseer.begin({node: torch.arange(40 if node == 1 else 2) for node in names})
    assert [Hosts(tmp_path).of(user) for user in (100, 139, 140)] == ["a", "a", None]
    number = register.exclude("b", "it was too large")
    run.progress.done, coordinator.apart = 4, admission.apart()
    norms = [1.0, 100.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    coordinator.seen = [replace(LIKE, nodes=(node,), norm=norms[node - 1], round=3) for node in names]
    overseer.look(told.append)
    assert coordinator.seen == []
    assert told == [
        "round 2: b stood out: the norm of its sum per client is 25, 100 times the median 0.25 of 7 nodes (robust z "
        "15.4)",
        f"round 2: node b is excluded (decision {number}): it was too large",
        "round 2: requests of node b were refused: more than 30 joins a minute",
    ]
    lines = read_lines(tmp_path / UNUSUAL)
    assert [(each["round"], each["nodes"], each["statistic"]) for each in lines] == [
        (-1, ["a"], "share"),
        (3, ["b"], "norm"),
        (3, ["b"], "state"),
    ]
    assert {place: count for place, count in watch.unusual.items() if count} == {("a", "share"): 1, ("b", "norm"): 1}
    assert {place: count for place, count in watch.rejections.items() if count} == {("b", "limit"): 1}
    (line,) = folder.rejections()
    assert (line["node"], line["round"], line["reason"]) == ("b", 3, "limit")
    register.undo(number)
    run.progress.done, coordinator.apart = 5, dict[int, Apart]()
    overseer.look(told.append)
    assert told[-1] == "round 3: node b takes part in sums from now on"
    overseer.look(told.append)
    assert len(told) == 4
    assert json.loads((tmp_path / UNUSUAL).read_text().splitlines()[-1])["text"] == "takes part in sums from now on"
    folder.forget_after(4)
    assert [each["round"] for each in read_lines(tmp_path / UNUSUAL)] == [-1, 3, 3]
