"""The configuration of a run: typed sections, and how they are read from presets, files and overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self, cast

import tomli_w
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from perfedrec.core.device import pick_device
from perfedrec.core.dotted import as_text, flat, is_section, keys, merge, put
from perfedrec.core.errors import ConfigError, reason
from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import nearest
from perfedrec.core.settings import Settings
from perfedrec.evaluation.holdout import SECTION, EvaluationSettings
from perfedrec.evaluation.ranking import CUTOFFS
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.federated.defence import DefenceSettings
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.methods.registry import METHODS, AnyMethod, centralised, method, name_of
from perfedrec.privacy.ledger import split_budget
from perfedrec.privacy.noise import check_source
from perfedrec.privacy.protection import MISSING
from perfedrec.privacy.settings import SECURE_ONLY, NoiseSettings
from perfedrec.runs.data_settings import ELSEWHERE as ELSEWHERE
from perfedrec.runs.data_settings import MEMORY as MEMORY
from perfedrec.runs.data_settings import NODES as NODES
from perfedrec.runs.data_settings import DataSettings as DataSettings
from perfedrec.runs.data_settings import open_data as open_data
from perfedrec.runs.data_settings import settings_of as settings_of
from perfedrec.runs.preset_files import ABLATIONS, DEFAULT, ablation, default_preset, preset_text, presets
from perfedrec.runs.run_settings import Metric as Metric
from perfedrec.runs.run_settings import RunSettings as RunSettings
from perfedrec.runtimes.cluster import loaded

_FREE = {"data.path", "data.train", "data.valid", "data.test"}  # a fingerprint says whether the data are the same
_FREE |= {"run.threads", "run.block_size", "run.device", "run.checkpoint_every"}  # these change no result
_FREE |= {"run.workers", "run.cluster", "run.keep_uploads"}
_FREE |= {"evaluation.hold_out", "evaluation.ratio"}  # of federations of nodes, which this does not compare

_NEW_PERSONAL = ("neighbourhood", "chosen")
"""Options of the personal model that were added later, and without a value change nothing."""

_NEW_PRETRAINING = {
    "at": "clients",
    "clients": PretrainingSettings().clients,
    "user_exponent": 0.5,
    "item_exponent": 0.5,
    "epochs": PretrainingSettings().epochs,
    "options": {},
    "continued": 0.0,
}
"""Options of pre-training that were added later, with the values that change nothing."""

_NEW_METHOD = {
    "learning_rate_decay": None,
    "optimizer": "adam",
    "dropout": 0.0,
    "contrasted": "random",
    "scoring": "cosine",
    "each_number": False,
}
"""The same of centralised methods."""

_OTHER_FILES = {
    "methods": "the file of a comparison (perfedrec bench runs it)",
    "space": "a search space (perfedrec tune --space takes it)",
}
"""TOML files that are no configuration, by a section that only they have."""


class Config(Settings):
    """The whole configuration of a run: the method, the data and the run itself.

    A method adds sections of its own, see :func:`config_type`.
    """

    algorithm: str = Field(DEFAULT, description="the method: a name, or file.py:Class")
    data: DataSettings = DataSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        yield "algorithm", self.algorithm
        yield from ((name, value) for name, value in super().__repr_args__() if name != "algorithm")

    @property
    def settings(self) -> Settings:
        """The options of the method."""
        kind = method(self.algorithm).Options
        if _sectioned(kind):
            return cast(Settings, kind(**{name: getattr(self, name) for name in kind.model_fields}))
        return cast(Settings, self.method)  # type: ignore[attr-defined]

    @property
    def attributes(self) -> bool:
        """Whether the method uses attributes of users and items."""
        return bool(getattr(getattr(self.settings, "model", None), "attributes", False))

    def _check_keeping(self) -> None:
        """Raise :class:`ValueError` where nobody sees the uploads that are to be kept."""
        if centralised(method(self.algorithm)):
            raise ValueError(
                f"{self.algorithm} is centralised: there are no uploads; expected run.keep_uploads = false"
            )
        if self.run.workers:
            raise ValueError("run.keep_uploads needs the uploads in this process; expected run.workers = 0")
        if self.settings.privacy.aggregation == "secure":  # type: ignore[attr-defined]
            raise ValueError(
                "run.keep_uploads keeps single uploads, which nobody sees with secure aggregation; expected "
                "run.keep_uploads = false"
            )

    @model_validator(mode="after")
    def _feasible(self) -> Self:
        kind = method(self.algorithm)
        if self.data.train_on_valid and self.run.patience:
            raise ValueError(
                "data.train_on_valid leaves no validation data, and run.patience ends a run by them; expected "
                "run.patience = 0 and, in run.rounds, the number of rounds that was chosen before"
            )
        if self.run.cluster and not self.run.workers:
            raise ValueError("run.cluster has use for workers; expected run.workers = their number")
        if self.run.keep_uploads:
            self._check_keeping()
        if centralised(kind):
            if self.run.workers:
                raise ValueError(f"{self.algorithm} is centralised: it has no clients; expected run.workers = 0")
            if self.run.dropout_rate:
                raise ValueError(f"{self.algorithm} is centralised: no client drops out; expected run.dropout_rate = 0")
            if self.run.users_per_node > 1:
                raise ValueError(f"{self.algorithm} is centralised: it has no nodes; expected run.users_per_node = 1")
            if self.run.rounds and not kind.trained:
                raise ValueError(f"{self.algorithm} is fitted at once; expected run.rounds = 0")
            return self
        privacy, cap = self.settings.privacy, self.settings.selection.max_participations  # type: ignore[attr-defined]
        if privacy.epsilon and self.run.rounds and cap is None:
            raise ValueError(
                "privacy.epsilon with rounds of training needs selection.max_participations: the coordinator sees who "
                "takes part, and only a cap bounds what it learns"
            )
        if (privacy.epsilon or privacy.noise.any) and self.run.dropout_rate > privacy.dropout_tolerance:
            raise ValueError(
                f"run.dropout_rate is above privacy.dropout_tolerance ({privacy.dropout_tolerance:g}): every noisy sum "
                "would be aborted"
            )
        if privacy.low_rank and self.run.dropout_rate > MISSING:
            raise ValueError(f"run.dropout_rate is above {MISSING:g}: every phase over all users would be aborted")
        return self

    def build(self) -> AnyMethod:
        """The method that this configuration describes. Where an epsilon is asked for, the noise for it is solved."""
        kind, settings = method(self.algorithm), self.settings
        built: AnyMethod = kind(settings)
        if isinstance(built, Method) or built.settings.privacy.epsilon is None:
            return built
        privacy, selection = built.settings.privacy, built.settings.selection
        # For all participations that the cap allows: a run that is resumed may become longer.
        releases = built.releases(selection.max_participations or 0 if self.run.rounds else 0, n_users=1)
        noise = split_budget(privacy.epsilon, privacy.delta, {each.name: each.participations for each in releases})
        solved = privacy.model_copy(update={"noise": NoiseSettings(**noise)})
        solution: AnyMethod = kind(settings.model_copy(update={"privacy": solved}))
        return solution

    def check_here(self) -> None:
        """Raise :class:`ConfigError` where this machine lacks what the run needs: its device, Ray, or OpenDP."""
        pick_device(self.run.device)
        if self.run.workers:
            loaded()
        if not centralised(method(self.algorithm)):
            check_source(self.settings.privacy)  # type: ignore[attr-defined]

    def to_toml(self) -> str:
        """The whole configuration as TOML. A key that is absent is an option that is off."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))


@cache
def config_type(algorithm: str) -> type[Config]:
    """The class of a method's configuration: :class:`Config` with the method's options.

    Options that are grouped in sections become sections of the configuration. Others become a section ``[method]``.
    """
    kind = method(algorithm).Options
    default = (str, Field(algorithm, description=Config.model_fields["algorithm"].description))
    if _sectioned(kind):
        return create_model("Config", __base__=(Config, kind), algorithm=default)
    return create_model("Config", __base__=Config, algorithm=default, method=(kind, kind()))


def config_of(algorithm: AnyMethod, run: RunSettings) -> Config:
    """The configuration of a method that was built without one."""
    name, kind = name_of(algorithm), cast(Any, type(algorithm)).Options
    options = getattr(algorithm, "options", algorithm.settings)
    if _sectioned(kind):
        sections = {each: getattr(options, each) for each in kind.model_fields}
        return config_type(name)(algorithm=name, run=run, **sections)
    return config_type(name)(algorithm=name, run=run, **{"method": options})


def defence_of(config: Config) -> str:
    """The options against malicious clients that a configuration sets; nothing for no defence."""
    defence = getattr(config.settings, "defence", None)
    return defence.given if isinstance(defence, DefenceSettings) else ""


def named_defence(config: Config) -> dict[str, str]:
    """The defence as an entry of the privacy block; nothing for no defence."""
    return {"defence": given} if (given := defence_of(config)) else {}


def _sectioned(kind: type[BaseModel]) -> bool:
    """Whether all options of a class are grouped in sections."""
    annotations = [field.annotation for field in kind.model_fields.values()]
    return bool(annotations) and all(map(is_section, annotations))


def load(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    without: Iterable[str] = (),
    *,
    privacy: str | None = None,
    **values: Any,
) -> Config:
    """A configuration from a preset, a privacy profile, a TOML file, ablations ``without`` a part,
    ``section.key=value`` overrides, and ``values`` by dotted key, where ``run__seed`` stands for ``run.seed``.

    Later sources win, in this order. A ``data__path`` or ``data__train`` replaces a split that was given in files. A
    value of ``None`` is ignored. Raises :class:`ConfigError` with one line that names every mistake, and for an unknown
    key the nearest valid one.
    """
    tree: dict[str, Any] = {} if values.get("algorithm") is None else {"algorithm": values["algorithm"]}
    chosen = values.get("algorithm") or in_file(file).get("algorithm")
    if preset in METHODS and chosen in METHODS and not issubclass(method(chosen), method(preset)):
        raise ConfigError(
            f"preset {preset} is that of another method than {chosen}; expected method {preset}, or no preset: without "
            f"one, a run of {chosen} starts from its own"
        )
    if preset is not None:
        merge(tree, _parse(preset_text(preset), f"preset {preset}", tree))
    if privacy is not None:
        tree.pop("privacy", None)  # a profile says all about protection
        merge(tree, _profile(privacy, tree))
    if file is not None:
        try:
            merge(tree, _parse(Path(file).read_text(encoding="utf-8"), str(file), tree))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read ({reason(error)}); expected a TOML file") from None
    for part in without:
        for key, value in ablation(part).items():
            put(tree, key, value)
    for override in overrides:
        put(tree, *_override(override))
    if any(values.get(f"data__{name}") is not None for name in ("path", "train", "test")):
        for part in ("train", "valid", "test"):
            put(tree, f"data.{part}", None)
    for key, value in values.items():
        if value is not None:
            put(tree, key.replace("__", "."), value)
    _check_parts(without, tree)
    return check(tree)


def _check_parts(parts: Iterable[str], tree: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for a part to switch off that the method of a configuration does not have."""
    kind = _type_of(tree, "")
    sections = {way for key in keys(kind) for way in (key, key.rpartition(".")[0])}
    for part in parts:
        if not ablation(part).keys() <= sections:
            has = [each for each, options in ABLATIONS.items() if options.keys() <= sections]
            name = tree.get("algorithm", DEFAULT)
            known = f"one of {', '.join(has)}{nearest(part, has)}" if has else f"none: {name} has no such parts"
            raise ConfigError(f"{name} has no part {part!r} to switch off; expected {known}")


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    without: Iterable[str] = (),
    *,
    privacy: str | None = None,
    algorithm: str | None = None,
    **values: Any,
) -> Config:
    """What ``perfedrec train`` runs: :func:`load`, from the method's own preset where no preset is named."""
    named = in_file(file).get("algorithm")
    preset = preset or default_preset(algorithm or (named if isinstance(named, str) else None))
    return load(preset, file, overrides, without, privacy=privacy, algorithm=algorithm, **values)


def in_file(file: str | Path | None) -> dict[str, Any]:
    """The content of a TOML file; empty where it cannot be read, which :func:`load` reports."""
    try:
        return {} if file is None else tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def as_written(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a configuration that the package itself wrote in full. Before 0.3.0 there was no privacy.rank, and
    secure sums were opened by item. Before 0.7.0 there was no pretraining.at, and clients made the passes. Where
    there is no section evaluation, nodes hold nothing out."""
    tree, privacy, pretraining = {SECTION: {"hold_out": "none"}, **tree}, tree.get("privacy"), tree.get("pretraining")
    if isinstance(pretraining, Mapping):
        tree["pretraining"] = {"at": "clients", **pretraining}
    if not isinstance(privacy, Mapping) or privacy.get("aggregation") != "secure":
        return dict(tree)
    return {**tree, "privacy": {"rank": 0, **privacy}}


def without_new(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without options of pre-training, of the personal model, of the defence and of centralised methods that
    were added later, where they change nothing: then it is the one that earlier versions wrote."""
    found, personal = dict(tree), tree.get("personal")
    if isinstance(defence := tree.get("defence"), Mapping):
        set_ = {name: value for name, value in defence.items() if value is not None}
        if set_ == DefenceSettings().model_dump(exclude_none=True):
            del found["defence"]
    if isinstance(pretraining := tree.get("pretraining"), Mapping):
        of_service = ("clients",) if pretraining.get("at") == "clients" else ()  # has no effect then
        found["pretraining"] = {
            name: value
            for name, value in pretraining.items()
            if name not in of_service and _NEW_PRETRAINING.get(name) != value
        }
    if isinstance(options := tree.get("method"), Mapping):
        found["method"] = {
            name: value for name, value in options.items() if name not in _NEW_METHOD or _NEW_METHOD[name] != value
        }
    if isinstance(personal, Mapping):
        found["personal"] = {name: value for name, value in personal.items() if value or name not in _NEW_PERSONAL}
        if not personal.get("neighbourhood"):
            found.pop("neighbourhood", None)
    return found


def identity(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without the options that did not exist before 0.3.0, where they have the meaning that it had then."""
    tree, privacy, run = dict(tree), tree.get("privacy"), tree.get("run")
    if tree.get(SECTION) == {"hold_out": "none"}:
        del tree[SECTION]
    tree = without_new(tree)
    if isinstance(privacy, Mapping) and not privacy.get("rank"):
        tree["privacy"] = {name: value for name, value in privacy.items() if name not in SECURE_ONLY}
    if isinstance(run, Mapping) and tuple(run.get("ks", CUTOFFS)) == CUTOFFS:
        tree["run"] = {name: value for name, value in run.items() if name != "ks"}
    return tree


def check(tree: Mapping[str, Any], where: str = "") -> Config:
    """The configuration in a tree of sections, which comes from ``where``.

    Raises :class:`ConfigError` that names each wrong key.
    """
    prefix = f"{where}: " if where else ""
    kind = _type_of(tree, prefix)
    for key, value in flat(tree).items():
        bits = 64 if key.endswith("seed") else 63  # a seed is 64 bits
        if isinstance(value, int) and abs(value) >= 2**bits:
            raise ConfigError(f"{prefix}{key}: expected a number below 2^{bits} (given: {value})")
    try:
        return kind.model_validate(_with_rounds(tree))
    except ValidationError as error:
        raise ConfigError(prefix + explain(error.errors(), kind)) from None


def _with_rounds(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree, with no rounds for a method that is fitted at once, where it says nothing of them."""
    fitted, run = method(tree.get("algorithm", DEFAULT)), tree.get("run", {})
    if not centralised(fitted) or fitted.trained or not isinstance(run, Mapping):
        return tree
    return {**tree, "run": {"rounds": 0, **run}}


def _check_part(tree: Mapping[str, Any], where: str) -> None:
    """:func:`check` of one of several sources. Whether options fit together is checked for all sources together."""
    kind = _type_of(tree, f"{where}: ")
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        wrong = [entry for entry in error.errors() if entry["type"] != "value_error"]
        if wrong:
            raise ConfigError(f"{where}: " + explain(wrong, kind)) from None


def _type_of(tree: Mapping[str, Any], prefix: str) -> type[Config]:
    name = tree.get("algorithm", DEFAULT)
    if not isinstance(name, str):
        raise ConfigError(f"{prefix}algorithm: expected the name of a method (given: {name!r})")
    return config_type(name)


def differences(before: Config, after: Config) -> list[str]:
    """The options that differ between two configurations, as ``key is 2, was 1``.

    Where the data are stored and where a run is computed is left out. For two different methods only that is reported,
    because their options differ.
    """
    if before.algorithm != after.algorithm:
        return [f"algorithm is {after.algorithm}, was {before.algorithm}"]
    old, new = (flat(each.model_dump(mode="json", by_alias=True)) for each in (before, after))
    return [
        f"{key} is {as_text(new.get(key))}, was {as_text(old.get(key))}"
        for key in {**new, **old}
        if key not in _FREE and old.get(key) != new.get(key)
    ]


def _parse(text: str, where: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of sections in a TOML text, with its keys checked for the method of the sources ``before`` it."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}; expected the configuration of a run") from None
    other = next((what for key, what in _OTHER_FILES.items() if isinstance(tree.get(key), dict)), None)
    if other is not None:
        raise ConfigError(f"{where}: this is {other}; expected the configuration of a run")
    _check_part({"algorithm": before.get("algorithm", DEFAULT), **tree}, where)
    return tree


def _profile(name: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """A privacy profile, without the sections that the method does not have. Raises :class:`ConfigError` where the
    method cannot have the profile; the message says what is possible."""
    algorithm = before.get("algorithm", DEFAULT)
    tree = _sections(name, algorithm)
    if centralised(method(algorithm)):
        raise ConfigError(
            f"{algorithm} is centralised: it has everybody's interactions in one place, so no privacy profile fits it; "
            f"expected a federated method, or no profile (given: {name})"
        )
    problem = _misfit(name, algorithm)
    if problem:
        fitting = [each for each in presets("profiles") if not _misfit(each, algorithm)]
        methods = [each for each, kind in METHODS.items() if not centralised(kind) and not _misfit(name, each)]
        raise ConfigError(
            f"privacy profile {name} does not fit {algorithm}: {problem}; "
            f"expected profile {_or(fitting)}, or a method that {name} fits: {', '.join(methods)}"
        )
    return tree


def _sections(profile: str, algorithm: str) -> dict[str, Any]:
    """A privacy profile, without the sections that a method does not have."""
    tree, has = tomllib.loads(preset_text(profile, "profiles")), config_type(algorithm).model_fields
    return {section: values for section, values in tree.items() if section in has or section == "privacy"}


def _misfit(profile: str, algorithm: str) -> str:
    """Why a federated method cannot have a privacy profile; empty where it can."""
    tree = _sections(profile, algorithm)
    missing = [key for key in flat(tree) if key not in keys(config_type(algorithm))]
    if missing:
        return f"the profile sets {missing[0]}, which is no option of {algorithm}"
    try:
        check({"algorithm": algorithm, **tree})
    except ConfigError as error:
        return str(error).removeprefix("configuration: ")
    return ""


def _or(names: Sequence[str]) -> str:
    """Names as ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _override(text: str) -> tuple[str, Any]:
    """The dotted key and the value of ``section.key=value``, as TOML reads the value.

    What is not a TOML value is a string, and ``off`` stands for no value.
    """
    key, equals, value = (each.strip() for each in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set {text!r} has no value; expected section.key=value, for example run.rounds=100")
    if value == "off":
        return key, None
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
