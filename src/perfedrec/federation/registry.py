"""A registry of served models on disk: versions with the accuracy and the privacy that each has, one of them promoted.

It is a folder for one catalogue. ``versions/3`` is a version: the served state as a federation's run folder keeps it,
a model file for nodes (``served.model``) and facts (``version.json``); it never changes. ``registry.json`` says which
versions were promoted, one after the other; the last one is what nodes get. ``served.model`` is a link to its model
file. Every change is whole or has not happened: an interrupted one is completed or dropped by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfedrec import __version__
from perfedrec.core.errors import CheckpointError, ConfigError, reason
from perfedrec.federation.agreement import method_for_nodes
from perfedrec.federation.model_file import shared_model, write
from perfedrec.federation.run import Participants
from perfedrec.runs import checkpoint
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.shared_model import STATE, USERS, SharedModel, open_federation
from perfedrec.runtimes.flower import Setup

FORMAT = 1
INDEX, VERSIONS, FACTS, SERVED = "registry.json", "versions", "version.json", "served.model"


@dataclass(frozen=True)
class Version:
    """A version of the served model: its ``number``; the ``run`` of a ``method`` that it comes from, and after which
    ``round`` of training; its value of a ``metric`` in validation and test (``None``: not evaluated); its privacy
    ``claim``, and its epsilon against the coordinator at ``delta``; the number of ``users`` in training; when it was
    ``added`` (seconds since 1970); the fingerprint of its ``catalogue``; and of its model file the name by which nodes
    know it (``model``), and the digest (``file``, SHA-256)."""

    number: int
    run: str
    round: int
    method: str
    metric: str
    valid: float | None
    test: float | None
    claim: str
    epsilon: float | None
    delta: float | None
    users: int
    added: float
    catalogue: str
    model: str
    file: str


class Registry:
    """The registry in the folder ``path``, which is made where it does not exist.

    Raises :class:`CheckpointError` where the folder is something else or damaged, and :class:`ConfigError` where it is
    for another ``catalogue`` than the one with this fingerprint (``None``: any).
    """

    def __init__(self, path: Path, catalogue: str | None = None) -> None:
        self.path = path
        if path.exists() and not (path / INDEX).exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path}: is no registry of models; expected one, or a new folder")
        mine = self.catalogue
        if catalogue is not None and mine is not None and mine != catalogue:
            raise ConfigError(
                f"{path}: has models for the catalogue {mine}, and this is {catalogue}; expected another registry"
            )

    # --- looking ---

    @property
    def catalogue(self) -> str | None:
        """The fingerprint of the catalogue that all versions are for; ``None`` before the first one."""
        found = self._index()["catalogue"]
        return None if found is None else str(found)

    @property
    def promoted(self) -> int | None:
        """The number of the version that nodes get; ``None`` before the first one is promoted."""
        found = self._index()["promoted"]
        return int(found[-1]) if found else None

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        return [self.version(number) for number in self._numbers()]

    def version(self, number: int) -> Version:
        """The version with a number. Raises :class:`ConfigError` where there is none."""
        known = self._numbers()
        if number not in known:
            expected = f"one of {', '.join(map(str, known))}" if known else "perfedrec models add RUN first"
            raise ConfigError(f"{self.path}: has no version {number}; expected {expected}")
        path = self.folder(number) / FACTS
        try:
            return Version(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}); expected what perfedrec wrote") from None

    def folder(self, number: int) -> Path:
        """The folder of a version."""
        return self.path / VERSIONS / str(number)

    def model(self, number: int) -> tuple[SharedModel, Setup]:
        """The model of a version, and what nodes have to agree to."""
        version = self.version(number)
        model = open_federation(RunFolder(self.folder(number)))
        configuration = method_for_nodes(model.config, model.algorithm)
        return model, Setup(version.run, configuration, version.catalogue, __version__)

    def check(self, version: Version) -> None:
        """Raise :class:`CheckpointError` where the files of a version are not those that were added."""
        folder = RunFolder(self.folder(version.number))
        folder.model({"catalogue": version.catalogue})
        path = folder.path / SERVED
        if not path.is_file() or _digest(path) != version.file:
            raise CheckpointError(f"{path}: is not the file that was added; expected another version, or a backup")

    # --- changing ---

    def add(self, run: Path, data: str | None = None) -> Version:
        """Add the model of a finished run, simulated or of a federation; the version that it has already, if it was
        added before. ``data`` says where the data of a simulated run are.

        Raises :class:`ConfigError` for a run of another catalogue, and of a method that nodes do not have.
        """
        model, stored = shared_model(run, data), RunFolder(run)
        summary, catalogue = stored.summary(), model.catalogue.fingerprint
        with self._locked():
            mine = self._index()["catalogue"]
            if mine not in (None, catalogue):
                raise ConfigError(
                    f"{run}: has the catalogue {catalogue}, and {self.path} is for {mine}; expected another registry"
                )
            number = max(self._numbers(), default=0) + 1
            making = self.path / VERSIONS / f".{number}.{os.getpid()}"
            making.mkdir(parents=True)
            called = _write_model(model, stored, making)
            metric, privacy = model.config.run.select_by, summary.privacy
            version = Version(
                number=number,
                run=stored.name() if stored.is_federation else called,
                round=model.best_round,
                method=model.config.algorithm,
                metric=metric,
                valid=summary.valid.get(metric),
                test=summary.test.get(metric),
                claim=privacy["claim"],
                epsilon=privacy.get("epsilon_coordinator"),
                delta=privacy.get("delta"),
                users=model.users.numel(),
                added=time.time(),
                catalogue=catalogue,
                model=called,
                file=_digest(making / SERVED),
            )
            for each in self.versions():
                if (each.run, each.round, each.model) == (version.run, version.round, version.model):
                    shutil.rmtree(making)
                    return each
            checkpoint.write_atomic(making / FACTS, json.dumps(asdict(version), indent=1).encode())
            making.rename(self.folder(number))
            self._write_index(self._index() | {"catalogue": catalogue})
        return version

    def promote(self, number: int) -> Version:
        """Let nodes get a version from now on. Raises :class:`CheckpointError` where it is damaged."""
        version = self.version(number)
        with self._locked():
            index = self._index()
            self.check(version)
            if index["promoted"][-1:] != [number]:
                self._write_index(index | {"promoted": [*index["promoted"], number]})
            self._settle()
        return version

    def roll_back(self) -> Version:
        """Let nodes get the version again that was promoted before the present one. Raises :class:`ConfigError` where
        there is none, and :class:`CheckpointError` where it is damaged."""
        if self.promoted is None:
            raise ConfigError(f"{self.path}: no version was promoted; expected two promotions or more")
        with self._locked():
            index = self._index()
            if len(index["promoted"]) < 2:
                now = f"version {index['promoted'][0]} was promoted, and none before it"
                raise ConfigError(f"{self.path}: {now}; expected two promotions or more")
            version = self.version(index["promoted"][-2])
            self.check(version)
            self._write_index(index | {"promoted": index["promoted"][:-1]})
            self._settle()
        return version

    # --- files ---

    def _numbers(self) -> list[int]:
        folder = self.path / VERSIONS
        return sorted(int(each.name) for each in folder.iterdir() if each.name.isdecimal()) if folder.is_dir() else []

    def _index(self) -> dict[str, Any]:
        path = self.path / INDEX
        if not path.exists():
            return {"format": FORMAT, "catalogue": None, "promoted": []}
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}")
            return {**found, "catalogue": found["catalogue"], "promoted": [int(each) for each in found["promoted"]]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}); expected what perfedrec wrote") from None

    def _write_index(self, index: dict[str, Any]) -> None:
        checkpoint.write_atomic(self.path / INDEX, json.dumps(index).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let nobody else change the registry, and finish or drop what was interrupted."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not (self.path / INDEX).exists():
                self._write_index(self._index())
            for left in (self.path / VERSIONS).glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
            self._settle()
            yield
        finally:
            os.close(descriptor)

    def _settle(self) -> None:
        """Let ``served.model`` be the model file of the promoted version."""
        link = self.path / SERVED
        if (number := self.promoted) is None:
            return
        target = Path(VERSIONS, str(number), SERVED)
        if link.is_symlink() and link.readlink() == target:
            return
        scratch = self.path / f".{SERVED}.{os.getpid()}"
        with suppress(FileNotFoundError):
            scratch.unlink()
        scratch.symlink_to(target)
        scratch.replace(link)


def _write_model(model: SharedModel, run: RunFolder, folder: Path) -> str:
    """Write the model of a ``run`` as a version keeps it, and return the name by which nodes know its file."""
    made = RunFolder(folder)
    made.write_settings(model.config)
    made.write_catalogue(model.catalogue)
    records = {STATE: model.algorithm.serving(model.state), USERS: Participants(model.users)}
    made.save_model(records, {"catalogue": model.catalogue.fingerprint}, {"best_round": model.best_round})
    return write(model, run.path.resolve().name, folder / SERVED)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
