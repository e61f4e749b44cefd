"""What every recommender can do, whatever its scores come from: rank, recommend, be evaluated, be stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.records import copied, unflatten
from perfedrec.core.types import Embedding, block_rows
from perfedrec.evaluation.ranking import Held, Totals, mask_seen, rank_block
from perfedrec.evaluation.sampled import rank_among

RANKED_AT_ONCE = 512  # users; a score for each item takes memory

Stored = Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
"""Flat records by name, as a checkpoint holds them."""


class Recommender(ABC):
    """Scores for the users of the training data, CSR arrays ``offsets`` [n + 1] and ``items`` of ``n_items``."""

    def __init__(self, offsets: Tensor, items: Tensor, n_items: int) -> None:
        self.offsets, self.items, self.n_items = offsets, items, n_items

    @abstractmethod
    def explain(self, users: Tensor) -> dict[str, Tensor]:
        """Named parts [B, m] whose sum is the score."""

    @abstractmethod
    def raw_scores(self, users: Tensor) -> Tensor:
        """[B, m] scores of all items, in storage that may be written to."""

    def embedding(self, users: Tensor) -> Embedding | None:
        """Where the model puts ``users`` [B] and all items; ``None`` for a method without such vectors."""
        return None

    @abstractmethod
    def records(self) -> dict[str, Any]:
        """The records that it consists of, by name."""

    @abstractmethod
    def with_records(self, records: Mapping[str, Any]) -> Self:
        """A recommender of the same kind for the same users, with other records."""

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def everyone(self) -> Tensor:
        """[n] all users, in an order that is quick to rank."""
        return torch.arange(self.offsets.numel() - 1, device=self.device)

    def frozen(self) -> Self:
        """A copy that later rounds leave alone."""
        return self.with_records({name: copied(record) for name, record in self.records().items()})

    def restored(self, stored: Stored) -> Self:
        """The recommender whose records were stored."""
        kinds = {name: type(record) for name, record in self.records().items()}
        records = {name: unflatten(kind, *stored[name]) for name, kind in kinds.items()}
        return self.with_records({name: copied(record, self.device) for name, record in records.items()})

    def scores(self, users: Tensor, *, hide: Held | None = None) -> Tensor:
        """[B, m] scores; training items, and the items of ``hide``, are minus infinity."""
        rows, _ = block_rows(self.offsets, self.items, users)
        scores = mask_seen(self.raw_scores(users), rows.segments, rows.items)
        if hide is not None:
            mask_seen(scores, *hide.rows(users))
        return scores

    def recommend(self, users: Tensor, k: int, block_size: int = RANKED_AT_ONCE) -> tuple[Tensor, Tensor]:
        """Items [B, k] not seen in training, best first, and their scores [B, k]."""
        ranked = [rank_block(self.scores(block), k) for block in users.split(block_size)]
        return torch.cat([items for _, items in ranked]), torch.cat([values for values, _ in ranked])

    def rank(
        self, held: Held, ks: tuple[int, ...] = (10, 20), hide: Held | None = None, block_size: int = RANKED_AT_ONCE
    ) -> Totals:
        """Full ranking over all items unseen in training (and not in ``hide``), user by user."""
        totals = Totals(ks, self.n_items)
        for users in self.everyone().split(block_size):
            values, lists = rank_block(self.scores(users, hide=hide), max(ks))
            hits = held.hits(users, lists, self.n_items)
            totals.add(hits, held.counts(users), lists.masked_fill(values == -torch.inf, -1), users)
        return totals

    def evaluate(
        self, held: Held, ks: tuple[int, ...] = (10, 20), hide: Held | None = None, block_size: int = RANKED_AT_ONCE
    ) -> dict[str, float]:
        """Means of :meth:`rank` over users."""
        return self.rank(held, ks, hide, block_size).means()

    def rank_sampled(
        self, held: Held, ks: tuple[int, ...] = (10, 20), hide: Held | None = None, n_negatives: int = 99, seed: int = 0
    ) -> Totals:
        """Each held-out item against ``n_negatives`` drawn at random for it: see :mod:`.sampled`."""
        totals, key = Totals(ks, self.n_items), Key(seed).fold("sampled negatives")
        for users in self.everyone().split(RANKED_AT_ONCE):
            rank_among(self.scores(users, hide=hide), users, held, n_negatives, key, totals)
        return totals
