"""What a call of :func:`perfedrec.train` asks for: a method with its configuration, and a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from perfedrec.core.dotted import keys, merge, put
from perfedrec.core.errors import ConfigError
from perfedrec.core.nearest import nearest
from perfedrec.data import DataLike, Dataset
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.registry import AnyMethod
from perfedrec.runs.config import (
    MEMORY,
    Config,
    RunSettings,
    check,
    config_of,
    config_type,
    open_data,
    resolve,
    settings_of,
)
from perfedrec.runs.data_settings import moved_to

SOURCES = ("preset", "file", "overrides", "without", "privacy")
"""Keywords beside options where a method is named: the arguments of :func:`perfedrec.configure`."""


def method_of(
    method: str | Config | AnyMethod, run: RunSettings | None, config: Config | None, options: Mapping[str, Any]
) -> tuple[AnyMethod, Config]:
    """The method and its configuration. The arguments are those of :func:`perfedrec.train`.

    Raises :class:`ConfigError` for what is no method, and for an option that does not exist or cannot be used.
    """
    if not isinstance(method, str | Config) and not hasattr(method, "Options"):
        raise ConfigError(
            f"train() was given {type(method).__name__} as its method; expected first the method (a name, a "
            'configuration or a method object), then the data: train("mf", data)'
        )
    values = {f"run__{name}" if name in RunSettings.model_fields else name: each for name, each in options.items()}
    if isinstance(method, str):
        check_keywords(options, config_type(method), SOURCES)
        named = _changed(resolve(algorithm=method, **values), run, {})
        return named.build(), named
    if isinstance(method, Config):
        check_keywords(options, type(method))
        changed = _changed(method, run, values)
        return changed.build(), changed
    if strange := sorted(name for name in values if not name.startswith("run__")):
        raise ConfigError(
            f"{', '.join(strange)}: the options of a method cannot change after it was made; expected them where it is "
            "made, or the name of the method instead of it"
        )
    fitted_at_once = isinstance(method, Method) and not method.trained
    first = RunSettings(rounds=0) if fitted_at_once else RunSettings()
    return method, _changed(config or config_of(method, first), run, values)


def check_keywords(names: Iterable[str], kind: type[BaseModel], others: Sequence[str] = ()) -> None:
    """Raise :class:`ConfigError` for a keyword of Python, as ``data__min_rating``, that names no option of ``kind`` and
    is none of the ``others``. The message names the nearest keyword. Options of the section ``run`` need no section.
    """
    known = [each.removeprefix("run.") for each in keys(kind) if each != "algorithm"]
    tops = {name for each in keys(kind) for name in _ways(each)}
    for name in names:
        dotted = name.replace("__", ".").removeprefix("run.")
        if name in others or dotted in (*known, *tops) or any(way in known for way in _ways(dotted)):
            continue
        hint = nearest(dotted, [*known, *others]).replace(".", "__")
        hint = hint or "; perfedrec config keys lists all, with __ instead of the dot"
        raise ConfigError(f"there is no option {name}{hint}")


def _ways(dotted: str) -> list[str]:
    """The sections that a dotted key is in, from the outermost: ``a`` and ``a.b`` for ``a.b.c``."""
    parts = dotted.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _changed(config: Config, run: RunSettings | None, values: Mapping[str, Any]) -> Config:
    """The configuration with what is set in ``run``, and with ``values`` by key."""
    if run is None and not values:
        return config
    tree = config.model_dump(by_alias=True)
    if run is not None:
        merge(tree, {"run": run.model_dump(exclude_unset=True)})
    for key, value in values.items():
        put(tree, key.replace("__", "."), value)
    return check(tree)


def data_of(data: DataLike | None, config: Config) -> tuple[Dataset, Config]:
    """The data set, and the configuration that says where it comes from.

    ``None`` stands for the data that ``config`` names. Data in memory are prepared and split as ``config`` says.
    """
    if isinstance(data, Dataset):
        if config.data.forgotten and not data.forgotten:
            data = data.without_users(config.data.forgotten)
        return data, config.model_copy(update={"data": settings_of(data)})
    if data is None:
        return open_data(config.data, config.attributes), config
    named = str(data) if isinstance(data, str | Path) else MEMORY
    moved = moved_to(config.data, named)
    config = config.model_copy(update={"data": moved})
    return open_data(moved, config.attributes, given=data if named == MEMORY else None), config
