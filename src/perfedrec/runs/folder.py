"""The folder of a run: which files are in it, and how they are written and read back."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import tempfile
import time
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from perfedrec.core.counted import counted
from perfedrec.core.errors import CheckpointError, ConfigError, reason
from perfedrec.core.types import RoundReport
from perfedrec.core.version import __version__
from perfedrec.data import Catalogue, read_catalogue
from perfedrec.runs import checkpoint
from perfedrec.runs.checkpoint import Loaded
from perfedrec.runs.config import Config, as_written, check
from perfedrec.runs.files import (
    BENCH,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    HISTORY,
    ITEMS,
    MODEL,
    NAME,
    OLD_NAMES,
    REJECTIONS,
    RESULT,
    UNUSUAL,
    read_lines,
)
from perfedrec.runs.summary import Summary

TURN = 1.0
"""Seconds for which a coordinator waits for the lock of its folder, which who looks at the run takes for a moment."""


@dataclass(frozen=True)
class Entry:
    """One line of a run's history: the report of a round, its ``seconds`` without the evaluation, and its validation
    metrics, ``None`` where it was not evaluated."""

    report: RoundReport
    seconds: float
    valid: dict[str, float] | None = None

    def line(self) -> dict[str, Any]:
        """As ``metrics.jsonl`` has it."""
        return {**asdict(self.report), "seconds": self.seconds, "valid": self.valid}

    @staticmethod
    def read(line: Mapping[str, Any]) -> Entry:
        """The entry that :meth:`line` gave, in this version or in an older one.

        Raises :class:`AttributeError`, :class:`KeyError` or :class:`TypeError` for another line.
        """
        fields = {OLD_NAMES.get(name, name): value for name, value in line.items()}
        seconds, valid = fields.pop("seconds"), fields.pop("valid")
        return Entry(RoundReport(**fields), seconds, valid)


SEVERAL = 6
"""How many runs a message names."""


class RunFolder:
    """The folder of a run, of a simulation or of a federation's coordinator.

    This class alone knows how configuration, history, checkpoints, model and summary are stored there. Other files of a
    run, such as ``diagnostics.json``, are written by :meth:`write`. A file is either complete or absent; only the files
    of lines, ``metrics.jsonl``, ``rejections.jsonl`` and ``unusual.jsonl``, may end in a line that was cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = False  # whether :meth:`claim` made the folder

    # --- a new run ---

    def claim(self, leftovers: Collection[str] = ()) -> None:
        """Make the folder. Raises :class:`ConfigError` unless it is new or empty.

        ``leftovers`` are names of files that an attempt left which ended before its first round; they are removed.
        """
        self.check_free(leftovers)
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._empty()

    def check_free(self, leftovers: Collection[str] = (), resumable: bool = True) -> None:
        """Raise the errors of :meth:`claim` without making anything, so that a run can be refused before its data are
        read. ``resumable``: the command has ``--resume``, which the error may name."""
        checkpoint.check_writable(self.path)
        found = list(self.path.iterdir()) if self.path.exists() else []
        hidden = "." if leftovers else f".{CONFIG}."  # what a process was writing when it was killed
        if any(each.name not in leftovers and not each.name.startswith(hidden) for each in found):
            hint = " (or --resume to continue the run in it)" if resumable and (self.path / CONFIG).exists() else ""
            raise ConfigError(f"{self.path} is not empty; expected a new folder{hint}")

    def withdraw(self) -> None:
        """Undo :meth:`claim` and remove all that was written since, so that the run can be started there again."""
        self._empty()
        if self._made:
            self.path.rmdir()

    def _empty(self) -> None:
        for each in self.path.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    @contextmanager
    def locked(self, does: str = "is the coordinator of this run") -> Iterator[None]:
        """Let no other process of this machine do the same with the run in this folder, unless its disk has no locks.
        The folder is made where it is missing. Raises :class:`ConfigError`, which says what the other process
        ``does``."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor, end = os.open(self.path, os.O_RDONLY), time.monotonic() + TURN
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise ConfigError(f"{self.path}: another process {does}; expected it to end first") from None
                except OSError:
                    break
                time.sleep(TURN / 20)
            yield
        finally:
            os.close(descriptor)

    def write_settings(self, config: Config) -> None:
        """Write the whole configuration, and the environment that results depend on besides."""
        self.write(CONFIG, config.to_toml().encode())
        self.write(ENVIRONMENT, json.dumps(environment(), indent=1).encode())

    def write_name(self, name: str) -> None:
        """Write the name by which the nodes of a federation know the run, before they are asked for anything."""
        self.write(NAME, name.encode())

    def write_catalogue(self, catalogue: Catalogue) -> None:
        """Write the items of a federation, with their attributes and the encoding of users' attributes."""
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path) as made:
            catalogue.write(Path(made) / ITEMS)
            for each in Path(made).iterdir():
                each.replace(self.path / each.name)

    def write(self, name: str, content: bytes) -> None:
        """Write any file of the folder, so that it is either complete or absent."""
        checkpoint.write_atomic(self.path / name, content)

    # --- round by round ---

    def append(self, entry: Entry) -> None:
        """Add a round to the history."""
        self._append(HISTORY, entry.line())

    def append_rejection(self, line: Mapping[str, Any]) -> None:
        """Record that a round of a federation went on without a node."""
        self._append(REJECTIONS, line)

    def append_unusual(self, line: Mapping[str, Any]) -> None:
        """Record that a node of a federation stood out."""
        self._append(UNUSUAL, line)

    def forget_after(self, rounds: int) -> None:
        """Remove what was recorded of later rounds than the first ``rounds``: they are going to be played again.

        A line that was cut off is removed too.
        """
        self._rewrite(HISTORY, [entry.line() for entry in self.history()[:rounds]])
        self._rewrite(REJECTIONS, [line for line in self.rejections() if line["round"] < rounds])
        self._rewrite(UNUSUAL, [line for line in read_lines(self.path / UNUSUAL) if line["round"] < rounds])

    def save_checkpoint(
        self, rounds: int, records: Mapping[str, Any], belongs: Mapping[str, str], extra: Mapping[str, Any]
    ) -> Path:
        """Write the checkpoint after ``rounds`` rounds, remove old ones, and return its folder."""
        root = self.path / CHECKPOINTS
        folder = checkpoint.folder_of(root, rounds)
        checkpoint.save(folder, records, belongs, extra)
        checkpoint.prune(root)
        return folder

    # --- the end ---

    def save_model(self, records: Mapping[str, Any], belongs: Mapping[str, str], extra: Mapping[str, Any]) -> None:
        """Store the model that the run ends with."""
        checkpoint.save(self.path / MODEL, records, belongs, extra)

    def write_summary(self, summary: Summary) -> None:
        """Store the summary; afterwards the run counts as finished."""
        self.write(RESULT, json.dumps(summary.stored(), indent=1).encode())

    # --- reading back ---

    def config(self) -> Config:
        """The configuration of the run. Raises :class:`CheckpointError` where the folder has none."""
        path = self.path / CONFIG
        try:
            return check(as_written(tomllib.loads(path.read_text(encoding="utf-8"))), str(path))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise self._no_run(f"not a run folder: {CONFIG} cannot be read ({reason(error)})") from None

    @property
    def is_federation(self) -> bool:
        """Whether a coordinator wrote the run: federations have names."""
        return (self.path / NAME).is_file()

    def name(self) -> str:
        """The name of a federation's run. Raises :class:`CheckpointError` where the folder has none."""
        try:
            return (self.path / NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{self.path}: not a coordinator's run: {NAME} cannot be read ({reason(error)}); "
                "expected the folder that perfedrec serve wrote"
            ) from None

    def catalogue(self, fingerprint: str) -> Catalogue:
        """The items of a federation, by the ``fingerprint`` of its catalogue. Raises :class:`CheckpointError` where the
        folder has none.

        Versions up to 0.2.0 kept none in this folder, and ``perfedrec federation up`` one beside it.
        """
        for path in (self.path / ITEMS, self.path.parent / ITEMS):
            if path.is_file() and (found := read_catalogue(path)).fingerprint == fingerprint:
                return found
        raise CheckpointError(
            f"{self.path}: has no catalogue of this federation's items; expected the file of serve --catalogue, with "
            f"the attributes beside it, as {self.path / ITEMS}"
        )

    def history(self) -> list[Entry]:
        """The rounds that have been recorded, up to a line that was cut off.

        Raises :class:`CheckpointError` for a complete line that is not a round.
        """
        entries: list[Entry] = []
        path = self.path / HISTORY
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break
            try:
                entries.append(Entry.read(line))
            except (AttributeError, KeyError, TypeError) as error:
                number = len(entries) + 1
                raise CheckpointError(
                    f"{path}, line {number}: not a round that this version can read ({reason(error)}); "
                    "expected what perfedrec wrote there"
                ) from None
        return entries

    def rejections(self) -> list[dict[str, Any]]:
        """The nodes that rounds of a federation went on without: what :meth:`append_rejection` recorded."""
        return read_lines(self.path / REJECTIONS)

    def summary(self) -> Summary:
        """The summary of a finished run. Raises :class:`CheckpointError` where the folder has none."""
        try:
            return Summary.read(json.loads((self.path / RESULT).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            why = reason(error)
        except (KeyError, TypeError) as error:
            why = f"it is not a summary: {reason(error)}"
        problem = f"not a finished run: {RESULT} cannot be read ({why})"
        if not (self.path / RESULT).exists() and self.checkpoints():
            raise CheckpointError(f"{self.path}: {problem}; finish it with {self._resume}")
        raise self._no_run(problem)

    def _no_run(self, problem: str) -> CheckpointError:
        """The error for a folder that is none of a run: the ``problem``, or which runs it holds."""
        if not self.path.is_dir():
            problem = "it is a file" if self.path.exists() else "there is no such folder"
        of_bench = (self.path / BENCH).is_file()
        inside = sorted(str(each.parent) for each in self.path.glob(f"{'runs/*/*/*' if of_bench else '*'}/{CONFIG}"))
        if not inside:
            return CheckpointError(f"{self.path}: {problem}; expected the folder that a run was written to")
        what = "of a comparison (perfedrec bench)" if of_bench else "with runs in it"
        names = ", ".join(inside[:SEVERAL]) + (f" and {len(inside) - SEVERAL} more" if len(inside) > SEVERAL else "")
        return CheckpointError(f"{self.path}: this is a folder {what}; expected that of a run, here {names}")

    def checkpoints(self) -> list[Path]:
        """The folders of all checkpoints, newest first."""
        return checkpoint.folders(self.path / CHECKPOINTS)

    def latest_checkpoint(self, skip_damaged: bool = False) -> Path:
        """The folder of the newest checkpoint, or with ``skip_damaged`` of the newest one that is complete.

        Raises :class:`CheckpointError` where there is none, and without ``skip_damaged`` where it is damaged.
        """
        found = self.checkpoints()
        if not found:
            if (self.path / RESULT).is_file():
                raise CheckpointError(
                    f"{self.path}: the run is finished and has no checkpoint to continue from, as after --rounds 0; "
                    "expected a new run in another --output"
                )
            raise CheckpointError(
                f"{self.path}: there is no checkpoint to resume from; expected another --output, or this folder removed"
            )
        for path in found:
            try:
                checkpoint.load(path)
            except CheckpointError as error:
                if skip_damaged:
                    continue
                hint = "; --previous resumes from the one before it" if len(found) > 1 else ""
                raise CheckpointError(f"{error}{hint}") from None
            return path
        raise CheckpointError(f"{self.path}: all {len(found)} checkpoints are damaged; expected one that is complete")

    def newest_checkpoint(self, belongs: Mapping[str, str]) -> Loaded | None:
        """The newest complete checkpoint of a run, ``None`` where there is no checkpoint.

        Raises :class:`CheckpointError` where none of them can be used.
        """
        problem: CheckpointError | None = None
        for folder in self.checkpoints():
            try:
                return checkpoint.load(folder, belongs)
            except CheckpointError as error:
                problem = error
        if problem is not None:
            raise problem
        return None

    def check_rounds(self, rounds: int, last: Path | None = None) -> None:
        """Refuse to continue the run, from the checkpoint in the folder ``last`` (default: the newest one), to a number
        of ``rounds`` of training which it has left behind. Raises :class:`ConfigError`."""
        last = last or next(iter(self.checkpoints()), None)
        played = self.history()[: checkpoint.number_of(last)] if last else []
        trained = sum(entry.report.phase == "train" for entry in played)
        if rounds < trained:
            raise ConfigError(
                f"{self.path}: {counted(trained, 'round of training has', 'rounds of training have')} been played; "
                f"expected --rounds {trained} or more"
            )

    def model(self, belongs: Mapping[str, str]) -> Loaded:
        """The stored model. Raises :class:`CheckpointError` where the run has none yet, and where it is damaged."""
        if not (self.path / MODEL).exists():
            raise CheckpointError(f"{self.path}: the run has no model yet; finish it with {self._resume}")
        return checkpoint.load(self.path / MODEL, belongs)

    @property
    def _resume(self) -> str:
        """The command that goes on with the run."""
        return f"perfedrec {'serve' if self.is_federation else 'train'} --resume --output {self.path}"

    # --- lines ---

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _rewrite(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        if (self.path / name).exists():
            self.write(name, "".join(json.dumps(line) + "\n" for line in lines).encode())


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration. The version of perfedrec is that of the code that runs, which
    need not be the installed one."""
    packages = ("torch", "numpy", "polars", "scipy", "safetensors", "dp-accounting")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {"perfedrec": __version__, **{name: metadata.version(name) for name in packages}},
    }
