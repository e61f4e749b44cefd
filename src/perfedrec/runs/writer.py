"""What training writes to its run folder, from the configuration to the summary."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from perfedrec.core.algorithm import TRAIN
from perfedrec.core.errors import ConfigError
from perfedrec.data import Dataset
from perfedrec.evaluation.sample import share_of
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.registry import AnyMethod
from perfedrec.privacy.report import centralised_block, privacy_block, warnings
from perfedrec.runs.config import Config, identity, named_defence
from perfedrec.runs.diagnostics import Diagnostics
from perfedrec.runs.files import CHECKPOINTS
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.progress import Progress
from perfedrec.runs.result import Result, popularity
from perfedrec.runs.rounds import Rounds
from perfedrec.runs.summary import FULL, Summary, sampled
from perfedrec.runs.tables import by_user
from perfedrec.runs.uploads import Uploads


class NoWriter:
    """Writes nothing, for a run without a folder."""

    def claim(self) -> None:
        """Take the run folder of a new run. Raises :class:`ConfigError` unless it is new or empty."""

    def begin(self, rounds: Rounds) -> None:
        """Write what the folder of a new run starts with."""

    def resume(self, done: int) -> list[Entry]:
        """Continue in the folder of a run of which ``done`` rounds are kept, and return their history."""
        return []

    def add(self, entry: Entry, rounds: Rounds) -> None:
        """Write what is due after a round."""

    def checkpoint(self, rounds: Rounds) -> Path | None:
        """Write a checkpoint, and return its folder; ``None`` where there is no run folder."""
        return None

    def finish(self, result: Result, progress: Progress, n_phases: int) -> None:
        """Write the model and all figures. The test split is ranked here, once."""

    def withdraw(self) -> None:
        """Undo :meth:`claim` and all that was written."""


class RunWriter(NoWriter):
    """Writes a run to its folder; see ``docs/runs.md`` for the files."""

    def __init__(
        self, folder: RunFolder, algorithm: AnyMethod, dataset: Dataset, config: Config, belongs: dict[str, str]
    ) -> None:
        self.folder, self.algorithm, self.dataset, self.config = folder, algorithm, dataset, config
        self.belongs, self.diagnostics = belongs, Diagnostics(folder, dataset, config.run.seed)

    def claim(self) -> None:
        self.folder.claim()

    def begin(self, rounds: Rounds) -> None:
        self.folder.write_settings(self.config)
        self._diagnose("start", rounds)

    def resume(self, done: int) -> list[Entry]:
        self.folder.write_settings(self.config)
        self.diagnostics.resume()
        self.folder.forget_after(done)
        return self.folder.history()

    def add(self, entry: Entry, rounds: Rounds) -> None:
        if rounds.trained == 0:
            self._diagnose("pretrained", rounds)
        self.folder.append(entry)
        due = rounds.trained % self.config.run.checkpoint_every == 0 or rounds.progress.over
        if rounds.trained > 0 and due:
            self.checkpoint(rounds)

    def _diagnose(self, moment: str, rounds: Rounds) -> None:
        if isinstance(self.algorithm, Method) and not self.algorithm.trained:
            return  # it is fitted at once: there is nothing before the best round
        self.diagnostics.note(moment, rounds.trained, rounds.engine.recommender())

    def checkpoint(self, rounds: Rounds) -> Path:
        return self.folder.save_checkpoint(rounds.progress.done, rounds.records(), self.belongs, rounds.extra())

    def finish(self, result: Result, progress: Progress, n_phases: int) -> None:
        best = {"best_round": result.best_round, "valid": result.valid}
        self.folder.save_model(result.recommender.records(), self.belongs, best)
        Uploads(self.folder.path).forget_after(n_phases + max(result.best_round, 0))
        ranked, popular = result.rank("test"), popularity(self.dataset, result.cutoffs(), result.test_share)
        if ranked.users:  # methods are compared by the metrics of each user
            content = io.BytesIO()
            by_user(ranked, self.dataset.tested_users).write_parquet(content)
            self.folder.write("test_users.parquet", content.getvalue())
        self.diagnostics.note("best", result.best_round, result.recommender)
        self.diagnostics.draw_map(result.recommender)
        test, negatives, seed = result.means_of(ranked), self.config.run.sampled_negatives, self.config.run.seed
        among = result.rank_sampled("test", negatives, seed) if negatives else None
        summary = Summary(
            algorithm=self.config.algorithm,
            n_phases=n_phases,
            best_round=result.best_round,
            chosen=self._chosen(result),
            valid=result.valid,
            test=test,
            test_sampled=among.means() if among else None,
            protocols={"test": FULL, **({"test_sampled": sampled(among.negatives)} if among else {})},
            popularity=popular,
            data=self.dataset.notes.lines(),
            communication=progress.sent(self.dataset.n_users),
            privacy=self._privacy(max(progress.done - n_phases, 0), test, popular),
        )
        self.folder.write_summary(summary)

    def _chosen(self, result: Result) -> dict[str, float]:
        if isinstance(self.algorithm, Method):
            return {}
        return self.algorithm.chosen_options(result.recommender.records()["state"])

    def _privacy(self, trained: int, test: dict[str, float], popular: dict[str, float]) -> dict[str, Any]:
        """The privacy block of all rounds that were played."""
        if isinstance(self.algorithm, Method):
            return centralised_block()
        settings, users = self.algorithm.settings.privacy, self.dataset.n_users
        releases = self.algorithm.releases(trained, users)
        groups = self.algorithm.protection.n_groups(TRAIN.name, users)
        size = self.algorithm.protection.group_size
        block = privacy_block(
            settings, releases, "simulated", self.algorithm.reports_vectors, groups=groups, group_size=size
        )
        said = warnings(settings, users, self.dataset.n_items, test, popular)
        return block | named_defence(self.config) | {"warnings": said}

    def withdraw(self) -> None:
        self.folder.withdraw()


def save(result: Result, folder: Path) -> None:
    """Write a finished run to a new ``folder``; see :meth:`Result.save`."""
    target = RunFolder(folder)
    target.claim()
    if result.output is not None:
        shutil.copytree(result.output, folder, ignore=shutil.ignore_patterns(CHECKPOINTS), dirs_exist_ok=True)
        return
    if result.config is None:
        raise ConfigError("a result without a configuration cannot be saved; expected one that train() returned")
    algorithm, config = result.config.build(), result.config
    progress = Progress(len(result.history), config.run.select_by)
    for entry in result.history:
        progress.count(entry.report, entry.seconds)
    n_phases = sum(entry.report.phase != TRAIN.name for entry in result.history)
    writer = RunWriter(target, algorithm, result.dataset, config, belonging(algorithm, result.dataset, config))
    try:
        target.write_settings(config)
        for entry in result.history:
            target.append(entry)
        writer.finish(result, progress, n_phases)
    except BaseException:
        target.withdraw()
        raise
    result.output = folder


def belonging(algorithm: AnyMethod, dataset: Dataset, config: Config) -> dict[str, str]:
    """What the checkpoints of a run belong to: the data's fingerprint, and a digest of the configuration without the
    options that may change when the run is resumed."""
    free = {"rounds", "patience", "users_per_node", "threads", "block_size", "device", "checkpoint_every", "test_users"}
    free |= {"workers", "cluster", "keep_uploads"}
    if share_of(dataset.n_users, config.run.evaluate_users) == 1:  # all validate, as in versions without this option
        free.add("evaluate_users")
    settings = identity(config.model_dump(mode="json", exclude={"data": True, "evaluation": True, "run": free}))
    if not isinstance(algorithm, Method):  # the noise as it was solved: a resumed run must not solve for it again
        settings["noise"] = algorithm.settings.privacy.noise.model_dump()
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return {"data": dataset.fingerprint, "configuration": digest}
