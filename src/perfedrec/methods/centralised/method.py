"""What a centralised method is, what it is given, and the engine that runs it epoch by epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from scipy import sparse
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows, block_rows
from perfedrec.data import Dataset
from perfedrec.nn.propagation import Bipartite


@dataclass(frozen=True)
class Training:
    """All that a method sees: the training ``rows`` of all users, over ``n_items`` items. Held-out interactions are not
    in it, and so neither negatives nor neighbours can know of them."""

    rows: Rows
    n_items: int

    @staticmethod
    def of(dataset: Dataset, device: torch.device) -> Training:
        offsets = torch.tensor(dataset.train.offsets, device=device)
        everyone = torch.arange(dataset.n_users, device=device)
        rows, _ = block_rows(offsets, torch.tensor(dataset.train.items, device=device), everyone)
        return Training(rows, dataset.n_items)

    @property
    def n_users(self) -> int:
        return self.rows.n_users

    @cached_property
    def item_degrees(self) -> Tensor:
        """[m] interactions of each item."""
        return torch.bincount(self.rows.items, minlength=self.n_items)

    @cached_property
    def graph(self) -> Bipartite:
        """The normalised interaction graph."""
        return Bipartite.of(self.rows.segments, self.rows.items, self.n_users, self.n_items)

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """``R`` [n, m], ones where there is an interaction."""
        offsets, items = self.rows.offsets.cpu().numpy(), self.rows.items.cpu().numpy()
        ones = torch.ones(items.size, dtype=torch.float64).numpy()
        return sparse.csr_array((ones, items, offsets), shape=(self.n_users, self.n_items))


class Method(ABC):
    """A centralised method: a state, epochs that change it, and scores. ``S`` is any record of tensors."""

    Options: ClassVar[type[Settings]] = Settings
    """The record of its options; none of its own unless a method says so."""

    trained: ClassVar[bool] = False
    """Whether it is trained in epochs (``run.rounds`` of them); else :meth:`init` is all there is to it."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings: Any = settings or self.Options()

    @abstractmethod
    def init(self, data: Training, key: Key) -> Any:
        """The state before the first epoch, or the fitted model."""

    def epoch(self, state: Any, data: Training, key: Key) -> tuple[Any, float]:
        """One pass over the interactions: the next state, and the mean loss."""
        raise NotImplementedError(f"{type(self).__name__} is fitted at once")

    def serving(self, state: Any, data: Training) -> Any:
        """What of the state is needed to score."""
        return state

    @abstractmethod
    def scores(self, state: Any, data: Training, users: Tensor) -> Tensor:
        """[B, m] scores of all items for ``users`` [B]."""

    def embedding(self, state: Any, data: Training, users: Tensor) -> Embedding | None:
        """Vectors whose products are the scores, where the method has such."""
        return None
