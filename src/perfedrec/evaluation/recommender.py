"""The base class of all recommenders: ranking, recommending, evaluation and storing work alike for all scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.records import Scalar, copied, set_aside, unflatten
from perfedrec.core.scoring import RANKED_AT_ONCE, Scoring
from perfedrec.core.types import Embedding, block_rows
from perfedrec.evaluation.best import rank_scoring
from perfedrec.evaluation.order import RandomOrder
from perfedrec.evaluation.ranking import CUTOFFS, Held, Totals, mask_seen
from perfedrec.evaluation.sampled import rank_among

Stored = Mapping[str, tuple[Any, dict[str, Scalar]]]
"""Flat records by name, as a checkpoint holds them: for each record its tensors and its scalars."""


class Recommender(ABC):
    """Scores of all items for the users of the training data.

    The training data are given as CSR arrays, ``offsets`` [n + 1] and ``items``; there are ``n_items`` items (m).
    ``order`` decides between items with equal scores; by default the numbers of users and items are their ids.
    """

    def __init__(self, offsets: Tensor, items: Tensor, n_items: int, order: RandomOrder | None = None) -> None:
        self.offsets, self.items, self.n_items = offsets, items, n_items
        self.order = order or RandomOrder.of_numbers(offsets.numel() - 1, n_items)

    @abstractmethod
    def explain(self, users: Tensor) -> dict[str, Tensor]:
        """The parts [B, m] of the scores of ``users`` [B], by name; their sum is the score."""

    @abstractmethod
    def raw_scores(self, users: Tensor) -> Tensor:
        """[B, m] scores of all items for ``users`` [B]. The caller may overwrite the tensor."""

    def scoring(self, users: Tensor) -> Scoring:
        """:meth:`raw_scores`, computed where they are needed."""
        return Scoring.of(self.raw_scores(users))

    @property
    def sequential(self) -> bool:
        """Whether the order of a user's items counts."""
        return False

    @property
    def ranked_at_once(self) -> int:
        """For how many users one call of :meth:`scoring` is made."""
        return RANKED_AT_ONCE

    @abstractmethod
    def for_new_users(self, offsets: Tensor, items: Tensor, order: RandomOrder | None = None) -> Recommender:
        """The same model for users who were not in training, from their interactions as CSR arrays.

        The scores of a user depend on the model and on the user's own items alone; they are given oldest first if the
        recommender is :attr:`sequential`, and ascending otherwise. ``order`` is that of the class, with
        the ids of these users. Scoring raises :class:`perfedrec.core.errors.ConfigError` for a method that cannot
        recommend to such users.
        """

    def scores_of_new_user(self, items: Tensor) -> Tensor:
        """[m] scores of all items for somebody who was not in training and has ``items`` [r], in the order
        of :meth:`for_new_users`.

        It raises what :meth:`for_new_users` does.
        """
        alone = self.for_new_users(items.new_tensor([0, items.numel()]), items)
        return alone.raw_scores(alone.everyone())[0]

    def embedding(self, users: Tensor) -> Embedding | None:
        """The vectors of ``users`` [B] and of all items; ``None`` for a method without such vectors."""
        return None

    @abstractmethod
    def records(self) -> dict[str, Any]:
        """The records that hold the model, by name."""

    def kept(self) -> dict[str, Any]:
        """The records as a checkpoint keeps them: a large record may be a tuple of segments, of which only new ones
        have to be stored (:class:`perfedrec.core.records.Segment`)."""
        return self.records()

    @abstractmethod
    def with_records(self, records: Mapping[str, Any]) -> Self:
        """A recommender of the same kind for the same users, with these records."""

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def everyone(self) -> Tensor:
        """[n] all users, in the order in which they are ranked fastest."""
        return torch.arange(self.offsets.numel() - 1, device=self.device)

    def frozen(self) -> Self:
        """A copy that does not change when training continues, for what is rarely read."""
        return self.with_records({name: set_aside(record) for name, record in self.records().items()})

    def restored(self, stored: Stored) -> Self:
        """The recommender with the records that a checkpoint has ``stored``."""
        kinds = {name: type(record) for name, record in self.records().items()}
        records = {name: unflatten(kind, *stored[name]) for name, kind in kinds.items()}
        return self.with_records({name: copied(record, self.device) for name, record in records.items()})

    def scores(self, users: Tensor, *, hide: Held | None = None) -> Tensor:
        """[B, m] scores; minus infinity for the training items of ``users`` [B] and for their items in ``hide``."""
        rows, _ = block_rows(self.offsets, self.items, users)
        scores = mask_seen(self.raw_scores(users), rows.segments, rows.items)
        if hide is not None:
            mask_seen(scores, *hide.rows(users))
        return scores

    def best(self, users: Tensor, k: int, hide: Held | None = None) -> tuple[Tensor, Tensor]:
        """The scores and items [B, min(k, m)] of the ``k`` best items of a block of ``users`` [B], best first: see
        :func:`perfedrec.evaluation.ranking.rank_block`. Training items and those in ``hide`` are left out."""
        rows, _ = block_rows(self.offsets, self.items, users)
        pairs = [(rows.segments, rows.items), *([] if hide is None else [hide.rows(users)])]
        segments, items = (torch.cat(each) for each in zip(*pairs, strict=True))
        return rank_scoring(self.scoring(users), k, users, self.order, segments, items)[0]

    def recommend(self, users: Tensor, k: int, block_size: int | None = None) -> tuple[Tensor, Tensor]:
        """For ``users`` [B]: the k best items that they have not seen in training, best first, and their scores.

        Both are [B, min(k, m)]. Users are ranked in blocks of ``block_size``, which bounds the memory.
        """
        ranked = [self.best(block, k) for block in users.split(block_size or self.ranked_at_once)]
        return torch.cat([items for _, items in ranked]), torch.cat([values for values, _ in ranked])

    def rank(
        self, held: Held, ks: tuple[int, ...] = CUTOFFS, hide: Held | None = None, block_size: int | None = None
    ) -> Totals:
        """Rank, for all users who have items in ``held``, all items that a user has not seen in training and that are
        not in ``hide``.

        ``held`` are the held-out items to find, and ``ks`` are the cut-offs.
        """
        totals, everyone = Totals(ks, self.n_items), self.everyone()
        for users in everyone[held.counts(everyone) > 0].split(block_size or self.ranked_at_once):
            if not users.numel():
                break  # nobody has to be scored
            values, lists = self.best(users, max(ks), hide)
            shown = values > -torch.inf  # a user who has seen nearly all items gets a shorter list
            hits = held.hits(users, lists, self.n_items) & shown
            totals.add(hits, held.counts(users), lists.masked_fill(~shown, -1), users)
        return totals

    def evaluate(
        self, held: Held, ks: tuple[int, ...] = CUTOFFS, hide: Held | None = None, block_size: int | None = None
    ) -> dict[str, float]:
        """The means of :meth:`rank` over users."""
        return self.rank(held, ks, hide, block_size).means()

    def rank_sampled(
        self, held: Held, ks: tuple[int, ...] = CUTOFFS, hide: Held | None = None, n_negatives: int = 99, seed: int = 0
    ) -> Totals:
        """Rank each held-out item among ``n_negatives`` random unseen items of its user: see :mod:`.sampled`.

        The draws depend on ``seed`` and on the ids of user and items only.
        """
        totals, key = Totals(ks, self.n_items), Key(seed).fold("sampled negatives")
        for users in self.everyone().split(RANKED_AT_ONCE):
            rank_among(self.scores(users, hide=hide), users, held, n_negatives, key, self.order, totals)
        return totals
