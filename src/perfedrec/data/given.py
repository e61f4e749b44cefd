"""Making a data set of files that are split already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Dataset, Rows, assemble
from perfedrec.data.detection import detect
from perfedrec.data.formats import read_with_report
from perfedrec.data.frames import IN_MEMORY, Table, rows_with_report
from perfedrec.data.interactions import Ids, Interactions, encode, unique_ids
from perfedrec.data.prepare import rated
from perfedrec.data.readreport import of_parts
from perfedrec.data.roles import Columns
from perfedrec.data.split import SplitRule, validation_rows


class Reading(TypedDict, total=False):
    """Options of :func:`from_files` that say how files are read, and are keyword arguments."""

    header: bool | None
    min_rating: float | None


TAKEN = SplitRule()
"""How validation is taken from training where nothing else is said."""


def from_files(
    train: str | Path | Table,
    valid: str | Path | Table | None,
    test: str | Path | Table,
    format: str = "auto",
    columns: Columns | None = None,
    name: str | None = None,
    rule: SplitRule = TAKEN,
    *,
    new_users: str | Path | Table | None = None,
    **reading: Unpack[Reading],
) -> Dataset:
    """Make a data set of the files of a split, or of data in memory, without what is rated below ``min_rating``.

    ``reading`` has ``min_rating`` and ``header``. ``format``, ``columns`` and ``header`` are those of
    :func:`perfedrec.data.formats.read`, which also raises. With format "auto", if the training file is detected as
    triples or as lists of items, the others are read as the same format. ``name`` is the name of the data set (default:
    the name of the folder of the training file). ``new_users`` are the known interactions of users who are held
    out from training; then the test file is of these users.

    Without a ``valid`` file, interactions of the training file become validation, see
    :func:`perfedrec.data.split.validation_rows`. The order of the ``rule`` says which: each user's last one ("time"
    or "file"), or a random one ("random"). With "auto" it is done as the test part was
    made: by time if no test interaction is earlier than the training interactions of its user, by the file where there
    are no times and its lists are in the order of time, at random otherwise. With "file", the lines of each file are
    in the order of time. With the ties "together", all interactions at the last time are taken. The rule's seed decides
    what is random. With its ``train_on_valid``, a validation file is a part of training, and nothing validates. The
    rule's other options are not used.
    """
    parts = [Path(it) if isinstance(it, str) else it for it in (train, valid, test, new_users) if it is not None]
    found = detect(parts[0]) if format == "auto" and isinstance(parts[0], Path) else None
    if found in ("triples", "adjacency", "sequences"):  # in small files, as held-out ones, they are hard to tell
        format = found
    min_rating = reading.get("min_rating")
    files = [
        read_with_report(each, format, columns, held_out=i > 0, guessed=found == "sequences", **reading)
        if isinstance(each, Path)
        else rows_with_report(each, columns, min_rating)
        for i, each in enumerate(parts)
    ]
    names = [str(each) if isinstance(each, Path) else "data frame" for each in parts]
    frames = [_placed(rated(frame, min_rating, f"{at}: "), rule) for at, (frame, _) in zip(names, files, strict=True)]
    for column in ("user", "item"):
        kinds = {frame[column].dtype for frame in frames if frame.height} or {pl.Int64()}
        kind = kinds.pop() if len(kinds) == 1 else pl.String()  # integers in one part, names in another: names in all
        frames = [frame.with_columns(pl.col(column).cast(kind)) for frame in frames]
    user_ids = unique_ids(pl.concat([frame["user"] for frame in frames]))
    item_ids = unique_ids(pl.concat([frame["item"] for frame in frames]))
    rows = [
        Rows(
            encode(frame["user"], user_ids),
            encode(frame["item"], item_ids),
            *(frame[name].to_numpy() if name in frame.columns else None for name in ("timestamp", "position")),
        )
        for frame in frames
    ]
    name = name or (parts[0].resolve().parent.name if isinstance(parts[0], Path) else IN_MEMORY)
    data = _assembled(name, user_ids, item_ids, rows, rule, has_valid=valid is not None)
    return replace(data, notes=replace(data.notes, files=of_parts([report for _, report in files])))


def _placed(frame: pl.DataFrame, rule: SplitRule) -> pl.DataFrame:
    """The frame with the number of each row as its position, if it has none and the ``rule`` orders rows so."""
    if rule.order != "file" or "position" in frame.columns:
        return frame
    return frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("position"))


def _assembled(
    name: str, user_ids: Ids, item_ids: Ids, rows: Sequence[Rows], rule: SplitRule, *, has_valid: bool
) -> Dataset:
    """The data set of the ``rows`` of all parts, of which validation may be missing."""
    if rule.train_on_valid:
        return _without_validation(name, user_ids, item_ids, rows, has_valid)
    if has_valid:
        return assemble(name, user_ids, item_ids, rows, "as given in files")
    return _with_validation(name, user_ids, item_ids, rows, rule)


def _without_validation(name: str, user_ids: Ids, item_ids: Ids, rows: Sequence[Rows], has_valid: bool) -> Dataset:
    """The data set in which the validation ``rows``, where there are any, are training rows."""
    train, *others = rows
    nothing = train.take(np.arange(0))
    valid, *held = others if has_valid else [nothing, *others]
    later = valid
    if train.positions is not None and valid.positions is not None:  # the second file goes on where the first one ends
        later = valid._replace(positions=valid.positions + int(train.positions.max(initial=-1)) + 1)
    both = train.with_rows(later)
    how = "as given in files" if has_valid else "training and test as given in files"
    data = assemble(name, user_ids, item_ids, [both, nothing, *held], how)
    return replace(data, notes=replace(data.notes, trained_on_valid=valid.users.size))


def _with_validation(name: str, user_ids: Ids, item_ids: Ids, rows: Sequence[Rows], rule: SplitRule) -> Dataset:
    """The data set of training and test ``rows``, with validation taken from training."""
    train, test, *new = rows
    whole = Interactions.from_rows(user_ids, item_ids, *train)  # each pair once
    users, items, times = whole.users_of_rows(), whole.items, whole.timestamps
    known = Interactions.from_rows(user_ids, item_ids, *new[0]) if new else whole
    by_time = rule.by_time(times is not None) and (rule.order == "time" or _is_last(known, test))
    if rule.ties == "together" and not by_time:
        raise DataError(
            f"{name}: the test interactions are not the last ones by time, so validation is random too; expected "
            "order time, or no ties together"
        )
    by_file = rule.by_file(times is not None, whole.positions is not None)
    along = times if by_time else whole.from_last() if by_file else None
    chosen, ties = validation_rows(users, items, along, rule.seed, rule.ties == "together")
    every = Rows(users, items, times, whole.positions)
    parts = [every.take(mask) for mask in (~chosen, chosen)]
    taken = "the last interaction by time" if by_time else f"one random interaction (seed {rule.seed})"
    taken = "the last interaction in the file" if by_file else taken
    taken = "all interactions at the last time" if rule.ties == "together" else taken
    how = f"training and test as given in files; validation: {taken} of each user who has two or more in training"
    data = assemble(name, user_ids, item_ids, [*parts, test, *new], how)
    repeated = data.notes.duplicates + train.users.size - whole.n_interactions
    return replace(data, notes=replace(data.notes, duplicates=repeated, ties=ties, drawn=along is None))


def _is_last(train: Interactions, test: Rows) -> bool:
    """Whether no test interaction is earlier than a training interaction of its user."""
    if test.timestamps is None or train.timestamps is None:
        return False
    latest = np.full(train.n_users, np.iinfo(np.int64).min)
    np.maximum.at(latest, train.users_of_rows(), train.timestamps)
    return bool((test.timestamps >= latest[test.users]).all())
