"""How far a run is, in words: rounds of training are counted apart from the phases before them."""

from __future__ import annotations

import io
from dataclasses import asdict

import pytest
from rich.console import Console

from perfedrec.core.types import RoundReport
from perfedrec.runs.progress import Bar, Lines, Progress, describe, round_name


def played(progress: Progress, phases: tuple[str, ...]) -> Progress:
    for phase in phases:
        loss = 0.5 if phase == "train" else None
        progress.count(RoundReport(progress.done, phase, 4, 4, loss, 1000, 400, 6000), 0.5)
    return progress


def test_phases_and_rounds_of_training_are_counted_apart() -> None:
    progress = Progress(302, "recall@20", n_phases=2, users=10)
    assert progress.place == "phase 0/2"
    assert played(progress, ("degrees",)).place == "phase 1/2 degrees"
    assert played(progress, ("spectral",)).place == "phase 2/2 spectral"
    assert played(progress, ("train",) * 60).place == "round 60/300"
    assert Progress(3, "", done=2).place == "round 2/3"  # a method without phases
    assert [round_name(number, 2) for number in (-1, 0, 1, 2, 61)] == [
        "before the first round",
        "phase 1",
        "phase 2",
        "round 1",
        "round 60",
    ]


def test_a_line_names_the_validation_metric_and_gives_bytes_for_one_client() -> None:
    progress = played(Progress(4, "recall@20", n_phases=1, users=10), ("degrees", "train"))
    progress.value = 0.25
    assert describe(progress) == (
        "round 1/3  loss 0.5000  validation recall@20 0.2500  2.0 rounds/s  a client: 200 B up, 1.2 kB down  eta 1 s"
    )
    assert describe(progress, bar=True) == "loss 0.5000  validation recall@20 0.2500\na client: 200 B up, 1.2 kB down"
    assert "client" not in describe(Progress(4, ""))  # nothing was sent
    stream = io.StringIO()
    Lines(stream, every=0.0).round(progress)
    assert stream.getvalue() == describe(progress) + "\n"


@pytest.mark.parametrize(
    ("best_round", "n_phases", "where"),
    [(3, 2, "round 3"), (0, 2, "phase 2"), (-1, 2, "phase 1"), (1, 0, "round 1"), (0, 0, "before the first round")],
)
def test_the_best_value_so_far_is_shown_where_it_is_an_earlier_one(best_round: int, n_phases: int, where: str) -> None:
    progress = Progress(20, "recall@20", done=9, n_phases=n_phases, value=0.25, best=0.3, best_round=best_round)
    assert describe(progress).endswith(f"validation recall@20 0.2500 (best 0.3000, {where})")
    progress.value = 0.3
    assert describe(progress).endswith("validation recall@20 0.3000")


def test_phases_before_training_say_nothing_of_the_time_that_is_left() -> None:
    progress = Progress(12, "recall@20", n_phases=2, users=10)
    for phase, seconds in (("join", 90.0), ("clusters", 30.0)):
        progress.count(RoundReport(progress.done, phase, 4, 4, None, 1000, 400, 6000), seconds)
        assert "eta" not in describe(progress)
        assert "rounds/s" not in describe(progress)
    assert describe(played(progress, ("train",) * 2)).endswith("eta 4 s")  # eight rounds of half a second
    again = Progress(12, "recall@20", n_phases=2).resumed({**asdict(progress), "done": 6})
    assert describe(played(again, ("train",))).endswith("eta 2 s")


def test_a_bar_fits_on_80_columns() -> None:
    stream = io.StringIO()
    bar = Bar(Console(file=stream, width=80, force_terminal=True))
    progress = played(Progress(300, "recall@20", n_phases=2, users=10), ("degrees", "spectral", "train"))
    progress.value, progress.bytes_up, progress.bytes_down = 0.25, 987_654_000, 9_876_543_000
    progress.error, progress.best, progress.best_round = 0.0013, 0.3, 0
    bar.start(progress)
    bar.round(progress)
    bar.stop(progress)
    assert "round 1/298" in stream.getvalue()
    assert "a client: 98.8 MB up, 987.7 MB down" in stream.getvalue()
    assert "validation recall@20 0.2500 ± 0.0013 (best 0.3000, phase 2)" in stream.getvalue()


@pytest.mark.parametrize("known", [True, False])
def test_a_run_continues_with_the_plan_of_now(known: bool) -> None:
    """Checkpoints of earlier versions have neither the number of phases nor that of users."""
    before = played(Progress(4, "recall@20", n_phases=1, users=7), ("degrees", "train"))
    stored = {name: value for name, value in asdict(before).items() if known or name not in ("n_phases", "users")}
    found = Progress(9, "recall@20", n_phases=1, users=10).resumed(stored)
    assert (found.place, found.users, found.bytes_up, found.seconds, found.started_at) == ("round 1/8", 10, 2000, 0, 2)
