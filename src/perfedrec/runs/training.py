"""A run: rounds with validation, the best round kept, checkpoints, a run folder; and its result."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import polars as pl
import torch

from perfedrec.core.errors import CheckpointError, ConfigError, PerfedrecError, reason
from perfedrec.core.types import RoundReport
from perfedrec.data import Dataset, load, parse_columns
from perfedrec.data.interactions import Interactions, id_series
from perfedrec.evaluation import Held, Recommender, Totals
from perfedrec.evaluation.lists import check_length, explained
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.centralised.popularity import Popularity
from perfedrec.privacy.report import centralised_block, privacy_block, warnings
from perfedrec.runs import checkpoint
from perfedrec.runs.config import Config, DataSettings, RunSettings, check, config_of
from perfedrec.runs.diagnostics import Diagnostics
from perfedrec.runs.engine import Central, Engine, engine
from perfedrec.runs.progress import Quiet, Reporter, Standing, Tracker

CUTOFFS = (10, 20)

FULL, SAMPLED = "full ranking", "{} sampled negatives"
"""Names of the protocols, which stand wherever their figures do: those of one cannot be compared with the other's."""


class InterruptedRunError(PerfedrecError):
    """A run was stopped by a signal after a whole round; ``exit_code`` is the shell's for that signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Entry:
    """One line of a run's history: the round's report, its time and, where it was evaluated, validation metrics."""

    report: RoundReport
    seconds: float
    valid: dict[str, float] | None = None

    def line(self) -> dict[str, Any]:
        return {**asdict(self.report), "seconds": self.seconds, "valid": self.valid}


@dataclass
class Result:
    """The recommender of the best validation round, with the history that led to it.

    ``best_round`` counts rounds of training: 0 and below are rounds of pre-training.
    """

    recommender: Recommender
    dataset: Dataset
    best_round: int
    valid: dict[str, float]
    history: list[Entry] = field(default_factory=list)
    output: Path | None = None

    def evaluate(self, part: str = "test", ks: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
        """Full-ranking metrics on ``test`` (validation items are left out of the lists) or ``valid``."""
        wanted, hide = self._held(part)
        return self.recommender.evaluate(wanted, ks, hide)

    def rank(self, part: str = "test", ks: tuple[int, ...] = CUTOFFS) -> Totals:
        """What :meth:`evaluate` takes the means of, user by user."""
        wanted, hide = self._held(part)
        return self.recommender.rank(wanted, ks, hide)

    def evaluate_sampled(self, part: str = "test", n_negatives: int = 99, seed: int = 0) -> dict[str, float]:
        """Metrics of each held-out item among so many sampled negatives, for comparison with papers that do so."""
        wanted, hide = self._held(part)
        return self.recommender.rank_sampled(wanted, CUTOFFS, hide, n_negatives, seed).means()

    def _held(self, part: str) -> tuple[Held, Held | None]:
        """What to find, and what to leave out of the lists besides the training items."""
        if part not in ("valid", "test"):
            raise ConfigError(f"there is no part {part!r} to evaluate on; expected valid or test")
        wanted, valid = (
            _held(each, self.recommender.device) for each in (getattr(self.dataset, part), self.dataset.valid)
        )
        return wanted, valid if part == "test" else None

    def recommend(self, user_ids: Sequence[int | str] | None = None, k: int = 20) -> pl.DataFrame:
        """The ``k`` best unseen items of each user (all users when ``None``): columns user, item, rank, score.

        Ids are the data set's own. Raises :class:`perfedrec.core.errors.DataError` for an unknown user.
        """
        check_length(k)
        train = self.dataset.train
        users = torch.arange(train.n_users, device=self.recommender.device)
        if user_ids is not None:
            users = torch.tensor([train.user_index(each) for each in user_ids], dtype=torch.int64, device=users.device)
        items, scores = self.recommender.recommend(users, k)
        shown = scores > -torch.inf  # a user who has seen nearly everything gets a shorter list
        rows, places = shown.nonzero(as_tuple=True)
        user_index, item_index = users[rows].cpu().numpy(), items[rows, places].cpu().numpy()
        return pl.DataFrame(
            {
                "user": id_series(train.user_ids)[user_index],
                "item": id_series(train.item_ids)[item_index],
                "rank": (places + 1).cpu().numpy(),
                "score": scores[rows, places].cpu().numpy(),
            }
        )

    def explain(self, user_id: int | str, k: int = 20) -> pl.DataFrame:
        """:meth:`recommend` for one user, with what each model has in a score, ``local``, ``cluster``, ``global`` and,
        where it is mixed in, ``pretrained``; and the places ``moved`` that the personal model gave an item over the
        global model alone (positive: upwards)."""
        users = torch.tensor([self.dataset.train.user_index(user_id)], device=self.recommender.device)
        parts = {name: values[0] for name, values in self.recommender.explain(users).items()}
        frame = explained(self.recommender.scores(users)[0], parts, self.dataset.train.item_ids, k)
        ids = id_series(self.dataset.train.user_ids)[users.tolist()]
        return frame.select(pl.repeat(ids[0], frame.height, dtype=ids.dtype).alias("user"), pl.all())


def train(
    algorithm: Any,
    dataset: Dataset,
    run: RunSettings | None = None,
    *,
    reporter: Reporter | None = None,
    trackers: Sequence[Tracker] = (),
    output: Path | None = None,
    config: Config | None = None,
    resume: Path | None = None,
) -> Result:
    """Train a method on a data set and return the recommender of the best validation round.

    With ``output`` the run is written there (see ``docs/runs.md``) and can be resumed from its checkpoints: ``resume``
    names one. SIGINT and SIGTERM end the run after the current round, with a checkpoint and an
    :class:`InterruptedRunError`. Without ``output`` the test split is not ranked.
    """
    run, reporter = run or RunSettings(), reporter or Quiet()
    config = config or config_of(algorithm, run)
    if run.threads:
        torch.set_num_threads(run.threads)
    progress = _Progress(algorithm, dataset, run, config, output)
    if resume is not None:
        progress.restore(resume)
    elif output is not None:
        progress.claim()
    reporter.start(progress.standing)
    result, started = None, list[Tracker]()
    try:
        if resume is None and output is not None:
            progress.begin()
        for tracker in trackers:
            tracker.start(config, progress.standing.done)
            started.append(tracker)
        with signals() as caught:
            while progress.standing.done < progress.standing.total:
                progress.step()
                try:
                    reporter.round(progress.standing)
                except BrokenPipeError:  # nobody reads on
                    progress.checkpoint()
                    raise
                for tracker in trackers:
                    tracker.entry(progress.history[-1])
                if caught:
                    where = progress.checkpoint()
                    hint = f"; a checkpoint is in {where}, go on with --resume" if where else ""
                    name = signal.Signals(caught[0]).name
                    raise InterruptedRunError(
                        f"stopped by {name} after round {progress.standing.done}{hint}", caught[0]
                    )
        result = progress.finish()
        return result
    finally:
        reporter.stop(progress.standing)
        for tracker in started:
            tracker.stop(result)
        if output is not None and resume is None and result is None and not progress.history:
            progress.withdraw()


def open_run(folder: Path, data: str | None = None, device: str | None = None) -> tuple[Result, Config]:
    """The result that a finished run stored. ``data`` names the data set where it has moved since."""
    config = read_config(folder)
    if data is not None:
        moved = {"path": data, "train": None, "valid": None, "test": None}
        config = config.model_copy(update={"data": config.data.model_copy(update=moved)})
    dataset = open_data(config.data)
    model = folder / "model"
    if not model.exists():
        raise CheckpointError(
            f"{folder}: the run has no model yet; finish it with perfedrec train --resume --output {folder}"
        )
    loaded = checkpoint.load(model, {"data": dataset.fingerprint})
    blank = _engine(config.build(), dataset, config.run.model_copy(update={"device": device or config.run.device}))
    recommender = blank.recommender().restored(loaded.records)
    return Result(recommender, dataset, loaded.extra["best_round"], loaded.extra["valid"], output=folder), config


def open_data(settings: DataSettings) -> Dataset:
    """The data set that a configuration names."""
    return load(
        None if settings.train else settings.path,
        format=settings.format,
        columns=parse_columns(settings.columns),
        train=settings.train,
        valid=settings.valid,
        test=settings.test,
        min_rating=settings.min_rating,
        k_core=settings.k_core,
        split_how=settings.split,
        order=settings.order,
        seed=settings.seed,
    )


def read_config(folder: Path) -> Config:
    """The resolved configuration of a run folder."""
    path = folder / "config.toml"
    try:
        return check(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(
            f"{folder}: not a run folder: {path.name} cannot be read ({reason(error)}); "
            "expected the folder that a run was written to"
        ) from None


class _Progress:
    """The mutable middle of :func:`train`: engine, best round so far, history and run folder."""

    def __init__(
        self,
        algorithm: Any,
        dataset: Dataset,
        run: RunSettings,
        config: Config,
        output: Path | None,
    ) -> None:
        self.algorithm, self.dataset, self.engine = algorithm, dataset, _engine(algorithm, dataset, run)
        self.run, self.config, self.output = run, config, output
        self.n_phases, self.valid = self.engine.n_phases, _held(dataset.valid, self.engine.recommender().device)
        self.standing = Standing(run.rounds + self.n_phases, run.select_by)
        self.best: Recommender | None = None
        self.best_valid: dict[str, float] = {}
        self.history: list[Entry] = []
        free = {"rounds", "patience", "users_per_node", "threads", "block_size", "device", "checkpoint_every"}
        settings = config.model_dump(mode="json", exclude={"data": True, "run": free})
        if not isinstance(algorithm, Method):  # as solved: a budget cannot be shared out anew when a run goes on
            settings["noise"] = algorithm.settings.privacy.noise.model_dump()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.belongs = {"data": dataset.fingerprint, "configuration": digest}
        self.diagnostics = None if output is None else Diagnostics(output, dataset, run.seed)

    def claim(self) -> None:
        """Make the run folder, which has to be new or empty."""
        assert self.output is not None
        if self.output.exists() and any(self.output.iterdir()):
            raise ConfigError(
                f"{self.output} is not empty; expected a new folder (or --resume to go on with the run in it)"
            )
        self.made = not self.output.exists()
        self.output.mkdir(parents=True, exist_ok=True)

    def withdraw(self) -> None:
        """Take the run folder back, which was new or empty, so that the run can be started there again."""
        assert self.output is not None
        for each in self.output.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        if self.made:
            self.output.rmdir()

    def begin(self) -> None:
        """Write what a run folder begins with."""
        self._write_settings()
        self._diagnose("start")

    def _write_settings(self) -> None:
        assert self.output is not None
        write_settings(self.output, self.config)

    def _diagnose(self, moment: str) -> None:
        fitted = isinstance(self.algorithm, Method) and not self.algorithm.trained  # at once: nothing comes before
        if self.diagnostics is not None and not fitted:
            self.diagnostics.note(moment, self.standing.done - self.n_phases, self.engine.recommender())

    def step(self) -> None:
        """One round, and what is due after it."""
        start = time.perf_counter()
        report = self.engine.play()
        seconds = time.perf_counter() - start
        self.standing.count(report, seconds)
        valid = None
        trained = self.standing.done - self.n_phases
        last = self.standing.done == self.standing.total
        if (
            trained <= 0 or trained % self.run.evaluate_every == 0 or last
        ):  # pre-training is few rounds, and may suffice
            start = time.perf_counter()
            valid = self.engine.recommender().evaluate(self.valid, CUTOFFS)
            self._compare(valid)
            last = self._settled()
            self.standing.seconds += time.perf_counter() - start
        if trained == 0:
            self._diagnose("pretrained")
        entry = Entry(report, seconds, valid)
        self.history.append(entry)
        if self.output is not None:
            with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry.line()) + "\n")
        if trained > 0 and (trained % self.run.checkpoint_every == 0 or last):
            self.checkpoint()

    def _compare(self, valid: dict[str, float]) -> None:
        value = valid.get(self.run.select_by)
        self.standing.value = value
        if value is None and self.standing.done < self.standing.total:
            return  # no validation data: the last round is taken
        if value is None or self.standing.best is None or value > self.standing.best:
            self.standing.best, self.standing.best_round = value, self.standing.done - self.n_phases
            self.best, self.best_valid = self.engine.recommender().frozen(), valid

    def _settled(self) -> bool:
        """Whether no round is left to play: also where none was better than the best for too long."""
        best, patience, trained = self.standing.best_round, self.run.patience, self.standing.done - self.n_phases
        evaluated = trained % self.run.evaluate_every == 0
        if patience and evaluated and best is not None and trained - max(best, 0) >= patience:
            self.standing.total = self.standing.done
        return self.standing.done == self.standing.total

    def checkpoint(self) -> Path | None:
        """Write a checkpoint, where there is a run folder."""
        if self.output is None:
            return None
        root = self.output / "checkpoints"
        records = self.engine.records()
        if self.best is not None:
            records |= {f"best-{name}": record for name, record in self.best.records().items()}
        folder = checkpoint.folder_of(root, self.standing.done)
        extra = {"standing": asdict(self.standing), "best_valid": self.best_valid}
        checkpoint.save(folder, records, self.belongs, extra)
        checkpoint.prune(root)
        return folder

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint: afterwards the run is the one that was not interrupted."""
        loaded = checkpoint.load(folder, self.belongs)
        total = self.standing.total
        self.standing = Standing(**loaded.extra["standing"])
        self.standing.total, self.standing.seconds, self.standing.started_at = total, 0.0, self.standing.done
        self._settled()
        self.best_valid = loaded.extra["best_valid"]
        self.engine.restore(loaded.records, self.standing.done)
        best = {name[5:]: record for name, record in loaded.records.items() if name.startswith("best-")}
        if best:
            self.best = self.engine.recommender().restored(best)
        if self.output is not None and self.diagnostics is not None:
            self._write_settings()
            self.diagnostics.resume()
            self.history = read_history(self.output)[: self.standing.done]
            lines = "".join(json.dumps(entry.line()) + "\n" for entry in self.history)
            checkpoint.write_atomic(self.output / "metrics.jsonl", lines.encode())

    def finish(self) -> Result:
        """The result, tested once on the test split where there is a run folder to write it to."""
        if self.best is None:
            self.best, self.best_valid = self.engine.recommender().frozen(), {}
        best_round = self.standing.best_round if self.standing.best_round is not None else self.run.rounds
        result = Result(self.best, self.dataset, best_round, self.best_valid, self.history, self.output)
        if self.output is not None and self.diagnostics is not None:
            extra = {"best_round": best_round, "valid": self.best_valid}
            checkpoint.save(self.output / "model", self.best.records(), self.belongs, extra)
            ranked, popular = result.rank("test"), popularity(self.dataset)
            test = ranked.means()
            if ranked.users:
                self._write_users(ranked)
            self.diagnostics.note("best", best_round, self.best)
            self.diagnostics.draw_map(self.best)
            sampled = self.run.sampled_negatives
            summary = {
                "algorithm": self.config.algorithm,
                "prelude": self.n_phases,
                "best_round": best_round,
                "valid": self.best_valid,
                "test": test,
                "test_sampled": result.evaluate_sampled("test", sampled, self.run.seed) if sampled else None,
                "protocols": {"test": FULL, **({"test_sampled": SAMPLED.format(sampled)} if sampled else {})},
                "popularity": popular,
                "communication": self.communication(),
                "privacy": self.privacy(test, popular),
            }
            checkpoint.write_atomic(self.output / "result.json", json.dumps(summary, indent=1).encode())
        return result

    def _write_users(self, ranked: Totals) -> None:
        """The test metrics of each user, to compare methods by."""
        assert self.output is not None
        users, values = ranked.by_user()
        train, index = self.dataset.train, users.cpu().numpy()
        columns = {"user": id_series(train.user_ids)[index], "interactions": np.diff(train.offsets)[index]}
        frame = pl.DataFrame(columns | {name: value.cpu().numpy() for name, value in values.items()})
        content = io.BytesIO()
        frame.write_parquet(content)
        checkpoint.write_atomic(self.output / "test_users.parquet", content.getvalue())

    def privacy(self, test: dict[str, float], popular: dict[str, float]) -> dict[str, Any]:
        """The privacy block of all rounds that were played."""
        if isinstance(self.algorithm, Method):
            return centralised_block()
        settings, users = self.algorithm.settings.privacy, self.dataset.n_users
        releases = self.algorithm.releases(max(self.standing.done - self.n_phases, 0), users)
        block = privacy_block(settings, releases, "simulated", self.algorithm.reports_vectors)
        return block | {"warnings": warnings(settings, users, self.dataset.n_items, test, popular)}

    def communication(self) -> dict[str, float]:
        """Bytes and uploads of the whole run, in total and as means over clients and uploads."""
        standing, users = self.standing, self.dataset.n_users
        return {
            "bytes_up": standing.bytes_up,
            "bytes_down": standing.bytes_down,
            "uploads": standing.uploads,
            "uploads_per_client": standing.uploads / users,
            "bytes_up_per_upload": standing.bytes_up / max(standing.uploads, 1),
            "bytes_down_per_upload": standing.bytes_down / max(standing.uploads, 1),
        }


def latest_checkpoint(folder: Path, skip_damaged: bool = False) -> Path:
    """The newest checkpoint of a run; with ``skip_damaged`` the newest one that is whole."""
    found = checkpoint.folders(folder / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{folder}: there is no checkpoint to resume from; expected another --output, or this folder removed"
        )
    for path in found:
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            if skip_damaged:
                continue
            hint = "; --previous goes on from the one before" if len(found) > 1 else ""
            raise CheckpointError(f"{error}{hint}") from None
        return path
    raise CheckpointError(f"{folder}: all {len(found)} checkpoints are damaged; expected one that is whole")


def read_summary(folder: Path) -> dict[str, Any]:
    """What a finished run recorded: best round, metrics of validation, test and popularity, communication, privacy."""
    path = folder / "result.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a finished run: {path.name} cannot be read ({reason(error)}); "
            "expected the folder that a run was written to"
        ) from None
    return summary


def read_history(folder: Path) -> list[Entry]:
    """The rounds that a run folder has recorded; a line that was cut off in writing is left out.

    Raises :class:`CheckpointError` for a line that is whole and no round.
    """
    entries: list[Entry] = []
    path = folder / "metrics.jsonl"
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            try:
                seconds, valid = line.pop("seconds"), line.pop("valid")
                entries.append(Entry(RoundReport(**line), seconds, valid))
            except (AttributeError, KeyError, TypeError) as error:
                number = len(entries) + 1
                raise CheckpointError(f"{path}, line {number}: is no round of this version ({error})") from None
    return entries


def write_settings(folder: Path, config: Config) -> None:
    """What a run folder begins with: the whole configuration, and the environment."""
    checkpoint.write_atomic(folder / "config.toml", config.to_toml().encode())
    checkpoint.write_atomic(folder / "environment.json", json.dumps(environment(), indent=1).encode())


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    packages = ("perfedrec", "torch", "numpy", "polars", "scipy", "safetensors", "dp-accounting")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: metadata.version(name) for name in packages},
    }


def popularity(dataset: Dataset) -> dict[str, float]:
    """Test metrics of ranking by popularity, through the same evaluation: what every result has to beat."""
    floor = Central(Popularity(), dataset, device="cpu")
    test, valid = (_held(part, floor.device) for part in (dataset.test, dataset.valid))
    return floor.recommender().evaluate(test, CUTOFFS, valid)


def _held(part: Interactions, device: torch.device) -> Held:
    return Held.of(part.offsets, part.items, device)


def _engine(algorithm: Any, dataset: Dataset, run: RunSettings) -> Engine:
    return engine(
        algorithm,
        dataset,
        seed=run.seed,
        device=run.device,
        block_size=run.block_size,
        dropout_rate=run.dropout_rate,
        users_per_node=run.users_per_node,
    )


@contextmanager
def signals(tell: Callable[[str], None] | None = None) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from them. A second SIGINT breaks off at once: ``tell`` is told."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if tell is not None and number == signal.SIGINT:  # from a thread: this one may be in the middle of a line
            line = "stops after the work at hand; Ctrl-C again breaks off at once"
            threading.Thread(target=tell, args=(line,)).start()

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
