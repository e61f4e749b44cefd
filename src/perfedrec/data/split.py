"""Making a data set of interactions: by a split, or from three files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Dataset, Rows, assemble
from perfedrec.data.detection import detect
from perfedrec.data.formats import Columns, check_name, read
from perfedrec.data.interactions import Interactions, encode, ordering, unique_ids

SPLITS = ("leave-one-out", "ratio")
ORDERS = ("time", "random")
FEWEST = 3  # one interaction for each part


def split(
    interactions: Interactions,
    how: str = "leave-one-out",
    order: str = "time",
    ratio: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    name: str = "data",
) -> Dataset:
    """Split the interactions of each user into training, validation and test.

    The interactions of a user are first put in ``order``: by "time", or "random". Interactions of the same second are
    in random order, so that ids have no influence. Then, with ``how`` "leave-one-out", the last one is for testing and
    the one before for validation. With "ratio", the first ``ratio[0]`` of them are for training and the last
    ``ratio[2]`` for testing; the limits between the parts are rounded. Users with fewer than 3 interactions stay in
    training and are counted in the ``notes`` of the data set. ``seed`` (at least 0) decides the random order, and
    ``name`` is the name of the data set.

    Raises :class:`DataError` for an unknown ``how`` or ``order``, a ``ratio`` that does not add up to 1, a negative
    seed, and where ``order`` is "time" and there are no timestamps.
    """
    check_name(how, SPLITS, "split")
    check_name(order, ORDERS, "order")
    if min(ratio) < 0 or ratio[0] <= 0 or not np.isclose(sum(ratio), 1):
        raise DataError(f"ratio must be three shares that add up to 1, the first above 0, got {ratio}")
    if seed < 0:
        raise DataError(f"the seed of a split must be at least 0, got {seed}")
    users = interactions.users_of_rows()
    chance = np.random.default_rng(seed).random(users.size)
    if order == "random":
        sequence = ordering(users, chance)
    elif interactions.timestamps is None:
        raise DataError("the data have no timestamps to split by; expected order random")
    else:
        sequence = ordering(users, interactions.timestamps, chance)
    place = np.empty_like(sequence)
    place[sequence] = np.arange(sequence.size) - interactions.offsets[:-1][users]
    counts = interactions.degrees
    if how == "leave-one-out":
        train_end, valid_end = counts - 2, counts - 1
    else:
        train_end = np.maximum(1, np.rint(counts * ratio[0])).astype(np.int64)
        valid_end = np.maximum(train_end, np.ceil(counts * (1 - ratio[2]) - 0.5).astype(np.int64))
    short = counts < FEWEST
    train_end[short] = valid_end[short] = counts[short]
    part = (place >= train_end[users]).astype(np.int64) + (place >= valid_end[users])
    times = interactions.timestamps
    rows = [
        Rows(users[part == p], interactions.items[part == p], None if times is None else times[part == p])
        for p in range(3)
    ]
    shares = "" if how == "leave-one-out" else " " + ":".join(f"{share:g}" for share in ratio)
    made = f"{how}{shares} by time" if order == "time" else f"{how}{shares} in random order (seed {seed})"
    return assemble(name, interactions.user_ids, interactions.item_ids, rows, made, int(short.sum()))


def from_files(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    format: str = "auto",
    columns: Columns | None = None,
    name: str | None = None,
) -> Dataset:
    """Make a data set of three files. Ratings are ignored: each line is an interaction.

    ``format`` and ``columns`` are those of :func:`perfedrec.data.formats.read`, which also raises. With format "auto",
    if the training file is detected as triples or an adjacency list, the other two are read as the same format.
    ``name`` is the name of the data set (default: the name of the folder of the training file).
    """
    paths = [Path(train), Path(valid), Path(test)]
    if format == "auto" and (found := detect(paths[0])) in ("triples", "adjacency"):
        format = found  # held-out files are small, and in a small file the two formats are harder to tell apart
    frames = [read(path, format, columns) for path in paths]
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
            frame["timestamp"].to_numpy() if "timestamp" in frame.columns else None,
        )
        for frame in frames
    ]
    return assemble(name or paths[0].resolve().parent.name, user_ids, item_ids, rows, "as given in files")
