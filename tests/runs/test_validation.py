"""Runs that are validated by a sample of their users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfedrec import load, train
from perfedrec.core.keys import words_of
from perfedrec.evaluation.sample import in_sample, sample_of
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import JsonLines, Progress, describe

DATA = "synthetic:users=120,items=60,clusters=2,interactions_per_user=8,seed=3"


@pytest.mark.parametrize("method", ["mf", "perfedrec_pp"])
def test_a_sample_validates_and_all_users_are_tested(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"rounds": 2, "evaluate_every": 1, "device": "cpu", "model__embedding_dim": 8}
    if method == "mf":
        options = {"rounds": 2, "evaluate_every": 1, "device": "cpu"}
    data, folder = load(DATA), tmp_path / "run"
    result = train(method, data, **options, evaluate_users=40, output=folder, progress=JsonLines())
    chosen = in_sample(words_of(map(str, data.train.user_ids.tolist())), 40 / 120)
    frame = result.per_user("valid")
    own = frame.filter(frame["user"].is_in(data.train.user_ids[chosen.numpy()].tolist()))["recall@20"]
    assert result.valid["users"] == own.len() < 60
    assert result.valid["recall@20"] == pytest.approx(own.mean())
    error = (own.var() / own.len() * (1 - 40 / 120)) ** 0.5
    assert error > 0
    assert result.valid["standard_error"] == pytest.approx(error)
    summary = RunFolder(folder).summary()
    assert summary.valid == result.valid
    assert summary.test["users"] == result.evaluate("test")["users"] > 2 * own.len()
    assert summary.of_sample() == f" (of a sample of {own.len()} users, standard error {error:.4f})"
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["error"] == result.history[-1].valid["standard_error"]  # type: ignore[index]


def test_few_users_all_validate_and_there_is_no_standard_error() -> None:
    result = train("mf", load(DATA), rounds=1, evaluate_every=1, device="cpu")
    assert "standard_error" not in result.valid
    assert result.valid == result.evaluate("valid")


def test_the_progress_line_has_the_standard_error() -> None:
    progress = Progress(9, "recall@20", done=3, value=0.0712, error=0.0013)
    assert describe(progress) == "round 3/9  validation recall@20 0.0712 ± 0.0013"
    progress.error = None
    assert describe(progress) == "round 3/9  validation recall@20 0.0712"


def test_many_users_are_tested_by_a_sample_that_holds_those_who_validate(tmp_path: Path) -> None:
    data, folder = load(DATA), tmp_path / "run"
    result = train("mf", data, rounds=1, device="cpu", evaluate_users=20, test_users=60, output=folder)
    tested = result.per_user("test")["user"].to_list()
    validated = sample_of(data.train.user_ids, 20 / 120)
    assert set(data.train.user_ids[validated.numpy()].tolist()) & set(data.test.frame()["user"]) <= set(tested)
    everyone = train("mf", data, rounds=1, device="cpu", evaluate_users=20, test_users=0).per_user("test")
    own = everyone.filter(everyone["user"].is_in(tested))["recall@20"]
    assert own.len() == len(tested) < 0.7 * everyone.height
    summary = RunFolder(folder).summary()
    assert summary.test["recall@20"] == pytest.approx(own.mean())
    assert summary.test == result.evaluate("test")
    error = (own.var() / own.len() * (1 - 60 / 120)) ** 0.5
    assert summary.test["standard_error"] == pytest.approx(error)
    assert summary.of_sample(summary.test) == f" (of a sample of {own.len()} users, standard error {error:.4f})"
    assert summary.popularity["users"] == own.len()
