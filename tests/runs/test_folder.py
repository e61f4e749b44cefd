"""The run folder: what it reads of older versions, what a resumed run forgets, and its summary."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perfedrec import __version__
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.types import RoundReport
from perfedrec.runs.folder import Entry, RunFolder, environment
from perfedrec.runs.summary import Summary, communication

OLD = (
    '{"round": 3, "phase": "train", "cohort": 20, "clients": 0, "loss": null, "bytes_up": 0, "bytes_up_max": 0, '
    '"bytes_down": 700, "given_up": "1 of 20 clients are too few for a sum", "seconds": 0.25, "valid": null}\n'
)
"""A line that version 0.1 wrote, before "given_up" was called "aborted"."""

REPORT = RoundReport(3, "train", 20, 0, None, 0, 0, 700, aborted="1 of 20 clients are too few for a sum")


def test_a_line_of_an_older_version_is_read_and_written_again_with_the_names_of_today(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(OLD)
    folder = RunFolder(tmp_path)
    assert folder.history() == [Entry(REPORT, 0.25, None)]
    folder.append(Entry(REPORT, 1.5, {"recall@20": 0.5}))
    folder.forget_after(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["aborted"] for line in lines] == [REPORT.aborted] * 2
    assert not any("given_up" in line for line in lines)
    assert folder.history() == [Entry(REPORT, 0.25), Entry(REPORT, 1.5, {"recall@20": 0.5})]


def test_a_folder_is_claimed_once_and_given_back_as_it_was(tmp_path: Path) -> None:
    for path, before in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if before:
            path.mkdir()
        folder = RunFolder(path)
        folder.claim()
        folder.write("a", b"1")
        folder.save_checkpoint(1, {}, {}, {})
        with pytest.raises(ConfigError, match="is not empty; expected a new folder"):
            RunFolder(path).claim()
        folder.withdraw()
        assert path.exists() == before
        assert not before or not list(path.iterdir())


def test_the_newest_checkpoint_that_can_be_used_is_taken(tmp_path: Path) -> None:
    folder, mine = RunFolder(tmp_path), {"data": "mine"}
    assert folder.newest_checkpoint(mine) is None
    for number in (4, 5):
        folder.save_checkpoint(number, {"state": {"items": torch.full((2,), float(number))}}, mine, {"n": number})
    manifest = folder.checkpoints()[0] / "checkpoint.json"
    manifest.write_text(manifest.read_text()[:20])
    found = folder.newest_checkpoint(mine)
    assert found is not None
    assert (found.extra, found.records["state"][0]["items"].tolist()) == ({"n": 4}, [4.0, 4.0])
    with pytest.raises(CheckpointError, match="another data set than this run's"):
        folder.newest_checkpoint({"data": "other"})


def test_a_run_is_not_continued_to_fewer_rounds_than_it_has_played(tmp_path: Path) -> None:
    """Rounds after the checkpoint are played again and do not count, and phases before training never count."""
    folder = RunFolder(tmp_path)
    folder.check_rounds(0)
    for number, phase in enumerate(("degrees", "train", "train", "train", "train")):
        folder.append(Entry(replace(REPORT, round=number, phase=phase), 0.1))
        if number in (1, 3):
            folder.save_checkpoint(number + 1, {}, {}, {})
    folder.check_rounds(3)
    with pytest.raises(ConfigError, match=r": 3 rounds of training have been played; expected --rounds 3 or more$"):
        folder.check_rounds(2)
    folder.check_rounds(1, folder.checkpoints()[1])
    with pytest.raises(ConfigError, match=r": 1 round of training has been played"):
        folder.check_rounds(0, folder.checkpoints()[1])


def test_a_summary_keeps_its_form_in_the_file(tmp_path: Path) -> None:
    folder, sent = RunFolder(tmp_path), communication(100, 40, 8, 5)
    trained = Summary("mf", 2, 7, sent, {"claim": "NONE"}, {"users": 1}, {"users": 2}, None, {"test": "full ranking"})
    folder.write_summary(trained)
    keys = ["algorithm", "prelude", "best_round", "valid", "test", "test_sampled", "protocols", "popularity", "data"]
    stored = json.loads((tmp_path / "result.json").read_text())
    assert list(stored) == [*keys, "communication", "privacy"]
    assert (stored["prelude"], stored["test_sampled"]) == (2, None)
    assert folder.summary() == trained
    federated = Summary("mf", 2, 7, sent, {"claim": "NONE"}, users=5, nodes_with_model=["n0"])
    folder.write_summary(federated)
    keys = ["algorithm", "prelude", "best_round", "users", "nodes_with_model", "communication", "privacy"]
    assert list(json.loads((tmp_path / "result.json").read_text())) == keys
    assert folder.summary() == federated
    folder.write_summary(replace(federated, chosen={"personal.global": 1.0}))
    assert folder.summary().chosen == {"personal.global": 1.0}
    folder.write_summary(federated)
    older = folder.summary().stored() | {"communication": {"bytes_up": 100, "bytes_down": 40, "uploads": 8}}
    (tmp_path / "result.json").write_text(json.dumps(older))
    assert folder.summary() == federated
    assert (sent["uploads_per_client"], sent["bytes_up_per_upload"], sent["bytes_down_per_upload"]) == (1.6, 12.5, 5)
    for text, why in (
        ("{}", 'it is not a summary: it has no "prelude"'),
        ("[1]", "it is not a summary"),
        ("{", "it is not JSON"),
    ):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"not a finished run: result.json cannot be read .{why}"):
            folder.summary()
    (tmp_path / "result.json").unlink()
    with pytest.raises(CheckpointError, match="expected the folder that a run was written to"):
        folder.summary()
    with pytest.raises(CheckpointError, match="no checkpoint to resume from; expected another --output, or this fo"):
        folder.latest_checkpoint()
    folder.write_summary(federated)
    with pytest.raises(CheckpointError, match=r"the run is finished and has no checkpoint.*; expected a new run in an"):
        folder.latest_checkpoint()
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints" / "round-000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"finish it with perfedrec train --resume --output {tmp_path}"):
        folder.summary()


def test_the_version_is_that_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a package of this name which is installed besides."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"installed {name}")
    packages = environment()["packages"]
    assert (packages["perfedrec"], packages["torch"]) == (__version__, "installed torch")
