"""Trackers, compared with what the real packages read back from local storage."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from perfedrec import configure, train
from perfedrec.cli import app
from perfedrec.runs.config import open_data
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.trackers import TRACKERS, MLflow, TensorBoard, trackers

runner = CliRunner()
SMALL = (
    "data.path=synthetic:users=120,items=200",
    "selection.n_clients_per_round=40",
    "model.embedding_dim=8",
    "run.evaluate_every=2",
    "run.checkpoint_every=3",
)


def run(output: Path, rounds: int, told: Any, resume: Path | None = None) -> Any:
    config = configure("recommended", overrides=[*SMALL, f"run.rounds={rounds}"])
    dataset = open_data(config.data)
    return train(
        config.build(), dataset, config.run, config=config, output=output, callbacks=told, resume=resume or False
    )


def test_both_record_each_round_once_also_in_a_run_that_is_resumed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "run"
    run(output, 3, trackers(["mlflow", "tensorboard", "mlflow"], output))
    first = json.loads((output / "mlflow.json").read_text())["run_id"]
    result = run(output, 6, trackers(list(TRACKERS), output), resume=RunFolder(output).latest_checkpoint())
    summary, history = RunFolder(output).summary(), result.history
    steps = range(1, len(history) + 1)
    numbered = list(zip(steps, history, strict=True))
    expected = {
        "train/loss": [
            (step, e.report.loss) for step, e in zip(steps, history, strict=True) if e.report.loss is not None
        ],
        "valid/recall_at_20": [(step, e.valid["recall@20"]) for step, e in numbered if e.valid],
        "sent/bytes_up": [(step, sum(e.report.bytes_up for e in history[:step])) for step in steps],
    }
    assert expected["sent/bytes_up"][-1][1] == summary.communication["bytes_up"] > 0
    assert len(expected["valid/recall_at_20"]) < len(history)

    events = EventAccumulator(str(output / "tensorboard")).Reload()
    for name, values in expected.items():
        found = [(each.step, each.value) for each in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in values]
    assert events.Scalars("test/ndcg_at_20")[-1].value == pytest.approx(summary.test["ndcg@20"])
    assert "n_clients_per_round = 40" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    assert json.loads((output / "mlflow.json").read_text())["run_id"] == first
    stored = client.get_run(first)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["selection.n_clients_per_round"] == "40"
    assert stored.data.metrics["test/ndcg_at_20"] == summary.test["ndcg@20"]
    assert stored.data.tags["privacy"] == summary.privacy["claim"]
    for name, values in expected.items():
        assert (
            dict(values).items() <= {each.step: each.value for each in client.get_metric_history(first, name)}.items()
        )


class Failing(TensorBoard):
    def log(self, figures: dict[str, float]) -> None:
        raise OSError("disk full")


def test_a_tracker_that_fails_ends_itself_and_not_the_run(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "run"
    assert len(run(output, 2, [Failing(output)]).history) > 2
    said = capsys.readouterr().err
    assert said.count("disk full") == said.count("\n") == 1
    assert (output / "result.json").exists()


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [
        ("tensorboard", "tensorboard", "needs the extra tensorboard"),
        ("mlflow", "mlflow", "needs the extra mlflow"),
        ("mlflov", "", "did you mean mlflow"),
        ("mlflow", "", "does not answer"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_reported_in_one_line_and_nothing_is_written(
    name: str, module: str, said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    if module:
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    output = tmp_path / "run"
    refused = runner.invoke(app, ["train", "--track", name, "--output", str(output), "--data", SMALL[0][10:]])
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not output.exists()


def test_the_hint_of_mlflow_says_where_its_user_interface_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MLflow(tmp_path)
    monkeypatch.setattr("perfedrec.runs.trackers.find_spec", lambda name: None)
    assert tracker.hint().endswith("(needs the whole package: pip install mlflow; mlflow-skinny has no user interface)")
    monkeypatch.setattr("perfedrec.runs.trackers.find_spec", lambda name: name)
    assert tracker.hint() == f"mlflow ui --backend-store-uri {tracker.where}"
