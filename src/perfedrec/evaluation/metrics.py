"""Ranking metrics of lists from anywhere, by the definitions of :mod:`perfedrec.evaluation.ranking`.

``lists`` are recommendations, best first, and ``truth`` the items to find. Both are given for each user: as a mapping
from users to items, as a sequence with one entry per user, or as a data frame with the columns user and item, where the
rank of an item is in the column rank or, without it, is the order of the rows. A list of items alone is that of one
user. Means are over the users who have items to find. A user without a list has found nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import torch

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing
from perfedrec.data.frames import columns_of
from perfedrec.evaluation.ranking import CUTOFFS, METRICS, Cutoffs, cutoffs, metrics

Lists: TypeAlias = Any
"""Items of users: a mapping, a sequence with one entry per user, the items of one user, or a data frame."""


def recall(lists: Lists, truth: Lists, k: int) -> float:
    """The share of a user's items that are among the first ``k`` of the list."""
    return evaluate(lists, truth, k)[f"recall@{k}"]


def precision(lists: Lists, truth: Lists, k: int) -> float:
    """The share of the first ``k`` places of a list that have an item to find. Places after its end count as wrong."""
    return evaluate(lists, truth, k)[f"precision@{k}"]


def ndcg(lists: Lists, truth: Lists, k: int) -> float:
    """The discounted gain of the first ``k`` places, divided by the best that is possible."""
    return evaluate(lists, truth, k)[f"ndcg@{k}"]


def mrr(lists: Lists, truth: Lists, k: int) -> float:
    """1 / the rank of the first item that is found, 0 if there is none among the first ``k``."""
    return evaluate(lists, truth, k)[f"mrr@{k}"]


def hr(lists: Lists, truth: Lists, k: int) -> float:
    """1 where at least one item is found among the first ``k``, else 0."""
    return evaluate(lists, truth, k)[f"hr@{k}"]


def evaluate(lists: Lists, truth: Lists, ks: Cutoffs = CUTOFFS) -> dict[str, float]:
    """All metrics at one or several cut-offs ``ks``, as means over users: ``{"recall@10": ..., "users": ...}``.

    Raises :class:`DataError` where nobody has an item to find, a list has an item twice, or users do not fit together,
    and :class:`ConfigError` for a cut-off below 1.
    """
    frame = per_user(lists, truth, ks)
    means = {name: float(np.mean(frame[name].to_numpy())) for name in frame.columns if name != "user"}
    return {**means, "users": float(frame.height)}


def per_user(lists: Lists, truth: Lists, ks: Cutoffs = CUTOFFS) -> pl.DataFrame:
    """The metrics of :func:`evaluate` user by user: a frame with the column user and one column for each metric."""
    at, shown = cutoffs(ks), _by_user(lists)
    wanted = {user: set(items) for user, items in _by_user(truth).items() if items}
    _check(lists, truth, shown, wanted)
    hits = torch.zeros(len(wanted), max(at), dtype=torch.bool)
    for place, (user, items) in enumerate(wanted.items()):
        own = shown.get(user, [])
        if len(set(own)) < len(own):
            raise DataError(f"the list of user {user!r} has an item twice; expected each item once")
        found = [item in items for item in own[: max(at)]]
        hits[place, : len(found)] = torch.tensor(found, dtype=torch.bool)
    counts = torch.tensor([len(items) for items in wanted.values()])
    values = metrics(hits, counts, at)
    names = [f"{name}@{k}" for k in at for name in METRICS]
    return pl.DataFrame({"user": list(wanted), **{name: values[name].numpy() for name in names}})


def _by_user(given: Lists) -> dict[Any, list[Any]]:
    """The items of each user, in the order of their ranks."""
    if isinstance(given, Mapping):
        return {user: _plain(items) for user, items in given.items()}
    if hasattr(given, "columns"):
        frame = columns_of(given)
        if missing := {"user", "item"} - set(frame.columns):
            raise DataError(
                f"a data frame of lists needs the columns user and item; it has {listing(frame.columns)}, and no "
                f"{' and no '.join(sorted(missing))}"
            )
        frame = frame.sort("rank", maintain_order=True) if "rank" in frame.columns else frame
        grouped = frame.group_by("user", maintain_order=True).agg("item")
        return dict(zip(grouped["user"].to_list(), grouped["item"].to_list(), strict=True))
    entries = _plain(given)
    if not entries or not all(_is_list(each) for each in entries):
        entries = [entries]
    return {place: _plain(items) for place, items in enumerate(entries)}


def _check(lists: Lists, truth: Lists, shown: Mapping[Any, list[Any]], wanted: Mapping[Any, set[Any]]) -> None:
    """Raise :class:`DataError` where the users or the items of both sides cannot be compared."""
    if not wanted:
        raise DataError("nobody has an item to find; expected at least one user with items in truth")
    named = [isinstance(each, Mapping) or hasattr(each, "columns") for each in (lists, truth)]
    if named[0] != named[1]:
        raise DataError("only one of lists and truth names its users; expected users in both of them, or in none")
    if not any(named) and len(shown) != len(_by_user(truth)):
        raise DataError(
            f"{counted(len(shown), 'list')} for {counted(len(_by_user(truth)), 'user')}; expected one list for each"
        )
    if shown and not shown.keys() & wanted.keys():
        user = next(iter(wanted))
        raise DataError(f"no user of truth has a list, for example {user!r}; expected the same ids in lists and truth")
    kinds = [{type(item) for items in side.values() for item in items} for side in (shown, wanted)]
    if kinds[0] and not kinds[0] & kinds[1]:
        names = [" and ".join(sorted(kind.__name__ for kind in each)) for each in kinds]
        raise DataError(f"items are {names[0]} in lists and {names[1]} in truth; expected the same ids in both")


def _is_list(items: Any) -> bool:
    return isinstance(items, Iterable) and not isinstance(items, str | bytes)


def _plain(items: Any) -> list[Any]:
    """The entries as Python values, so that 1 and numpy's 1 are equal and can be looked up."""
    return list(items.tolist() if hasattr(items, "tolist") else items)
