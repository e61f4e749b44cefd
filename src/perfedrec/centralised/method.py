"""What a centralised method is, what it is given, and the engine that runs it epoch by epoch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from scipy import sparse
from torch import Tensor

from perfedrec.core.device import pick_device
from perfedrec.core.errors import DivergedError
from perfedrec.core.keys import Key
from perfedrec.core.records import copied, unflatten
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, RoundReport, Rows, block_rows
from perfedrec.data import Dataset
from perfedrec.evaluation import Recommender, Stored
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


class CentralRecommender(Recommender):
    """A method with the state that it scores with."""

    def __init__(self, method: Method, state: Any, data: Training) -> None:
        super().__init__(data.rows.offsets, data.rows.items, data.n_items)
        self.method, self.state, self.data = method, state, data

    def raw_scores(self, users: Tensor) -> Tensor:
        return self.method.scores(self.state, self.data, users)

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return {"global": self.raw_scores(users)}

    def embedding(self, users: Tensor) -> Embedding | None:
        return self.method.embedding(self.state, self.data, users)

    def records(self) -> dict[str, Any]:
        return {"state": self.state}

    def with_records(self, records: Mapping[str, Any]) -> CentralRecommender:
        return CentralRecommender(self.method, records["state"], self.data)


class Central:
    """The engine of a centralised method: what :class:`perfedrec.runtimes.simulator.Simulator` is to a federated one.

    A round is an epoch; a method that is fitted at once has one round, before training. Held-out interactions are not
    kept: what runs here cannot reach them.
    """

    def __init__(
        self, method: Method, dataset: Dataset, *, seed: int = 0, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> None:
        self.method, self.seed, self.device, self.round = method, seed, pick_device(device), 0
        self.data = Training.of(dataset, self.device)
        self.prelude = 0 if method.trained else 1
        self.state = method.init(self.data, Key(seed).fold("init"))

    def play(self) -> RoundReport:
        """The next epoch. Raises :class:`DivergedError` where its loss is not finite."""
        loss = None
        if self.method.trained:
            key = Key(self.seed).fold("round", self.round)
            self.state, loss = self.method.epoch(self.state, self.data, key)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss of epoch {self.round + 1} is {loss}; expected a finite number "
                    "(is the learning rate too large?)"
                )
        self.round += 1
        phase = "train" if self.method.trained else "fit"
        return RoundReport(self.round - 1, phase, self.data.n_users, self.data.n_users, loss, 0, 0, 0)

    def recommender(self) -> CentralRecommender:
        """The recommender of the moment."""
        return CentralRecommender(self.method, self.method.serving(self.state, self.data), self.data)

    def records(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"state": self.state}

    def restore(self, stored: Stored, rounds: int) -> None:
        """Go on after so many ``rounds`` from what a checkpoint held."""
        self.state = copied(unflatten(type(self.state), *stored["state"]), self.device)
        self.round = rounds
