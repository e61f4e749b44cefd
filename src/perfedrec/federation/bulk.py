"""The lists of all users of a node, and their vectors for an index of nearest neighbours, block by block.

The scores of a block of users are one matrix product for each table of items, so that the lists of many users take much
less time than one list after another. They are the same lists.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch

from perfedrec.core.errors import ConfigError, DataError, check_length, reason
from perfedrec.core.threads import one_thread
from perfedrec.evaluation.order import RandomOrder
from perfedrec.evaluation.ranking import rank_block
from perfedrec.federation.agreement import build
from perfedrec.nn.inference import Floats, User, by_table, scores_of
from perfedrec.runtimes.node import LocalRecommender, Store, StoreError
from perfedrec.runtimes.node.owned import OwnedFile
from perfedrec.runtimes.node.scorer import Stored

BLOCK = 512
"""Users whose scores are computed at once."""

Tell = Callable[[int, int], None]
"""Receives how many users are done, and of how many."""


@dataclass(frozen=True)
class Written:
    """What was written: ``users``, and ``rows`` of lists, or ``groups`` of vectors. ``listed`` users have a list of the
    neighbourhood service beside their vector, and of ``unknown`` ones no model knows anything."""

    users: int
    rows: int = 0
    groups: int = 0
    listed: int = 0
    unknown: int = 0


def write_lists(path: Path, output: Path, k: int, tell: Tell = lambda done, of: None) -> Written:
    """Write the ``k`` best items of every user of a node to a table with the columns user, item, rank and score, best
    first. Each list is made from what the node's file has when its block is reached.

    The table (.parquet or .csv) is there as a whole, or not at all, and only this user of the machine can read it.
    Raises :class:`ConfigError` for another kind of table, :class:`DataError` for a node without users, and
    :class:`StoreError` for a node without a model.
    """
    check_length(k)
    check_table(output)
    rows = done = 0
    with OwnedFile.open(path) as file, _explained(output), _table(output) as put:
        names = _users(file)
        file.served()  # raises where there is no model
        for block, frame in _lists(file, names, k):
            put(frame)
            rows, done = rows + frame.height, done + block
            tell(done, len(names))
    return Written(done, rows=rows)


def check_table(output: Path) -> None:
    """Raise :class:`ConfigError` for a name that is not one of a table."""
    if output.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--output is {output}; expected a name that ends in .parquet or .csv")


def _users(file: OwnedFile) -> list[str]:
    names = file.user_names()
    if not names:
        raise DataError(f"{file.path}: holds no users yet; add some with perfedrec node import")
    return names


def _blocks(file: OwnedFile, names: Sequence[str]) -> Iterator[tuple[int, list[tuple[int, Stored]]]]:
    """The size of each block of users, and the place and the data of each one who is still in the file."""
    for start in range(0, len(names), BLOCK):
        found = file.stored_of(names[start : start + BLOCK])
        yield len(found), [(place, each) for place, each in enumerate(found, start) if each is not None]


def _lists(file: OwnedFile, names: Sequence[str], k: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """The size of each block of users, and its lists."""
    items = pl.Series(file.ids(np.arange(file.n_items)))
    order = RandomOrder(np.array(names, dtype=object), items.to_numpy())
    for size, block in _blocks(file, names):
        scores = torch.from_numpy(_scores(file, [each for _, each in block]))
        places = torch.tensor([place for place, _ in block], dtype=torch.int64)
        best, found = rank_block(scores, k, places, order)
        there = best > -torch.inf
        rank = torch.arange(1, best.shape[1] + 1).expand_as(best)[there]
        users = pl.Series([names[place] for place, _ in block], dtype=pl.String)
        yield (
            size,
            pl.DataFrame(
                {
                    "user": users[there.nonzero()[:, 0].numpy()],
                    "item": items[found[there].numpy()],
                    "rank": rank.numpy(),
                    "score": best[there].numpy(),
                }
            ),
        )


def _scores(file: OwnedFile, block: Sequence[Stored]) -> Floats:
    """[B, m] the scores of the users of a block; minus infinity for items that a user has or has dismissed."""
    with one_thread():  # one user has too little work for several
        users = [file.user(each) for each in block]
    scores = np.empty((len(block), file.n_items), dtype=np.float32)
    if alone := [place for place, each in enumerate(users) if each is not None]:
        scores[alone] = scores_of([each for each in users if each is not None])
    if others := [place for place, each in enumerate(users) if each is None]:
        with Store.open(file.path) as store:
            local = LocalRecommender(store, build(store.served().configuration))
            scores[others] = local.scores(torch.tensor([block[place].identity for place in others]))[0].numpy()
    for row, each in zip(scores, block, strict=True):
        row[list(each.items)] = -np.inf
        row[:] = file.by_popularity(row, {})[0]
        row[file.dismissed_numbers(each.key)] = -np.inf
    return scores


def write_vectors(path: Path, folder: Path, tell: Tell = lambda done, of: None) -> Written:
    """Write vectors whose inner products are scores, for an index of nearest neighbours: ``items.parquet`` (group,
    item, vector) and ``users.parquet`` (user, group, vector, hidden, listed).

    A user's list has the items of the user's ``group`` (the cluster) with the best scores, without those that are
    ``hidden``, which the user has or has dismissed. The score is the product of the vectors; for items in ``listed``
    (item, score), which come from the neighbourhood service, that score is added. Where no model knows anything of a
    user, the vector is 0, and the node's own list has what is popular. Raises :class:`ConfigError` where a method has
    no such vectors, or where the folder exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; expected the name of a new folder")
    groups, listed, unknown, done = dict[tuple[int, ...], int](), 0, 0, 0
    with (
        OwnedFile.open(path) as file,
        _explained(folder),
        _folder(folder) as begun,
        _table(begun / "items.parquet") as put_items,
        _table(begun / "users.parquet") as put_users,
    ):
        names, served = _users(file), file.served()[0]
        item_ids = pl.Series(file.ids(np.arange(file.n_items)))
        for size, block in _blocks(file, names):
            rows = list[dict[str, Any]]()
            for place, stored in block:
                if stored.served != served:
                    raise StoreError(f"{path}: has received another model meanwhile; nothing was written, try again")
                with one_thread():
                    user = file.user(stored)
                if user is None:
                    raise _without_vectors(path, names[place], stored, file.n_items)
                found = by_table(user)
                vector = np.concatenate([own for _, own in found.values()])
                if (key := tuple(found)) not in groups:
                    groups[key] = len(groups)
                    put_items(_of_items([items for items, _ in found.values()], groups[key], item_ids))
                hidden = [*stored.items, *file.dismissed_numbers(stored.key).tolist()]
                added = _listed(user, item_ids)
                listed, unknown = listed + bool(added), unknown + (not added and not vector.any())
                row = {"user": names[place], "group": groups[key], "vector": vector, "hidden": hidden, "listed": added}
                rows.append(row)
            if rows:
                put_users(_of_users(rows, item_ids))
            done += size
            tell(done, len(names))
    return Written(done, groups=len(groups), listed=listed, unknown=unknown)


def _without_vectors(path: Path, user: str, stored: Stored, n_items: int) -> ConfigError:
    """Why a user has no vector."""
    instead = "for lists of all users, perfedrec node lists"
    if stored.model is None:
        what = "the served model has no vectors to export, because of its method or of networks in it"
        return ConfigError(f"{path}: {what}; expected FedMF, FedGNN, PerFedRec or PerFedRec++; {instead}")
    has = f"user {user!r} has {len(stored.items)} of {n_items} items"
    what = "a user with more than half of all items is scored by torch, and has no vector to export"
    return ConfigError(f"{path}: {has}: {what}; expected users with half of the items at most; {instead}")


def _listed(user: User, item_ids: pl.Series) -> list[dict[str, Any]]:
    """The scores that come from a list and from no vector: rows with item and score."""
    found = [each.fixed[0] for each in user.models.values() if each.fixed]
    if not found:
        return []
    (items,) = found[0].nonzero()
    scores = found[0][items].tolist()
    return [{"item": item, "score": score} for item, score in zip(item_ids[items].to_list(), scores, strict=True)]


def _of_items(tables: Sequence[Floats], group: int, item_ids: pl.Series) -> pl.DataFrame:
    vectors = np.concatenate(tables, axis=1)
    column = pl.Series(vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
    frame = pl.DataFrame({"item": item_ids, "vector": column})
    return frame.select(pl.lit(group, dtype=pl.Int64).alias("group"), "item", "vector")


def _of_users(rows: Sequence[dict[str, Any]], item_ids: pl.Series) -> pl.DataFrame:
    vectors = np.stack([each["vector"] for each in rows])
    listed = pl.Struct([pl.Field("item", item_ids.dtype), pl.Field("score", pl.Float32)])
    hidden = [item_ids[np.array(each["hidden"], dtype=np.int64)] for each in rows]
    return pl.DataFrame(
        {
            "user": pl.Series([each["user"] for each in rows], dtype=pl.String),
            "group": pl.Series([each["group"] for each in rows], dtype=pl.Int64),
            "vector": pl.Series(vectors, dtype=pl.Array(pl.Float32, vectors.shape[1])),
            "hidden": pl.Series(hidden, dtype=pl.List(item_ids.dtype)),
            "listed": pl.Series([each["listed"] for each in rows], dtype=pl.List(listed)),
        }
    )


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Name the ``output`` itself, and no temporary file, where it cannot be written."""
    try:
        yield
    except (OSError, pl.exceptions.ComputeError) as error:
        why = reason(error)
        why = re.sub(rf"\S*\.{re.escape(output.name)}\.\S*", str(output), why)
        raise ConfigError(
            f"{output}: cannot be written ({why}); expected a name in a folder that exists, in which this user may "
            "write, on a disk with enough space"
        ) from None


@contextmanager
def _table(output: Path) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Collect a table in parts, and write it at the end of the block; where the block fails, nothing is written."""
    numbers = itertools.count()
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as parts:

        def put(frame: pl.DataFrame) -> None:
            frame.write_parquet(Path(parts, f"{next(numbers):08}.parquet"))

        yield put
        whole = Path(parts, "whole")
        frame = pl.scan_parquet(Path(parts, "*.parquet"))
        frame.sink_parquet(whole) if output.suffix == ".parquet" else frame.sink_csv(whole)
        whole.chmod(0o600)
        whole.replace(output)


@contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """A new folder, which has its name at the end of the block; where the block fails, it is removed."""
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        begun = Path(name, "whole")
        begun.mkdir(mode=0o700)
        yield begun
        begun.replace(folder)
