"""From interactions to a data set: splits, and parts that are given."""

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
    """Split each user's interactions, put in order by time or at random, into training, validation and test.

    "leave-one-out": the last one is for testing, the one before for validation. "ratio": the first ``ratio[0]`` of
    them train and the last ``ratio[2]`` test, with the limits between the parts rounded. Users with fewer than 3
    interactions stay in training and are counted in ``notes``. Interactions at the same second are put in random
    order, so that ids have no say.
    Raises :class:`DataError` when ``order`` is "time" and there are no timestamps.
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
        raise DataError("the data have no timestamps to split by: use order random")
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
    told = f"{how}{shares} by time" if order == "time" else f"{how}{shares} in random order (seed {seed})"
    return assemble(name, interactions.user_ids, interactions.item_ids, rows, told, int(short.sum()))


def from_files(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    format: str = "auto",
    columns: Columns | None = None,
    name: str | None = None,
) -> Dataset:
    """A data set whose three parts are given as files. Ratings are ignored: each line is an interaction.

    With format "auto", what looks like triples or an adjacency list in the training file is taken for the same in the
    other two.
    """
    paths = [Path(train), Path(valid), Path(test)]
    if format == "auto" and (found := detect(paths[0])) in ("triples", "adjacency"):
        format = found  # held-out files are small, and the smaller a file the more alike the two look
    frames = [read(path, format, columns) for path in paths]
    for column in ("user", "item"):
        kinds = {frame[column].dtype for frame in frames if frame.height} or {pl.Int64()}
        kind = kinds.pop() if len(kinds) == 1 else pl.String()  # integers in one part, names in another: all are names
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
