"""Experiment trackers: TensorBoard and MLflow, which receive what a run records.

The names of metrics are the same in both: ``train/loss``, ``valid/recall_at_20``, ``test/ndcg_at_20``,
``sent/bytes_up`` (in total so far). A step is a round, counted from 1; rounds before training are counted too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from perfedrec.core.dotted import flat
from perfedrec.core.errors import ConfigError
from perfedrec.core.extras import needed_by
from perfedrec.core.nearest import nearest
from perfedrec.runs.checkpoint import write_atomic
from perfedrec.runs.config import Config
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.result import Result

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from torch.utils.tensorboard import SummaryWriter

AT_ONCE = 500
"""Figures that are sent in one message."""


class _Tracker:
    """What both trackers have in common: the totals so far, and that a failure ends the tracking but not the run."""

    name: str

    def __init__(self, output: Path) -> None:
        self.output, self.bytes_up, self.bytes_down, self.rounds, self.failed = output, 0, 0, 0, False

    def start(self, config: Config, done: int) -> None:
        for entry in RunFolder(self.output).history()[:done]:
            self._count(entry)
        try:
            self.open(config, done)
        except Exception as error:
            raise ConfigError(f"{self.where}: {self.name} cannot be written to ({error})") from None

    def entry(self, entry: Entry) -> None:
        self._count(entry)
        figures = {
            "train/loss": entry.report.loss,
            "train/clients": entry.report.clients,
            "train/seconds": entry.seconds,
            "sent/bytes_up": self.bytes_up,
            "sent/bytes_down": self.bytes_down,
        }
        figures |= {_named("valid", name): value for name, value in (entry.valid or {}).items()}
        self._safely(lambda: self.log({name: float(value) for name, value in figures.items() if value is not None}))

    def stop(self, result: Result | None) -> None:
        figures, notes = {}, {}
        if result is not None:
            summary = RunFolder(self.output).summary()
            figures = {_named("test", name): value for name, value in summary.test.items()}
            notes = {"best_round": str(summary.best_round), "privacy": summary.privacy["claim"]}
        self._safely(lambda: self.close(figures, notes, result is not None))

    def _count(self, entry: Entry) -> None:
        self.rounds += 1
        self.bytes_up += entry.report.bytes_up
        self.bytes_down += entry.report.bytes_down

    def _safely(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:
            self.failed = True
            print(f"warning: {self.where}: {self.name} failed, the run continues without it ({error})", file=sys.stderr)

    @property
    def where(self) -> str:
        """The address or folder that it writes to."""
        raise NotImplementedError

    def hint(self) -> str:
        """The command that shows what was written."""
        raise NotImplementedError

    def open(self, config: Config, done: int) -> None:
        """Begin to record a run of which ``done`` rounds have been played and recorded before."""
        raise NotImplementedError

    def log(self, figures: dict[str, float]) -> None:
        """Record the figures of round :attr:`rounds`."""
        raise NotImplementedError

    def close(self, figures: dict[str, float], notes: dict[str, str], whole: bool) -> None:
        """Record the last figures and notes of a run that is ``whole``, or that was interrupted."""
        raise NotImplementedError


class TensorBoard(_Tracker):
    """Event files in the folder ``tensorboard`` of the run."""

    name = "TensorBoard"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        with needed_by("--track tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.kind: type[SummaryWriter] = SummaryWriter

    @property
    def where(self) -> str:
        return str(self.output / "tensorboard")

    def hint(self) -> str:
        return f"tensorboard --logdir {self.where}"

    def open(self, config: Config, done: int) -> None:
        # Removes what an earlier process wrote about rounds that are played again.
        self.writer: SummaryWriter = self.kind(self.where, purge_step=done + 1 if done else None)
        if not done:
            self.writer.add_text("config", f"```toml\n{config.to_toml()}```")

    def log(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, self.rounds)

    def close(self, figures: dict[str, float], notes: dict[str, str], whole: bool) -> None:
        self.log(figures)
        for name, text in notes.items():
            self.writer.add_text(name, text)
        self.writer.close()


class MLflow(_Tracker):
    """A run of MLflow at ``MLFLOW_TRACKING_URI``, by default in ``mlflow.db`` (SQLite) in the run's folder.

    The experiment is ``MLFLOW_EXPERIMENT_NAME``, by default "perfedrec". A resumed run continues its MLflow run.
    """

    name = "MLflow"

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
        )  # a server that does not answer must not stop training
        with needed_by("--track mlflow"), warnings.catch_warnings(action="ignore"):
            from mlflow import MlflowClient
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self.kind: type[MlflowClient] = MlflowClient
        self.waiting: list[Metric] = []
        if "MLFLOW_TRACKING_URI" in os.environ:  # a server that does not answer is reported before the run begins
            try:
                self.kind(tracking_uri=self.where).search_experiments(max_results=1)
            except Exception as error:
                raise ConfigError(f"{self.where}: MLflow does not answer ({error})") from None

    @property
    def where(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(self.output / 'mlflow.db').absolute()}"

    def hint(self) -> str:
        shown = f"mlflow ui --backend-store-uri {self.where}"
        if find_spec("flask") is not None:
            return shown
        return f"{shown} (needs the whole package: pip install mlflow; mlflow-skinny has no user interface)"

    def open(self, config: Config, done: int) -> None:
        from mlflow.entities import Param

        self.client: MlflowClient = self.kind(tracking_uri=self.where)
        file = self.output / "mlflow.json"
        if done and file.exists():
            self.run: str = json.loads(file.read_text(encoding="utf-8"))["run_id"]
            self.client.update_run(self.run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "perfedrec")
        known = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if known is None else known.experiment_id
        self.run = self.client.create_run(experiment, run_name=self.output.name).info.run_id
        write_atomic(file, json.dumps({"run_id": self.run, "tracking_uri": self.where}).encode())
        options = flat(config.model_dump(mode="json", by_alias=True))
        params = [Param(key, str(value)) for key, value in options.items()]
        for at in range(0, len(params), 100):  # more do not fit into one message
            self.client.log_batch(self.run, params=params[at : at + 100])

    def log(self, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(name, value, now, self.rounds) for name, value in figures.items()]
        if len(self.waiting) >= AT_ONCE:
            self._send()

    def close(self, figures: dict[str, float], notes: dict[str, str], whole: bool) -> None:
        self.log(figures)
        self._send()
        for name, text in notes.items():
            self.client.set_tag(self.run, name, text)
        self.client.set_terminated(self.run, "FINISHED" if whole else "KILLED")

    def _send(self) -> None:
        self.client.log_batch(self.run, metrics=self.waiting)
        self.waiting = []


TRACKERS: dict[str, type[_Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
"""Names of trackers as ``--track`` takes them."""


def trackers(names: Sequence[str], output: Path) -> list[_Tracker]:
    """The trackers of a run in the folder ``output``.

    Raises :class:`ConfigError` for an unknown name, and where the extra of a tracker is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"there is no tracker {name!r}; expected one of: {', '.join(TRACKERS)}{nearest(name, TRACKERS)}"
            )
    return [TRACKERS[name](output) for name in dict.fromkeys(names)]


def _named(part: str, metric: str) -> str:
    return f"{part}/{metric.replace('@', '_at_')}"
