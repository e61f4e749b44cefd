"""Runs: selection by validation, resuming bit for bit, damaged and foreign checkpoints, drop-outs."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors import SafetensorError
from tests.runs.small import DATA, SMALL

from perfedrec import configure, open_run, train
from perfedrec.core.errors import CheckpointError, ConfigError, DivergedError
from perfedrec.evaluation import Held
from perfedrec.runs import checkpoint, folder
from perfedrec.runs.config import open_data
from perfedrec.runs.folder import RunFolder

PRESETS = ("paper", "recommended")


def small(preset: str, *more: str) -> Any:
    return configure(preset, overrides=[*SMALL, *more])


def run(config: Any, **options: Any) -> Any:
    return train(config.build(), open_data(config.data), config.run, config=config, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_equals_a_run_without_an_interruption_bit_for_bit(preset: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(small(preset, "run.rounds=8"), output=whole)
    run(small(preset, "run.rounds=4"), output=broken)
    longer = small(preset, "run.rounds=8")
    run(longer, output=broken, resume=RunFolder(broken).latest_checkpoint())
    for name in ("state", "memory"):
        file = f"model/{name}.safetensors"
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    histories = [[(e.report, e.valid) for e in RunFolder(folder).history()] for folder in (whole, broken)]
    assert histories[0] == histories[1]
    assert json.loads((whole / "result.json").read_text()) == json.loads((broken / "result.json").read_text())


def test_a_stored_run_gives_its_test_metrics_again(tmp_path: Path) -> None:
    run(small("recommended", "run.rounds=4"), output=tmp_path)
    result, _ = open_run(tmp_path)
    assert result.evaluate("test") == json.loads((tmp_path / "result.json").read_text())["test"]


def test_the_best_round_is_selected_by_validation_and_the_test_split_is_not_read(monkeypatch: Any) -> None:
    config = small("recommended", "run.rounds=8")
    dataset = open_data(config.data)
    parts = []
    hits = Held.hits

    def watched(self: Held, *given: Any) -> torch.Tensor:
        parts.append(self.items)
        return hits(self, *given)

    monkeypatch.setattr(Held, "hits", watched)
    result = train(config.build(), dataset, config.run, config=config)
    valid = torch.tensor(dataset.valid.items)
    assert parts
    assert all(torch.equal(each, valid) for each in parts)
    recalls = {e.report.round + 1: e.valid["recall@20"] for e in result.history if e.valid is not None}
    phases = len(config.build().phases)
    assert recalls[result.best_round + phases] == max(recalls.values()) == result.valid["recall@20"]


def test_recommendations_leave_training_items_out_and_their_parts_add_up() -> None:
    config = small("recommended", "run.rounds=4")
    result = run(config)
    train_set = result.dataset.train
    frame = result.recommend(None, k=7)
    assert frame.height == 7 * train_set.n_users
    for user, item in frame.select("user", "item").iter_rows():
        at = train_set.user_index(user)
        own = train_set.items[train_set.offsets[at] : train_set.offsets[at + 1]]
        assert train_set.item_index(item) not in own
    explained = result.explain(train_set.user_ids[5], 7)
    assert explained["item"].to_list() == frame.filter(frame["user"] == train_set.user_ids[5])["item"].to_list()
    total = explained.select(pl.sum_horizontal("local", "cluster", "global", "pretrained", "neighbourhood")).to_series()
    assert (total - explained["score"]).abs().max() < 1e-4


def test_rounds_of_pretraining_are_evaluated_and_may_be_the_best() -> None:
    trained = ("server.learning_rate=9", "personal.global=0.0", "personal.neighbourhood=0", "personal.chosen=false")
    config = small("recommended", "run.rounds=3", "run.evaluate_every=2", *trained)
    result = run(config)
    phases = len(config.build().phases)
    assert [entry.valid is not None for entry in result.history] == [True] * phases + [False, True, True]
    recalls = [entry.valid["recall@20"] for entry in result.history if entry.valid is not None]
    assert max(recalls[:phases]) > max(recalls[phases:])  # a server step of 9 destroys the model
    assert result.best_round == recalls.index(max(recalls)) + 1 - phases <= 0
    assert result.evaluate("valid") == result.valid


def test_two_processes_do_not_train_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "TURN", 0.01)
    mine, config = RunFolder(tmp_path / "run"), small("paper", "run.rounds=2")
    run(config, output=mine.path)
    history = mine.history()
    with mine.locked("trains this run"), pytest.raises(ConfigError, match="another process trains this run; expected"):
        run(config, output=mine.path, resume=True)
    assert mine.history() == history
    run(config, output=mine.path, resume=True)


def test_patience_ends_a_run_after_its_best_round_and_changes_no_round_before(tmp_path: Path) -> None:
    options = (
        "server.learning_rate=9",
        "personal.global=0.0",
        "personal.chosen=false",
    )  # the last round of pre-training is the best one
    whole = run(small("recommended", "run.rounds=9", *options))
    short = small("recommended", "run.rounds=9", "run.patience=3", *options)
    early = run(short, output=tmp_path / "early")
    phases = len(short.build().phases)
    assert [entry.report for entry in early.history] == [entry.report for entry in whole.history[: phases + 4]]
    assert (early.best_round, early.valid) == (whole.best_round, whole.valid)
    run(small("recommended", "run.rounds=3", *options), output=tmp_path / "broken")  # ends between two evaluations
    last = RunFolder(tmp_path / "broken").latest_checkpoint()
    broken = run(short, output=tmp_path / "broken", resume=last)
    assert len(broken.history) == len(early.history)
    newest = RunFolder(tmp_path / "early").latest_checkpoint()
    assert len(run(short, resume=newest, output=tmp_path / "early").history) == len(early.history)
    patient = small("recommended", "run.rounds=9", "run.patience=9", *options)
    assert len(run(patient, resume=newest, output=tmp_path / "early").history) == phases + 9


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_can_be_used(damage: str, tmp_path: Path) -> None:
    run(small("paper", "run.rounds=4"), output=tmp_path)
    newest = RunFolder(tmp_path).latest_checkpoint()
    target = newest / ("checkpoint.json" if damage == "manifest" else "state.safetensors")
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(bytes(content) if damage == "flip" else bytes(content[:100]))
    with pytest.raises(CheckpointError, match="--previous"):
        RunFolder(tmp_path).latest_checkpoint()
    assert RunFolder(tmp_path).latest_checkpoint(skip_damaged=True).name < newest.name


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "kept", {"one": {"a": torch.ones(3)}}, {}, {})

    def full(*given: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as found:
        checkpoint.save(tmp_path / "kept", {"one": {"a": torch.zeros(3)}}, {}, {})
    assert found.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]
    assert checkpoint.load(tmp_path / "kept").records["one"][0]["a"].tolist() == [1.0, 1.0, 1.0]


def test_all_files_of_a_checkpoint_can_be_read_by_the_same_people(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "kept", {"one": {"a": torch.ones(3)}}, {}, {})
    finally:
        os.umask(before)
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "kept").iterdir()} == {0o640}


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    run(small("paper", "run.rounds=2"), output=tmp_path)
    newest = RunFolder(tmp_path).latest_checkpoint()
    for other in ("client.learning_rate=0.5", f"data.path={DATA},seed=5"):
        with pytest.raises(CheckpointError, match="foreign"):
            run(small("paper", "run.rounds=2", other), resume=newest)


def test_resuming_a_run_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        run(small("paper", "run.rounds=2", "client.learning_rate=1e30"), output=tmp_path / "run")
    with pytest.raises(
        CheckpointError, match="no checkpoint to resume from; expected another --output, or this folder"
    ):
        RunFolder(tmp_path / "run").latest_checkpoint()


def test_a_run_that_fails_in_its_first_round_can_be_started_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that the run made is removed, and one that was there before is empty again."""
    (tmp_path / "old").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr("perfedrec.runtimes.simulator.Simulator.play", lambda self: 1 / 0)
        for folder in (tmp_path / "new", tmp_path / "old"):
            with pytest.raises(ZeroDivisionError):
                run(small("paper", "run.rounds=1"), output=folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    run(small("paper", "run.rounds=1"), output=tmp_path / "old")
    assert (tmp_path / "old" / "result.json").exists()


def test_a_line_that_was_cut_off_is_left_out_and_one_that_is_not_a_round_is_refused(tmp_path: Path) -> None:
    run(small("paper", "run.rounds=2"), output=tmp_path)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0][:40]]))
    assert len(RunFolder(tmp_path).history()) == len(lines)
    file.write_text("\n".join([lines[0], '{"round": 1}', *lines[1:]]))
    with pytest.raises(CheckpointError, match="line 2: not a round that this version can read"):
        RunFolder(tmp_path).history()


def test_rounds_where_all_clients_drop_out_change_no_table() -> None:
    some = run(small("paper", "run.rounds=0", "run.dropout_rate=1.0"))
    more = run(small("paper", "run.rounds=4", "run.dropout_rate=1.0"))
    assert torch.equal(some.recommender.state.items, more.recommender.state.items)
    assert all(entry.report.clients == 0 for entry in more.history)


SIGNALLED = """
import os, pathlib
from perfedrec import PerFedRecPP

class Signalled(PerFedRecPP):
    def plan(self, state, key):
        flag = pathlib.Path(__file__).with_suffix(".flag")
        if state.round == 70 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return super().plan(state, key)
"""


def signalled(folder: Path, *options: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """``perfedrec train`` with a method that sends its own process a signal in round 70, once in a ``folder``."""
    (folder / "signalled.py").write_text(SIGNALLED)
    command = [sys.executable, "-m", "perfedrec", "train", "--quiet", *options]
    if "--resume" not in options:
        more = (*SMALL, "run.rounds=120", "run.checkpoint_every=20", "run.evaluate_every=50")
        command += ["--preset", "paper", "--algorithm", f"{folder / 'signalled.py'}:Signalled"]
        command += [part for each in more for part in ("--set", each)]
    environment = os.environ | {"SIGNAL": str(int(number))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert signalled(tmp_path, "--output", str(killed), number=signal.SIGKILL).returncode == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    for options in (("--output", str(whole)), ("--output", str(killed), "--resume")):
        done = signalled(tmp_path, *options, number=signal.SIGKILL)
        assert done.returncode == 0, done.stderr
    for name in ("model/state.safetensors", "model/memory.safetensors", "result.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    histories = [[(e.report, e.valid) for e in RunFolder(folder).history()] for folder in (whole, killed)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_that_resumes(number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = signalled(tmp_path, "--output", str(run), number=number)
    assert stopped.returncode == 128 + number
    assert stopped.stderr.count("\n") == 1
    assert stopped.stderr.strip().endswith(f"train --resume --output {run}")
    assert "; a checkpoint is in " in stopped.stderr
    assert RunFolder(run).latest_checkpoint().name == "round-000071"
    again = signalled(tmp_path, "--output", str(run), "--resume", "--rounds", "71", number=number)
    assert again.returncode == 0, again.stderr


def test_metrics_are_computed_at_the_lengths_of_lists_that_are_asked_for(tmp_path: Path) -> None:
    """The length that selects the best round is added. A list of 5 is the beginning of one of 30."""
    options = ("run.ks=30,5", "run.select_by=ndcg@3", "run.rounds=4", "run.sampled_negatives=1000")
    result = run(small("recommended", *options), output=tmp_path)
    stored = json.loads((tmp_path / "result.json").read_text())
    for part in ("test", "valid", "popularity", "test_sampled"):
        assert {name.partition("@")[2] for name in stored[part] if "@" in name} == {"3", "5", "30"}, part
    low, _, high = stored["protocols"]["test_sampled"].removesuffix(" sampled negatives").split()
    assert int(low) < int(high) < 200  # all items but those of the user
    recalls = [entry.valid["ndcg@3"] for entry in RunFolder(tmp_path).history() if entry.valid]
    assert stored["valid"]["ndcg@3"] == max(recalls)
    columns = pl.read_parquet(tmp_path / "test_users.parquet").columns
    assert {"recall@3", "recall@5", "recall@30"} < set(columns)
    assert "recall@20" not in columns
    opened, _ = open_run(tmp_path)
    assert opened.evaluate() == stored["test"]
    for ks in (5, [5], (5,)):
        found = opened.evaluate(ks=ks)
        assert found == {name: stored["test"][name] for name in found}
        assert set(found) == {name for name in stored["test"] if name.endswith("@5")} | {"users"}
    assert set(result.evaluate("valid", ks=[7, 2])) >= {"recall@2", "coverage@7"}
