"""Loading data sets: one function for files, folders and synthetic data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.attributes import read_attributes, read_movielens_items, read_movielens_users
from perfedrec.data.dataset import Attributes, Dataset, Encoding
from perfedrec.data.formats import Columns, check_name, read
from perfedrec.data.frames import DataLike, rows_of
from perfedrec.data.interactions import Ids, Interactions
from perfedrec.data.prepare import prepare
from perfedrec.data.split import ORDERS, from_files, split
from perfedrec.data.synthetic import synthetic

PARTS = ("train", "valid", "test")
SUFFIXES = (".txt", ".csv", ".tsv", ".parquet", ".inter")
WHOLE = {"u.data": "ml-100k", "ratings.dat": "ml-1m", "ratings.csv": "ml-csv"}  # known files and their formats
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


class LoadOptions(TypedDict, total=False):
    """The options of :func:`load`, which are keyword arguments."""

    format: str
    columns: Columns | None
    train: str | Path | None
    valid: str | Path | None
    test: str | Path | None
    min_rating: float | None
    k_core: int
    split_how: str
    order: str
    seed: int


@dataclass(frozen=True)
class _Options:
    """All options of :func:`load`, with their defaults."""

    format: str = "auto"
    columns: Columns | None = None
    train: str | Path | None = None
    valid: str | Path | None = None
    test: str | Path | None = None
    min_rating: float | None = None
    k_core: int = 0
    split_how: str = "leave-one-out"
    order: str = "auto"
    seed: int = 0

    @staticmethod
    def of(given: LoadOptions) -> _Options:
        known = [field.name for field in fields(_Options)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"load() has no option {name!r}: expected {', '.join(known)}{hint}")
        return _Options(**given)


def load(spec: DataLike | None = None, **options: Unpack[LoadOptions]) -> Dataset:
    """Load a data set: the one that ``spec`` names, or the one in the three files ``train``, ``valid`` and ``test``.

    ``spec`` is one of

    - ``synthetic`` or ``synthetic:users=5000,items=7000,...``: see :func:`perfedrec.data.synthetic.synthetic`;
    - a folder with train, valid and test (.txt, .csv, .tsv, .parquet or .inter): this split is used as it is;
    - a folder of MovieLens, or a single file: its interactions are prepared and split;
    - interactions in memory, which are prepared and split like those of a file: a data frame of polars or pandas, a
      mapping of columns, a sparse matrix, an array (see :func:`perfedrec.data.frames.rows_of`), or
      :class:`Interactions`;
    - a data set, which is returned as it is.

    The folder of the data may also hold ``user_attributes.csv`` and ``item_attributes.csv``. MovieLens 100K and 1M have
    attributes of their own.

    Options, all of them keyword arguments (see :class:`LoadOptions`):

    - ``format`` ("auto") and ``columns`` (None): the format of the files and the places of their columns, as in
      :func:`perfedrec.data.formats.read`;
    - ``train``, ``valid``, ``test`` (None): the files of a split, instead of ``spec``;
    - ``min_rating`` (None): interactions with a lower rating are removed;
    - ``k_core`` (0): users and items with fewer interactions are removed, repeatedly;
    - ``split_how`` ("leave-one-out") or "ratio": see :func:`perfedrec.data.split.split`;
    - ``order`` ("auto"): the order of a user's interactions for the split, "time" or "random"; "auto" is by time where
      the data have timestamps, and random otherwise;
    - ``seed`` (0): the seed of a random order, at least 0.

    Raises :class:`DataError` for data that cannot be read, and for ``min_rating`` or ``k_core`` with a split that is
    given. Raises :class:`TypeError` for an option that does not exist.
    """
    chosen = _Options.of(options)
    check_name(chosen.order, ("auto", *ORDERS), "order")
    files = {"train": chosen.train, "valid": chosen.valid, "test": chosen.test}
    if given := {part: path for part, path in files.items() if path is not None}:
        if spec is not None or len(given) < 3:
            raise DataError(
                "the data are named twice or in part; expected either a file, a folder or synthetic:..., or all of "
                "train, valid and test"
            )
        return _given(given, Path(given["train"]).parent, chosen)
    if spec is None:
        raise DataError("no data are named; expected a file, a folder, synthetic:..., or train, valid and test")

    if isinstance(spec, Dataset):
        return spec
    if not isinstance(spec, str | Path):
        return _split(rows_of(spec, chosen.columns), "data in memory", chosen)
    text = str(spec)
    if text.partition(":")[0] == "synthetic":
        interactions, truth = synthetic(**_settings(text))
        data = _split(interactions.frame(), text, chosen)
        return replace(data, truth=truth.take(data.train.user_ids, data.train.item_ids))
    return _at(Path(spec), chosen)


def _at(path: Path, chosen: _Options) -> Dataset:
    """The data set in a file or in a folder."""
    if not path.is_dir():
        return _with_attributes(_split(read(path, chosen.format, chosen.columns), path.stem, chosen), path.parent)
    parts = {part: found for part in PARTS if (found := _find(path, part)) is not None}
    if parts:
        return _given(parts, path, chosen)
    file = _single_file(path)
    format = WHOLE.get(file.name, "auto") if chosen.format == "auto" else chosen.format
    return _with_attributes(_split(read(file, format, chosen.columns), path.resolve().name, chosen), path)


def _split(frame: pl.DataFrame, name: str, options: _Options) -> Dataset:
    """Prepare and split the interactions of one file."""
    frame, report = prepare(frame, min_rating=options.min_rating, k_core=options.k_core)
    order = options.order
    if order == "auto":
        order = "time" if "timestamp" in frame.columns else "random"
    data = split(Interactions.from_frame(frame), options.split_how, order, seed=options.seed, name=name)
    return replace(data, notes=replace(data.notes, duplicates=report.duplicates, remarks=tuple(report.lines())))


def _given(parts: Mapping[str, str | Path], folder: Path, options: _Options) -> Dataset:
    """The data set of a split that is given as files."""
    if missing := [part for part in PARTS if part not in parts]:
        raise DataError(f"{folder}: a split that is given needs train, valid and test; missing: {', '.join(missing)}")
    if options.min_rating is not None or options.k_core:
        raise DataError(
            f"{folder}: a split that is given is not prepared again; expected min_rating and k_core with a single file "
            "only"
        )
    data = from_files(parts["train"], parts["valid"], parts["test"], options.format, options.columns)
    return _with_attributes(data, folder)


def _find(folder: Path, part: str) -> Path | None:
    found = [folder / (part + suffix) for suffix in SUFFIXES if (folder / (part + suffix)).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: holds {' and '.join(path.name for path in found)}; expected only one of them")
    return found[0] if found else None


def _single_file(folder: Path) -> Path:
    """The only file of interactions in a folder."""
    found = [folder / name for name in WHOLE if (folder / name).is_file()] or sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise DataError(
            f"{folder}: expected train, valid and test files, one of {', '.join(WHOLE)}, or one .inter file; "
            f"found {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
        )
    return found[0]


def _with_attributes(data: Dataset, folder: Path) -> Dataset:
    """The data set with the attributes in its folder, and remarks about them."""
    users, of_users = attributes_beside(folder, "user", data.train.user_ids)
    items, of_items = attributes_beside(folder, "item", data.train.item_ids)
    notes = replace(data.notes, remarks=data.notes.remarks + of_users + of_items)
    return replace(data, notes=notes, user_attributes=users, item_attributes=items)


def attributes_beside(
    folder: Path, kind: Literal["user", "item"], ids: Ids, encoding: Encoding | None = None
) -> tuple[Attributes | None, tuple[str, ...]]:
    """The attributes of the users or items ``ids`` [n] that a folder holds, and remarks; ``None`` where it holds none.

    ``kind`` says which, and ``encoding`` how the attributes become numbers: see
    :func:`perfedrec.data.attributes.read_attributes`.
    """
    movielens, reader = MOVIELENS[kind]
    if (folder / f"{kind}_attributes.csv").is_file():
        return read_attributes(folder / f"{kind}_attributes.csv", ids, kind, encoding)
    if any((folder / name).is_file() for name in movielens):
        return reader(folder, ids, encoding)
    return None, ()


def _settings(spec: str) -> dict[str, Any]:
    """The arguments of :func:`synthetic` in a specification ``synthetic:key=value,...``."""
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
