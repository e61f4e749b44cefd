"""Loading data sets: one function for files, folders and synthetic data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import polars as pl

from perfedrec.core.errors import ConfigError, DataError
from perfedrec.core.nearest import nearest
from perfedrec.data.attributes import read_attributes, read_movielens_items, read_movielens_users
from perfedrec.data.dataset import Attributes, Dataset, Encoding
from perfedrec.data.formats import check_name, parse_columns, read_with_report
from perfedrec.data.frames import IN_MEMORY, DataLike, Table, rows_with_report
from perfedrec.data.given import from_files
from perfedrec.data.interactions import Ids, Interactions, is_numbered
from perfedrec.data.layouts import Found, find
from perfedrec.data.prepare import prepare, unprepared
from perfedrec.data.readreport import ReadReport
from perfedrec.data.relations import planted, read_relations
from perfedrec.data.roles import Columns
from perfedrec.data.split import Moment, SplitRule, split_by
from perfedrec.data.synthetic import STRENGTH, how_drawn, synthetic
from perfedrec.data.write import written_report

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
    "facets": int,
    "relations": float,
}


class LoadOptions(TypedDict, total=False):
    """The options of :func:`load`, which are keyword arguments."""

    format: str
    columns: Columns | str | None
    header: bool | None
    train: str | Path | Table | None
    valid: str | Path | Table | None
    test: str | Path | Table | None
    min_rating: float | None
    k_core: int
    split_how: str | None
    order: str
    ties: str
    ratio: tuple[float, float, float] | None
    valid_from: Moment | None
    test_from: Moment | None
    folds: int | None
    fold: int
    test_users: float | None
    seed: int
    train_on_valid: bool
    attributes: bool | None
    relations: str | Path | pl.DataFrame | None


@dataclass(frozen=True)
class _Options:
    """All options of :func:`load`, with their defaults. Those of the split are its ``rule``."""

    rule: SplitRule
    format: str = "auto"
    columns: Columns | None = None
    header: bool | None = None
    train: str | Path | Table | None = None
    valid: str | Path | Table | None = None
    test: str | Path | Table | None = None
    min_rating: float | None = None
    k_core: int = 0
    attributes: bool | None = None
    relations: str | Path | pl.DataFrame | None = None

    @staticmethod
    def of(given: LoadOptions) -> _Options:
        """Check the names of options, and how a single file is split, before anything is read."""
        known = list(LoadOptions.__annotations__)
        for name in given:
            if name not in known:
                raise ConfigError(f"load() has no option {name!r}: expected {', '.join(known)}{nearest(name, known)}")
        chosen = {"how" if name == "split_how" else name: value for name, value in given.items()}
        if isinstance(chosen.get("columns"), str):
            chosen["columns"] = parse_columns(str(chosen["columns"]))
        named: dict[str, Any] = {each.name: chosen.pop(each.name) for each in fields(SplitRule) if each.name in chosen}
        others: dict[str, Any] = chosen
        return _Options(SplitRule(**named), **others)


def load(spec: DataLike | None = None, **options: Unpack[LoadOptions]) -> Dataset:
    """Load a data set: the one that ``spec`` names, or the one in the files ``train``, ``valid`` and ``test``.

    ``spec`` is one of

    - ``synthetic`` or ``synthetic:users=5000,items=7000,...``: see :func:`perfedrec.data.synthetic.synthetic`; with
      ``relations=6`` users also trust six others each, on average, mostly of their own taste;
    - a folder with train, test and perhaps valid, by these or other usual names: this split is used as it is. With a
      file ``new_users`` beside them, test is of users who are not in training, and this file has what is known of them;
    - FOLDER/u1, for the split u1.base and u1.test in a folder that holds several;
    - a folder of MovieLens, or a single file: its interactions are prepared and split;
    - interactions in memory, which are prepared and split like those of a file: a data frame of polars or pandas, a
      mapping of columns, a sparse matrix, an array (see :func:`perfedrec.data.frames.rows_of`), or
      :class:`Interactions`;
    - a data set, which is returned as it is.

    :mod:`perfedrec.data.layouts` has the names of files. Where a split has no validation part, one is taken from
    training: see :func:`perfedrec.data.given.from_files`. The folder of the data may also hold ``user_attributes.csv``
    and ``item_attributes.csv``. MovieLens 100K and 1M have attributes of their own.

    Options, all of them keyword arguments (see :class:`LoadOptions`):

    - ``format`` ("auto"), ``columns`` (None) and ``header`` (None): the format of the files, the places of their
      columns, and whether their first line names these, as in :func:`perfedrec.data.formats.read`; ``columns`` may also
      be a text such as "user=customer,item=2";
    - ``train``, ``valid``, ``test`` (None): the files of a split or data in memory, instead of ``spec``; valid
      may be missing;
    - ``min_rating`` (None): interactions with a lower rating are removed, from all parts;
    - ``k_core`` (0): users and items with fewer interactions are removed, repeatedly;
    - ``split_how`` (None), ``ratio``, ``valid_from``, ``test_from``, ``folds`` (None), ``fold`` (0), ``test_users``
      (None) and ``ties`` ("random"): how a single file is split, see :func:`perfedrec.data.split.split`;
    - ``order`` ("auto"): the order of a user's interactions for the split, "time", "file" (the order of its
      lines) or "random"; "auto" is by time where the data have timestamps, by the file where its lists are in the order
      of time, and random otherwise;
    - ``seed`` (0): the seed of what is random in a split, at least 0;
    - ``train_on_valid`` (False): train on training and validation together, as some papers do: the validation part is
      empty, and nothing can be chosen by it;
    - ``attributes`` (None): True reads attributes, and then an error in them is an error of the data; False does not
      read them; with None, attributes that cannot be read are left out, with a remark;
    - ``relations`` (None): a file or data frame of relations between users, such as trust: see
      :func:`perfedrec.data.relations.read_relations`.

    Raises :class:`DataError` for data that cannot be read, and for ``k_core`` with a split that is given. Raises
    :class:`ConfigError` for an option that does not exist.
    """
    chosen = _Options.of(options)
    data = _load(spec, chosen)
    if chosen.relations is not None:
        relations, remarks = read_relations(chosen.relations, data.train.user_ids)
        data = replace(_remarked(data, remarks), relations=relations)
    parts = (chosen.train, chosen.valid, chosen.test, chosen.relations)
    if not isinstance(spec, str | Path | None) or not all(isinstance(each, str | Path | None) for each in parts):
        return data
    return replace(data, origin=_origin(spec, {**options, "columns": chosen.columns}))


def _origin(spec: str | Path | None, options: LoadOptions) -> dict[str, Any]:
    """The arguments of :func:`load` as a configuration has them."""
    origin: dict[str, Any] = {"path": None if spec is None else str(spec), **options}
    origin.pop("attributes", None)  # whether they are used is an option of the method
    for part in ("train", "valid", "test", "relations"):
        if origin.get(part) is not None:
            origin[part] = str(origin[part])
    if (columns := origin.pop("columns", None)) is not None:
        origin["columns"] = ",".join(f"{role}={place}" for role, place in columns.items())
    if (how := origin.pop("split_how", None)) is not None:
        origin["split"] = how
    return origin


def _load(spec: DataLike | None, chosen: _Options) -> Dataset:
    files = {"train": chosen.train, "valid": chosen.valid, "test": chosen.test}
    if given := {part: Path(it) if isinstance(it, str) else it for part, it in files.items() if it is not None}:
        if spec is not None or not {"train", "test"} <= set(given):
            raise DataError(
                "the data are named twice or in part; expected either a file, a folder or synthetic:..., or train and "
                "test, and valid if there is one"
            )
        folder = given["train"].parent if isinstance(given["train"], Path) else None
        return _given(Found("", given), folder, chosen)
    if spec is None:
        raise DataError("no data are named; expected a file, a folder, synthetic:..., or train and test")

    if isinstance(spec, Dataset):
        return spec
    if not isinstance(spec, str | Path):
        if isinstance(spec, Interactions):
            return _split_whole(spec, IN_MEMORY, chosen)
        frame, report = rows_with_report(spec, chosen.columns, chosen.min_rating)
        return _split(frame, IN_MEMORY, chosen, report)
    text = str(spec)
    if text.partition(":")[0] == "synthetic":
        settings = _settings(text)
        per_user = settings.pop("relations", None)
        interactions, truth = synthetic(**settings)
        data = _remarked(_split_whole(interactions, text, chosen), how_drawn(interactions.n_users))
        data = replace(data, truth=truth.take(data.train.user_ids, data.train.item_ids))
        if per_user is None:
            return data
        assert data.truth is not None
        likeness = settings.get("strength", STRENGTH)
        return replace(data, relations=planted(data.truth.user_clusters, per_user, likeness, settings.get("seed", 0)))
    return _at(Path(spec), chosen)


def _at(path: Path, chosen: _Options) -> Dataset:
    """The data set in a file or in a folder."""
    found, folder = find(path), path if path.is_dir() else path.parent
    if found.whole is None:
        return _given(found, folder, chosen)
    frame, report = read_with_report(
        found.whole, chosen.format, chosen.columns, header=chosen.header, min_rating=chosen.min_rating
    )
    data = _split(frame, found.name, chosen, report)
    return _with_attributes(_remarked(data, found.remarks), folder, chosen.attributes)


def _split(frame: pl.DataFrame, name: str, options: _Options, read: ReadReport | None = None) -> Dataset:
    """Prepare and split the interactions of one file, which was read as ``read`` tells."""
    if options.rule.order == "file" and "position" not in frame.columns:
        frame = frame.with_row_index("position")
    try:
        frame, report = prepare(frame, min_rating=options.min_rating, k_core=options.k_core)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    data = split_by(options.rule, Interactions.from_frame(frame), name)
    notes = replace(data.notes, duplicates=report.duplicates, remarks=tuple(report.lines()))
    return replace(data, notes=replace(notes, files=tuple(read.lines()) if read else ()))


def _split_whole(interactions: Interactions, name: str, options: _Options) -> Dataset:
    """Prepare and split interactions. Where there is nothing to prepare they are not copied: they may be larger than
    the memory."""
    renumbered = not is_numbered(interactions)
    placed = options.rule.order == "file" and interactions.positions is None
    if renumbered or placed or options.min_rating is not None or options.k_core > 1:
        return _split(interactions.frame(), name, options)
    data = split_by(options.rule, interactions, name)
    return replace(data, notes=replace(data.notes, remarks=tuple(unprepared(interactions).lines())))


def _given(found: Found, folder: Path | None, options: _Options) -> Dataset:
    """The data set of a split that is given as files in a ``folder``, or in memory."""
    if options.k_core:
        raise DataError(
            f"{folder or IN_MEMORY}: users and items of a split that is given are not removed; expected k_core with a "
            "single file only"
        )
    if options.rule.how != "leave-one-out":
        raise DataError(
            f"{folder or IN_MEMORY}: is split already; expected split {options.rule.how} with a single file only"
        )
    parts = found.parts
    data = from_files(
        parts["train"],
        parts.get("valid"),
        parts["test"],
        options.format,
        options.columns,
        found.name or None,
        options.rule,
        header=options.header,
        min_rating=options.min_rating,
        new_users=parts.get("new_users"),
    )
    remarks = found.remarks
    if options.min_rating is not None:
        remarks = (f"interactions rated below {options.min_rating:g} were removed from all parts", *remarks)
    data = _remarked(data, remarks)
    if folder is None:
        return data
    data = _with_attributes(data, folder, options.attributes)
    report = written_report(folder, data) if options.min_rating is None else None
    return data if report is None else replace(data, notes=report)


def _remarked(data: Dataset, remarks: tuple[str, ...]) -> Dataset:
    return replace(data, notes=replace(data.notes, remarks=data.notes.remarks + remarks))


def _with_attributes(data: Dataset, folder: Path, wanted: bool | None) -> Dataset:
    """The data set with the attributes in its folder, and remarks about them.

    Where ``wanted`` is None, attributes that cannot be read are left out.
    """
    if wanted is False:
        return data
    found: list[Attributes | None] = []
    remarks: tuple[str, ...] = ()
    kinds: tuple[tuple[Literal["user", "item"], Ids], ...]
    kinds = ("user", data.train.user_ids), ("item", data.train.item_ids)
    for kind, ids in kinds:
        try:
            attributes, said = attributes_beside(folder, kind, ids)
        except DataError as error:
            if wanted:
                raise
            attributes, said = None, (f"the {kind} attributes are left out, because they cannot be read: {error}",)
        found.append(attributes)
        remarks += said
    return replace(_remarked(data, remarks), user_attributes=found[0], item_attributes=found[1])


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
