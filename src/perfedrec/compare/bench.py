"""Comparisons: methods x data sets x seeds, described by one TOML file.

Each combination is a cell: an ordinary run in a folder of its own.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from perfedrec.core.errors import ConfigError, DataError, PerfedrecError, reason
from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import nearest
from perfedrec.core.settings import Settings
from perfedrec.data import Dataset
from perfedrec.evaluation.ranking import cutoffs, cutoffs_of
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.registry import method, seedless
from perfedrec.runs.checkpoint import folders, write_atomic
from perfedrec.runs.config import Config, DataSettings, Metric, differences, open_data, resolve
from perfedrec.runs.data_settings import moved_to
from perfedrec.runs.files import BENCH as BENCH
from perfedrec.runs.folder import RunFolder

_NAME = re.compile(r"[\w@(+][\w .,@=()+-]*")


class MethodEntry(Settings):
    """A method to compare; the options are those of ``perfedrec train``."""

    algorithm: str | None = Field(None, description="a method; default: the entry's label")
    preset: str | None = Field(None, description="a preset; default: the preset of the method")
    privacy: str | None = Field(None, description="privacy profile")
    config: Path | None = Field(
        None, description="TOML file that is applied after the preset; the path is relative to the comparison's file"
    )
    set: tuple[str, ...] = Field((), description="section.key=value")
    without: tuple[str, ...] = Field((), description="parts to switch off")


class Target(Settings):
    """A validation figure: rounds, bytes and seconds are counted until a run reaches it."""

    metric: Metric
    value: float = Field(gt=0)


class Sweep(Settings):
    """One option with several values: each of ``methods`` becomes one method for each value."""

    key: str
    values: tuple[bool | int | float | str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field((), description="labels; default: all methods")


class BenchFile(Settings):
    """The content of a comparison's file.

    With ``vary``, a seed also sets this option of the data. Then "data.fold" makes the folds the default of ``seeds``.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    vary: Literal["data.seed", "data.fold"] | None = Field(
        None, description="option of the data that each seed also sets: another split for each, or the folds"
    )
    metric: Metric = Field("ndcg@20", description="the metric by which methods are compared")
    reference: str | None = Field(None, description="label of the method that all others are compared with")
    target: Target | None = None
    data: dict[str, DataSettings] = Field(min_length=1)
    methods: dict[str, MethodEntry] = Field(min_length=1)
    common: MethodEntry = Field(MethodEntry(), description="options of all methods that do not set their own")
    sweep: Sweep | None = None
    ks: tuple[int, ...] = Field((), description="lengths of lists for all methods (default: those of the methods)")

    @field_validator("ks")
    @classmethod
    def _lengths(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if ks and min(ks) < 1:
            raise ValueError("expected whole numbers from 1")
        return ks

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError("expected whole numbers from 0, each once")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def _all_folds(cls, tree: Any) -> Any:
        """The folds are the seeds, where nothing else is said."""
        if not isinstance(tree, Mapping) or tree.get("vary") != "data.fold" or "seeds" in tree:
            return tree
        data = tree.get("data")
        numbers = [each.get("folds") if isinstance(each, Mapping) else None for each in dict(data or {}).values()]
        folds = [each for each in numbers if isinstance(each, int)]
        return {**tree, "seeds": list(range(min(folds)))} if folds and min(folds) > 0 else tree

    @model_validator(mode="after")
    def _varied(self) -> Self:
        if self.vary is None:
            return self
        option = self.vary.partition(".")[2]
        for name, settings in self.data.items():
            if option in settings.model_fields_set and getattr(settings, option):
                raise ValueError(f"data.{name}.{option} is set by vary; expected it to be left out")
            if option == "fold" and not max(self.seeds) < (settings.folds or 0):
                raise ValueError(f"vary = data.fold needs data.{name}.folds above {max(self.seeds)}, the last of seeds")
        return self

    def settings(self, data: str, seed: int) -> DataSettings:
        """The settings of a data set for a seed."""
        option = {self.vary.partition(".")[2]: seed} if self.vary else {}
        return self.data[data].model_copy(update=option)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str
    data: str
    seed: int
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.label}, {self.data}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def begun(self) -> bool:
        """Whether the run has a checkpoint from which it can be resumed."""
        return bool(folders(self.folder / "checkpoints"))


@dataclass
class Bench:
    """A comparison with all its configurations resolved.

    ``configs`` are by label and data set, privacy ``profiles`` by label, and ``datasets`` by name, once
    :meth:`prepare` has opened them: the one of the first seed, where seeds vary the split. ``splits`` has the
    fingerprints by name and seed. ``output`` is the folder of the comparison.
    """

    file: BenchFile
    configs: dict[tuple[str, str], Config]
    profiles: dict[str, str | None]
    output: Path
    datasets: dict[str, Dataset] = field(default_factory=dict)
    splits: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for label, _ in self.configs))

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """The lengths of lists at which the figures of a method are computed."""
        return cutoffs(k for config in self.configs.values() for k in config.run.cutoffs)

    def cells(self) -> Iterator[Cell]:
        """All runs in the order in which they start: by data set, then by seed, then by method. A method that takes no
        seed has one run on a data set."""
        for data in self.file.data:
            for seed in self.file.seeds:
                for label in self.labels:
                    config = self.configs[label, data]
                    if seed != self.file.seeds[0] and self.seedless(label, data):
                        continue
                    run, settings = config.run.model_copy(update={"seed": seed}), self.file.settings(data, seed)
                    config = config.model_copy(update={"run": run, "data": settings})
                    yield Cell(label, data, seed, config, self.output / "runs" / label / data / f"seed-{seed}")

    def seedless(self, label: str, data: str) -> bool:
        """Whether all seeds give the same result. Sampled negatives are drawn with the seed."""
        config = self.configs[label, data]
        return seedless(method(config.algorithm)) and not config.run.sampled_negatives and self.n_splits(data) == 1

    def n_splits(self, data: str) -> int:
        """How many different splits of a data set the seeds give; before :meth:`prepare`, how many they can give."""
        known = {self.splits.get((data, seed)) for seed in self.file.seeds}
        return len(self.file.seeds) if None in known and self.file.vary else len(known)

    def _opened(self, name: str, seed: int) -> Dataset:
        """A data set for a seed. Its name is in the message of an error, because several are read."""
        try:
            return open_data(self.file.settings(name, seed))
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from None

    def prepare(self) -> None:
        """Open all data sets, check that every method can learn from them, check the runs that the folder already
        holds, and write ``bench.toml``.

        Raises :class:`ConfigError` where a run in the folder has another configuration or other data than this
        comparison; the message says what has changed. Raises it or :class:`DataError` where a method needs what the
        data do not have.
        """
        for name in self.file.data:
            for seed in self.file.seeds:
                new = self.file.vary is not None or name not in self.datasets
                dataset = self._opened(name, seed) if new else self.datasets[name]
                self.datasets.setdefault(name, dataset)
                self.splits[name, seed] = dataset.fingerprint
        for (label, name), config in self.configs.items():
            algorithm = config.build()
            if isinstance(algorithm, Method):
                try:
                    algorithm.check_data(self.datasets[name])
                except PerfedrecError as error:
                    raise type(error)(f"methods.{label}, data.{name}: {error}") from None
        for cell in self.cells():
            if not (cell.folder / "config.toml").exists():
                continue
            hint = f"expected the same as in {cell.folder}; restore it, choose another --output, or remove that folder"
            changed = differences(RunFolder(cell.folder).config(), cell.config)
            if changed:
                raise ConfigError(f"{cell.label} on {cell.data} has changed: {'; '.join(changed)}; {hint}")
            if _fingerprint(cell.folder) not in (None, self.splits[cell.data, cell.seed]):
                raise ConfigError(f"the data {cell.data} have changed; {hint}")
        self.output.mkdir(parents=True, exist_ok=True)
        tree = self.file.model_dump(mode="json", exclude={"methods", "common", "sweep"}, exclude_none=True)
        tree["methods"] = {
            label: self.configs[label, data].model_dump(
                mode="json", by_alias=True, exclude_none=True, exclude={"data": True, "run": {"seed"}}
            )
            for label, data in reversed(self.configs)
        }
        write_atomic(self.output / BENCH, tomli_w.dumps(tree).encode())


def read(
    path: Path, output: Path, moved: Mapping[str, str | None] | None = None, ks: tuple[int, ...] | None = None
) -> Bench:
    """Read a comparison from its file and check every configuration in it.

    ``moved`` names the data sets to compare on, each with its path (``None``: the path in the file). Without ``moved``,
    all data sets of the file are compared on. ``ks`` are lengths of lists in place of those in the file.

    Raises :class:`ConfigError`, which names the file, the entry and the mistake.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); expected the TOML file of a comparison") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not valid TOML: {error}; expected the file of a comparison") from None
    if "methods" not in tree and ("run" in tree or "algorithm" in tree):
        raise ConfigError(f"{path}: this is the configuration of a run; expected the file of a comparison")
    try:
        file = BenchFile.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + explain(error.errors(), BenchFile)) from None
    if moved:
        file = file.model_copy(update={"data": {name: _placed(file, path, name, to) for name, to in moved.items()}})
    methods = _swept(file, path)
    for name in (*methods, *file.data):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: the name {name!r} cannot be the name of a folder; expected letters, digits and - _ = @"
            )
    if file.reference is not None and file.reference not in methods:
        raise ConfigError(
            f"{path}: reference: there is no method {file.reference!r}; "
            f"expected one of: {', '.join(methods)}{nearest(file.reference, methods)}"
        )
    configs: dict[tuple[str, str], Config] = {}
    for label, entry in methods.items():
        try:
            config = _config(label, entry, file.common, path)
        except ConfigError as error:
            raise ConfigError(f"{path}: methods.{label}: {error}") from None
        configs |= {(label, name): config.model_copy(update={"data": data}) for name, data in file.data.items()}
    configs = _with_cutoffs(configs, file.model_copy(update={"ks": ks}) if ks else file)
    profiles = {label: entry.privacy or file.common.privacy for label, entry in methods.items()}
    return Bench(file, configs, profiles, output)


def _placed(file: BenchFile, path: Path, name: str, where: str | None) -> DataSettings:
    if name not in file.data:
        raise ConfigError(
            f"{path}: there is no data set {name!r}; expected one of: {', '.join(file.data)}, or NAME=PATH with one of "
            f"these names{nearest(name, file.data)}"
        )
    return file.data[name] if where is None else moved_to(file.data[name], where)


def _config(label: str, entry: MethodEntry, common: MethodEntry, path: Path) -> Config:
    overrides = (*common.set, *entry.set)
    for each in overrides:
        if each.startswith(("data.", "run.seed")):
            raise ConfigError(
                f"{each}: data and seeds are the same for all methods; expected this under [data.NAME] or in seeds"
            )
    config, preset = entry.config or common.config, entry.preset or common.preset
    algorithm = entry.algorithm or common.algorithm or (None if config or preset else label)
    resolved = resolve(
        preset,
        None if config is None else path.parent / config,
        ("run.threads=1", *overrides),
        (*common.without, *entry.without),
        privacy=entry.privacy or common.privacy,
        algorithm=algorithm,
    )
    resolved.build()  # computes the noise of the profile, and raises where that is not possible
    resolved.check_here()
    return resolved


def _with_cutoffs(configs: dict[tuple[str, str], Config], file: BenchFile) -> dict[tuple[str, str], Config]:
    """The configurations with the same lengths of lists for all: what the file asks for, and what it compares by."""
    named = [file.metric, *([file.target.metric] if file.target else [])]
    own = file.ks or [k for config in configs.values() for k in config.run.cutoffs]
    ks = cutoffs((*own, *cutoffs_of(named)))
    return {
        key: config.model_copy(update={"run": config.run.model_copy(update={"ks": ks})})
        for key, config in configs.items()
    }


def _swept(file: BenchFile, path: Path) -> dict[str, MethodEntry]:
    """The methods; those of the sweep once for each of its values."""
    sweep = file.sweep
    if sweep is None:
        return file.methods
    for label in sweep.methods:
        if label not in file.methods:
            raise ConfigError(f"{path}: sweep.methods: there is no method {label!r}{nearest(label, file.methods)}")
    methods = {}
    for label, entry in file.methods.items():
        if sweep.methods and label not in sweep.methods:
            methods[label] = entry
            continue
        for value in sweep.values:
            text = json.dumps(value) if not isinstance(value, str) else value
            added = (*entry.set, f"{sweep.key}={text}")
            named = entry.algorithm or (None if entry.config or entry.preset else label)
            swept = entry.model_copy(update={"set": added, "algorithm": named})
            methods[f"{label} {sweep.key.rsplit('.', 1)[-1]}={text}"] = swept
    return methods


def _fingerprint(folder: Path) -> str | None:
    """The fingerprint of the data that a run was made with; ``None`` where the run has stored none."""
    for stored in (folder / "model", *folders(folder / "checkpoints")):
        try:
            return str(json.loads((stored / "checkpoint.json").read_bytes())["belongs"]["data"])
        except (OSError, ValueError, KeyError):
            continue
    return None
