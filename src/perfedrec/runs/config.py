"""The configuration of a run: typed sections, TOML files, presets, overrides and ablations."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard, cast, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from perfedrec.core.errors import ConfigError, reason
from perfedrec.core.settings import Settings
from perfedrec.methods.registry import centralised, method, name_of
from perfedrec.privacy.ledger import split_budget
from perfedrec.privacy.settings import NoiseSettings

DEFAULT = "perfedrec_pp"

ABLATIONS: dict[str, dict[str, Any]] = {
    "pretraining": {"pretraining.kind": "none", "personal.pretrained": 0.0},
    "node-dropout": {"pretraining.node_dropout": 0.0},
    "edge-perturbation": {"pretraining.edge_perturbation": False},
    "view-noise": {"pretraining.noise": 0.0},
    "clusters": {"clusters.n_clusters": 0},
    "proportional-selection": {"clusters.proportional": False},
    "neighbours": {"model.neighbours": False},
    "propagation": {"model.n_layers": 0},
    "personal": {"personal.local": 0.0, "personal.cluster": 0.0, "personal.global": 1.0, "personal.pretrained": 0.0},
    "privacy": {
        "privacy.aggregation": "sparse",
        "privacy.norm": "coordinate",
        "privacy.clip": None,
        "privacy.noise_scale": 0.0,
        "privacy.noise": {},
        "privacy.epsilon": None,
        "privacy.pseudo_items": 0.0,
        "privacy.masking": 0.0,
        "privacy.randomised_response": None,
    },
    "averaging": {"server.averaging": 0.0},
    "server-optimizer": {"server.optimizer": "fedavg", "server.learning_rate": 1.0},
}
"""What switches each part of the method off: ``perfedrec train --without PART``."""


_FREE = {"data.path", "data.train", "data.valid", "data.test"}  # a fingerprint tells whether data are the same
_FREE |= {"run.threads", "run.block_size", "run.device", "run.checkpoint_every"}  # change no result


METRIC = "^(recall|ndcg|hr|mrr|precision)@(10|20)$"
"""Names of metrics that a run can be selected, or compared, by."""


class DataSettings(Settings):
    """Where the interactions come from and how they are prepared and split."""

    path: str = Field("synthetic:users=2000,items=1500", description="file, folder, or synthetic:users=..,items=..")
    format: str = Field("auto", description="format of the files; auto: detected from their content")
    columns: str = Field("", description="where columns are: user=customer,item=2 (names, or positions from 1)")
    train: str | None = Field(None, description="training file of a given split")
    valid: str | None = Field(None, description="validation file of a given split")
    test: str | None = Field(None, description="test file of a given split")
    min_rating: float | None = Field(None, description="ratings below this are no interaction")
    k_core: int = Field(0, ge=0, description="drop users and items with fewer interactions, repeatedly")
    split: Literal["leave-one-out", "ratio"] = Field("leave-one-out", description="how a single file is split")
    order: Literal["auto", "time", "random"] = Field("auto", description="what is held out: the last, or at random")
    seed: int = Field(0, ge=0, description="seed of a random split")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = [part for part in (self.train, self.valid, self.test) if part is not None]
        if given and len(given) < 3:
            raise ValueError("a given split needs all three of train, valid and test")
        return self


class RunSettings(Settings):
    """How long a run takes and where it computes."""

    rounds: int = Field(500, ge=0, description="rounds of training, after the rounds of pre-training")
    patience: int = Field(
        0, ge=0, description="rounds of training without a better validation figure that end a run early (0: never)"
    )
    seed: int = Field(0, ge=0, description="seed of everything random in training")
    evaluate_every: int = Field(10, ge=1, description="rounds between two evaluations on validation data")
    select_by: str = Field(
        "recall@20",
        description="validation metric that selects the best round",
        pattern=METRIC,
    )
    checkpoint_every: int = Field(50, ge=1, description="rounds between two checkpoints")
    sampled_negatives: int = Field(
        0, ge=0, description="also test each held-out item among so many random negatives, as some papers do (0: no)"
    )
    dropout_rate: float = Field(0.0, ge=0, le=1, description="share of a cohort that drops out of a round")
    users_per_node: int = Field(
        1, ge=1, description="users on each node, where bytes are counted as nodes send them; changes nothing else"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where tensors live")
    block_size: int = Field(1024, ge=1, description="clients computed at once; bounds memory, changes no result")
    threads: int = Field(
        0, ge=0, description="threads of the numerical library (0: its default; 1 for a coordinator); changes no result"
    )


class Config(Settings):
    """All of a run: the method, the data and the run itself. A method adds sections of its own: see
    :func:`config_type`."""

    algorithm: str = Field(DEFAULT, description="the method: a name, or file.py:Class")
    data: DataSettings = DataSettings()
    run: RunSettings = RunSettings()

    @property
    def settings(self) -> Settings:
        """The options of the method."""
        kind = method(self.algorithm).Options
        if _sectioned(kind):
            return cast(Settings, kind(**{name: getattr(self, name) for name in kind.model_fields}))
        return cast(Settings, self.method)  # type: ignore[attr-defined]

    @property
    def attributes(self) -> bool:
        """Whether the method is to use attributes of users and items."""
        return bool(getattr(getattr(self.settings, "model", None), "attributes", False))

    @model_validator(mode="after")
    def _feasible(self) -> Self:
        kind = method(self.algorithm)
        if centralised(kind):
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
                "would be given up"
            )
        return self

    def build(self) -> Any:
        """The algorithm that this configuration describes, with noise solved where an epsilon is asked for."""
        kind, settings = method(self.algorithm), self.settings
        algorithm = kind(settings)
        if centralised(kind) or settings.privacy.epsilon is None:  # type: ignore[attr-defined]
            return algorithm
        privacy, selection = settings.privacy, settings.selection  # type: ignore[attr-defined]
        # For as many participations as the cap allows: a run that is resumed may become longer.
        releases = algorithm.releases(selection.max_participations or 0 if self.run.rounds else 0, n_users=1)
        noise = split_budget(privacy.epsilon, privacy.delta, {each.name: each.participations for each in releases})
        solved = privacy.model_copy(update={"noise": NoiseSettings(**noise)})
        return kind(settings.model_copy(update={"privacy": solved}))

    def to_toml(self) -> str:
        """The whole configuration as TOML; an absent key is an option that is off."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))


@cache
def config_type(algorithm: str) -> type[Config]:
    """The configuration of a method: :class:`Config` and the method's sections.

    Options that are grouped in sections are sections of the configuration; those that are not form a section
    ``[method]``.
    """
    kind = method(algorithm).Options
    default = (str, Field(algorithm, description=Config.model_fields["algorithm"].description))
    if _sectioned(kind):
        return create_model("Config", __base__=(Config, kind), algorithm=default)
    return create_model("Config", __base__=Config, algorithm=default, method=(kind, kind()))


def config_of(algorithm: Any, run: RunSettings) -> Config:
    """The configuration of an algorithm that was built without one."""
    options = type(algorithm).Options
    kind, settings = config_type(name_of(algorithm)), getattr(algorithm, "options", algorithm.settings)
    if _sectioned(options):
        sections = {name: getattr(settings, name) for name in options.model_fields}
        return kind(algorithm=name_of(algorithm), run=run, **sections)
    return kind(algorithm=name_of(algorithm), run=run, **{"method": settings})


def _sectioned(kind: type[BaseModel]) -> bool:
    annotations = [field.annotation for field in kind.model_fields.values()]
    return bool(annotations) and all(isinstance(each, type) and issubclass(each, BaseModel) for each in annotations)


def presets(kind: str = "presets") -> list[str]:
    """Names of the presets, or with ``kind`` "profiles" of the privacy profiles, that ship with the package."""
    folder = resources.files("perfedrec.runs") / kind
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def default_preset(algorithm: str | None) -> str | None:
    """The preset that a run of a method starts from: the one of its name; its plain defaults where there is none."""
    if algorithm is None or algorithm == DEFAULT:
        return "recommended"
    return algorithm if algorithm in presets() else None


def preset_text(name: str, kind: str = "presets") -> str:
    """The TOML text of a preset or profile."""
    known = presets(kind)
    if name not in known:
        what = "preset" if kind == "presets" else "privacy profile"
        raise ConfigError(f"there is no {what} {name!r}{nearest(name, known)}; expected one of: {', '.join(known)}")
    return (resources.files("perfedrec.runs") / kind / f"{name}.toml").read_text(encoding="utf-8")


def load(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    without: Iterable[str] = (),
    *,
    privacy: str | None = None,
    **values: Any,
) -> Config:
    """A configuration from a preset, a privacy profile, a TOML file, ablations, ``section.key=value`` overrides and
    dotted ``values``.

    Later sources win in this order, and a ``data__path`` takes the place of a split that is given in files. Raises
    :class:`ConfigError` with one line per mistake; an unknown key is answered with the nearest valid one.
    """
    tree: dict[str, Any] = {} if values.get("algorithm") is None else {"algorithm": values["algorithm"]}
    if preset is not None:
        _merge(tree, _parse(preset_text(preset), f"preset {preset}", tree))
    if privacy is not None:
        tree.pop("privacy", None)  # a profile is the whole of the protection
        _merge(tree, _profile(privacy, tree))
    if file is not None:
        try:
            _merge(tree, _parse(file.read_text(encoding="utf-8"), str(file), tree))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read ({reason(error)}); expected a TOML file") from None
    for part in without:
        if part not in ABLATIONS:
            raise ConfigError(
                f"there is no part {part!r} to switch off{nearest(part, ABLATIONS)}; "
                f"expected one of: {', '.join(ABLATIONS)}"
            )
        for key, value in ABLATIONS[part].items():
            put(tree, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {override!r} has no value; expected section.key=value, for example run.rounds=100"
            )
        put(tree, key.strip(), _value(text.strip()))
    if values.get("data__path") is not None:
        for part in ("train", "valid", "test"):
            put(tree, f"data.{part}", None)
    for key, value in values.items():
        if value is not None:
            put(tree, key.replace("__", "."), value)
    return check(tree)


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    without: Iterable[str] = (),
    *,
    privacy: str | None = None,
    algorithm: str | None = None,
    **values: Any,
) -> Config:
    """:func:`load`, starting from the method's own preset where none is named: what ``perfedrec train`` runs."""
    named = in_file(file).get("algorithm")
    preset = preset or default_preset(algorithm or (named if isinstance(named, str) else None))
    return load(preset, file, overrides, without, privacy=privacy, algorithm=algorithm, **values)


def in_file(file: Path | None) -> dict[str, Any]:
    """What a TOML file says by itself; what is wrong with it is said when it is loaded."""
    try:
        return {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def check(tree: Mapping[str, Any], where: str = "") -> Config:
    """Validate a tree of sections, or raise :class:`ConfigError` naming each key that is wrong."""
    prefix = f"{where}: " if where else ""
    kind = _type_of(tree, prefix)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(prefix + explain(error.errors(), kind)) from None


def _check_part(tree: Mapping[str, Any], where: str) -> None:
    """:func:`check` of one of several sources; what options say together is a matter of all of them together."""
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
    """What tells two configurations apart, as ``key is 2, was 1``; where data lie and who computes is left out.

    Of two methods that they are two is enough: one has not the options of the other.
    """
    if before.algorithm != after.algorithm:
        return [f"algorithm is {after.algorithm}, was {before.algorithm}"]
    old, new = (flat(each.model_dump(mode="json", by_alias=True)) for each in (before, after))
    return [
        f"{key} is {new.get(key)}, was {old.get(key)}"
        for key in {**new, **old}
        if key not in _FREE and old.get(key) != new.get(key)
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a tree of sections with their values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a configuration with its field, for help texts and for finding the nearest name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        label = prefix + (field.alias or name)
        if _record(field.annotation):
            found |= keys(field.annotation, label + ".")
        else:
            found[label] = field
    return found


def _parse(text: str, where: str, before: Mapping[str, Any]) -> dict[str, Any]:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None
    _check_part({"algorithm": before.get("algorithm", DEFAULT), **tree}, where)
    return tree


def _profile(name: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """A privacy profile, without the sections that the method does not have."""
    algorithm = before.get("algorithm", DEFAULT)
    tree, has = tomllib.loads(preset_text(name, "profiles")), config_type(algorithm).model_fields
    tree = {section: values for section, values in tree.items() if section in has or section == "privacy"}
    check({"algorithm": algorithm, **tree}, f"privacy profile {name} with {algorithm}")
    return tree


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted key in a tree of sections."""
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted} is not a key: {section} has a value, not a section")
    tree[key] = value


def _value(text: str) -> Any:
    """A value as TOML would read it; what is no TOML value is a string, and ``off`` stands for no value at all."""
    if text == "off":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "{pattern}",
    "too_short": "at least {min_length} of them",
    "tuple": "a list",
    "dict": "a section",
    "model": "a section",
    "path": "a path",
    "missing": "a value, and there is none",
}
"""What is expected where pydantic finds a mistake, by the type of the mistake or the first word of it."""

_KINDS = {"int", "float", "bool", "str"}  # which pydantic appends to the key where an option may be of several


def explain(errors: Iterable[Any], kind: type[BaseModel]) -> str:
    """What pydantic finds wrong in the sections of a ``kind``, in one line: each option with its value and what
    was expected, or with the nearest key where there is none of its name."""
    told: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for entry in errors:
        loc = entry["loc"][:-1] if len(entry["loc"]) > 1 and entry["loc"][-1] in _KINDS else entry["loc"]
        dotted = ".".join(str(part) for part in loc)
        whole = entry["type"] == "missing" or (entry["type"] == "value_error" and isinstance(entry["input"], dict))
        values[dotted] = "" if whole else f" (given: {_shown(entry['input'])})"
        if entry["type"] == "extra_forbidden":
            place, prefix = _place(kind, loc)
            section = isinstance(entry["input"], dict)
            hint = nearest(dotted.removeprefix(prefix), place.model_fields if section else keys(place), prefix)
            told[f"there is no {'section' if section else 'option'} {dotted}{hint}"] = []
            continue
        wanted = _WANTED.get(entry["type"]) or _WANTED.get(entry["type"].partition("_")[0])
        if wanted is not None:
            wanted = "expected " + wanted.format(**entry.get("ctx", {})).replace("'", "").strip("^$")
        said = told.setdefault(dotted, [])
        said.append(wanted or entry["msg"].removeprefix("Value error, "))
    return "; ".join(
        f"{key or 'configuration'}: {_joined(said)}{values[key]}" if said else key for key, said in told.items()
    )


def _joined(said: list[str]) -> str:
    """What an option may be, where it may be of several kinds: a whole number is a number."""
    if "expected a number" in said and "expected a whole number" in said:
        said = [each for each in said if each != "expected a whole number"]
    return " or ".join([said[0], *(each.removeprefix("expected ") for each in dict.fromkeys(said[1:]))])


def _shown(value: Any) -> str:
    """A value as a person writes it."""
    if value is None or isinstance(value, bool):
        return "off" if value is None else str(value).lower()
    return "a section" if isinstance(value, dict) else repr(value)


def _record(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _place(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """Where the names that a key may have are looked for, with the dotted way there: among all of a configuration's,
    but in an entry of a table with free names, or in a section that may be absent, among those of that one."""
    place, prefix, here, parts = kind, "", kind, list(loc[:-1])
    while parts:
        fields: dict[str, Any] = {field.alias or name: field.annotation for name, field in here.model_fields.items()}
        annotation, taken = fields.get(str(parts[0])), 1
        if not _record(annotation):
            taken = 2 if get_origin(annotation) is dict else 1
            annotation = next((each for each in get_args(annotation) if _record(each)), None)
            if annotation is None:
                break
            depth = len(loc) - 1 - len(parts) + taken
            place, prefix = annotation, ".".join(map(str, loc[:depth])) + "."
        here, parts = annotation, parts[taken:]
    return place, prefix


def nearest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """``; did you mean ...?`` with the nearest name, by the whole dotted key and by its last part; ``prefix`` is
    written before it."""
    names = list(candidates)
    last = {candidate.rsplit(".", 1)[-1]: candidate for candidate in names}
    match = get_close_matches(name, names, 1, 0.6) or [
        last[near] for near in get_close_matches(name.rsplit(".", 1)[-1], last, 1, 0.5)
    ]
    return f"; did you mean {prefix}{match[0]}?" if match else ""
