"""One entrance to all data: a specification becomes a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.attributes import read_attributes, read_movielens_items, read_movielens_users
from perfedrec.data.dataset import Attributes, Dataset, Encoding
from perfedrec.data.formats import Columns, check_name, read
from perfedrec.data.interactions import Ids, Interactions
from perfedrec.data.prepare import prepare
from perfedrec.data.split import ORDERS, from_files, split
from perfedrec.data.synthetic import synthetic

PARTS = ("train", "valid", "test")
SUFFIXES = (".txt", ".csv", ".tsv", ".parquet", ".inter")
WHOLE = {"u.data": "ml-100k", "ratings.dat": "ml-1m", "ratings.csv": "ml-csv"}  # file: format
MOVIELENS = {
    "user": (("u.user", "users.dat"), read_movielens_users),
    "item": (("u.item", "movies.dat"), read_movielens_items),
}
SYNTHETIC: dict[str, type[int] | type[float]] = {
    "users": int,
    "items": int,
    "clusters": int,
    "interactions_per_user": float,
    "seed": int,
    "strength": float,
}


def load(
    spec: str | Path | None = None,
    *,
    format: str = "auto",
    columns: Columns | None = None,
    train: str | Path | None = None,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    min_rating: float | None = None,
    k_core: int = 0,
    split_how: str = "leave-one-out",
    order: str = "auto",
    seed: int = 0,
) -> Dataset:
    """The data set that ``spec`` names, or that ``train``, ``valid`` and ``test`` hold.

    ``spec`` is one of

    - ``synthetic`` or ``synthetic:users=5000,items=7000,...``: see :func:`perfedrec.data.synthetic.synthetic`;
    - a folder with train, valid and test (.txt, .csv, .tsv, .parquet or .inter), which is taken as it is;
    - a folder of MovieLens, or a single file, which is prepared (``min_rating``, ``k_core``) and split (``split_how``,
      ``order``, ``seed``). Order "auto" is by time where there are timestamps and random elsewhere.

    Beside the data may lie ``user_attributes.csv`` and ``item_attributes.csv``; MovieLens 100K and 1M have their own.
    ``format`` and ``columns`` are those of :func:`perfedrec.data.formats.read`.
    Raises :class:`DataError`, also for ``min_rating`` or ``k_core`` on a split that is given.
    """
    check_name(order, ("auto", *ORDERS), "order")
    if given := {name: path for name, path in zip(PARTS, (train, valid, test), strict=True) if path is not None}:
        if spec is not None or len(given) < 3:
            raise DataError("say either where the data are, or all of train, valid and test")
        return _given(given, Path(given["train"]).parent, format, columns, min_rating, k_core)
    if spec is None:
        raise DataError("no data: name a file, a folder, synthetic:..., or train, valid and test")

    text = str(spec)
    if text.partition(":")[0] == "synthetic":
        interactions, truth = synthetic(**_settings(text))
        data = _split(interactions.frame(), text, min_rating, k_core, split_how, order, seed)
        return replace(data, truth=truth.take(data.train.user_ids, data.train.item_ids))
    path = Path(spec)
    if not path.is_dir():
        data = _split(read(path, format, columns), path.stem, min_rating, k_core, split_how, order, seed)
        return _with_attributes(data, path.parent)
    parts = {part: found for part in PARTS if (found := _find(path, part)) is not None}
    if parts:
        return _given(parts, path, format, columns, min_rating, k_core)
    whole = _whole(path)
    chosen = WHOLE.get(whole.name, "auto") if format == "auto" else format
    name = path.resolve().name
    data = _split(read(whole, chosen, columns), name, min_rating, k_core, split_how, order, seed)
    return _with_attributes(data, path)


def _split(
    frame: pl.DataFrame, name: str, min_rating: float | None, k_core: int, how: str, order: str, seed: int
) -> Dataset:
    frame, report = prepare(frame, min_rating=min_rating, k_core=k_core)
    if order == "auto":
        order = "time" if "timestamp" in frame.columns else "random"
    data = split(Interactions.from_frame(frame), how, order, seed=seed, name=name)
    return replace(data, notes=replace(data.notes, duplicates=report.duplicates, remarks=tuple(report.lines())))


def _given(
    parts: Mapping[str, str | Path],
    folder: Path,
    format: str,
    columns: Columns | None,
    min_rating: float | None,
    k_core: int,
) -> Dataset:
    if missing := [part for part in PARTS if part not in parts]:
        raise DataError(f"{folder}: a split that is given needs train, valid and test; missing: {', '.join(missing)}")
    if min_rating is not None or k_core:
        raise DataError(f"{folder}: a split that is given is taken as it is; min_rating and k_core need a single file")
    data = from_files(parts["train"], parts["valid"], parts["test"], format, columns)
    return _with_attributes(data, folder)


def _find(folder: Path, part: str) -> Path | None:
    found = [folder / (part + suffix) for suffix in SUFFIXES if (folder / (part + suffix)).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: holds {' and '.join(path.name for path in found)}; expected one of them")
    return found[0] if found else None


def _whole(folder: Path) -> Path:
    """The one file of interactions in a folder."""
    found = [folder / name for name in WHOLE if (folder / name).is_file()] or sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise DataError(
            f"{folder}: expected train, valid and test files, one of {', '.join(WHOLE)}, or one .inter file; "
            f"found {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
        )
    return found[0]


def _with_attributes(data: Dataset, folder: Path) -> Dataset:
    """The data set with the attributes that lie beside it, and remarks on them."""
    users, of_users = attributes_beside(folder, "user", data.train.user_ids)
    items, of_items = attributes_beside(folder, "item", data.train.item_ids)
    notes = replace(data.notes, remarks=data.notes.remarks + of_users + of_items)
    return replace(data, notes=notes, user_attributes=users, item_attributes=items)


def attributes_beside(
    folder: Path, kind: Literal["user", "item"], ids: Ids, encoding: Encoding | None = None
) -> tuple[Attributes | None, tuple[str, ...]]:
    """The attributes of ``ids`` [n], users or items, that lie in a folder (``None`` where there are none), and
    remarks; as in :func:`perfedrec.data.attributes.read_attributes`."""
    movielens, reader = MOVIELENS[kind]
    if (folder / f"{kind}_attributes.csv").is_file():
        return read_attributes(folder / f"{kind}_attributes.csv", ids, kind, encoding)
    if any((folder / name).is_file() for name in movielens):
        return reader(folder, ids, encoding)
    return None, ()


def _settings(spec: str) -> dict[str, Any]:
    """The keyword arguments that ``synthetic:key=value,...`` stands for."""
    chosen: dict[str, Any] = {}
    for setting in filter(None, spec.partition(":")[2].split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        check_name(key, tuple(SYNTHETIC), "setting of synthetic data")
        try:
            chosen[key] = SYNTHETIC[key](value)
        except ValueError:
            kind = "an integer" if SYNTHETIC[key] is int else "a number"
            raise DataError(f"synthetic data: {key} must be {kind}, got {value!r}") from None
    return chosen
