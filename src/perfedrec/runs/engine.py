"""The engine of a run, which plays its rounds: one for federated methods, and one for centralised methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from perfedrec.core.device import pick_device
from perfedrec.core.errors import DivergedError
from perfedrec.core.keys import Key
from perfedrec.core.records import copied, unflatten
from perfedrec.core.scoring import Scoring
from perfedrec.core.types import NEWCOMER, Embedding, RoundReport, block_rows
from perfedrec.data import Dataset
from perfedrec.evaluation import Held, RandomOrder, Recommender, Stored, Totals
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.registry import AnyMethod
from perfedrec.runs.config import RunSettings
from perfedrec.runtimes.cluster import Machines
from perfedrec.runtimes.simulator import Simulator


class Engine(Protocol):
    """What plays the rounds of a run: :class:`Simulator` for federated methods, :class:`Central` for others."""

    @property
    def n_phases(self) -> int:
        """Rounds before training."""

    def play(self) -> RoundReport:
        """Play the next round."""

    def evaluate(self, held: Held, ks: tuple[int, ...], metric: str) -> Totals:
        """The metrics of the model after the last round at the cut-offs ``ks``, by ``held``-out items. Where the method
        has several settings, these items choose one by the ``metric``."""

    def recommender(self) -> Recommender:
        """The recommender after the last round; it changes with the next one."""

    def records(self) -> dict[str, Any]:
        """The records of a checkpoint, by name."""

    def restore(self, stored: Stored, rounds: int) -> None:
        """Continue after ``rounds`` rounds from the records of a checkpoint."""

    def let_go(self) -> None:
        """Let go of what only further rounds would need. The engine plays none afterwards."""

    def close(self) -> None:
        """End what plays the rounds, where it is more than this process."""


class CentralRecommender(Recommender):
    """A centralised method with a state that it scores with, and the training ``data``; ``order`` is that of
    :class:`Recommender`."""

    def __init__(self, method: Method, state: Any, data: Training, order: RandomOrder | None = None) -> None:
        super().__init__(data.rows.offsets, data.rows.items, data.n_items, order)
        self.method, self.state, self.data = method, state, data

    @property
    def sequential(self) -> bool:
        return self.method.sequential

    def raw_scores(self, users: Tensor) -> Tensor:
        return self.method.scores(self.state, self.data, users)

    def scoring(self, users: Tensor) -> Scoring:
        return self.method.scoring(self.state, self.data, users)

    def for_new_users(self, offsets: Tensor, items: Tensor, order: RandomOrder | None = None) -> CentralNewUsers:
        return CentralNewUsers(self, offsets, items, order)

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return {"global": self.raw_scores(users)}

    def embedding(self, users: Tensor) -> Embedding | None:
        return self.method.embedding(self.state, self.data, users)

    def frozen(self) -> CentralRecommender:
        """Itself where the method is fitted at once: its state does not change, and may be as large as the memory."""
        return super().frozen() if self.method.trained else self

    def records(self) -> dict[str, Any]:
        return {"state": self.state}

    def with_records(self, records: Mapping[str, Any]) -> CentralRecommender:
        return CentralRecommender(self.method, records["state"], self.data, self.order)


class CentralNewUsers(Recommender):
    """The model of a centralised method, for users who were not in training and have the interactions ``offsets``
    [n + 1] and ``items``. ``known`` is the recommender for the users of training."""

    def __init__(
        self, known: CentralRecommender, offsets: Tensor, items: Tensor, order: RandomOrder | None = None
    ) -> None:
        super().__init__(offsets, items, known.n_items, order)
        self.known = known

    def raw_scores(self, users: Tensor) -> Tensor:
        rows, _ = block_rows(self.offsets, self.items, users)
        rows = replace(rows, users=torch.full_like(users, NEWCOMER))
        return self.known.method.scores_of_new_users(self.known.state, self.known.data, rows)

    def for_new_users(self, offsets: Tensor, items: Tensor, order: RandomOrder | None = None) -> CentralNewUsers:
        return self.known.for_new_users(offsets, items, order)

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return {"global": self.raw_scores(users)}

    def records(self) -> dict[str, Any]:
        return self.known.records()

    def with_records(self, records: Mapping[str, Any]) -> CentralNewUsers:
        return CentralNewUsers(self.known.with_records(records), self.offsets, self.items, self.order)


class Central:
    """The engine of a centralised method.

    A round is an epoch. A method that is fitted at once has one round, before training. Held-out interactions are not
    kept, so that a method cannot reach them.
    """

    def __init__(
        self, method: Method, dataset: Dataset, *, seed: int = 0, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> None:
        method.check_data(dataset)
        self.method, self.seed, self.device, self.round = method, seed, pick_device(device), 0
        self.data = Training.of(dataset, self.device, method.sequential)
        self.order = RandomOrder(dataset.train.user_ids, dataset.train.item_ids)
        self.n_phases = 0 if method.trained else 1
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

    def evaluate(self, held: Held, ks: tuple[int, ...], metric: str) -> Totals:
        """The metrics after the last round. A centralised method has one setting."""
        return self.recommender().rank(held, ks)

    def recommender(self) -> CentralRecommender:
        """The recommender after the last round."""
        return CentralRecommender(self.method, self.method.serving(self.state, self.data), self.data, self.order)

    def records(self) -> dict[str, Any]:
        """The records of a checkpoint, by name."""
        return {"state": self.state}

    def restore(self, stored: Stored, rounds: int) -> None:
        """Continue after ``rounds`` rounds from the records of a checkpoint."""
        self.state = copied(unflatten(type(self.state), *stored["state"]), self.device)
        self.round = rounds

    def let_go(self) -> None:
        del self.state

    def close(self) -> None:
        """Nothing has to be ended here."""


def engine(
    algorithm: AnyMethod,
    dataset: Dataset,
    *,
    seed: int,
    device: Literal["auto", "cpu", "cuda"],
    block_size: int = 1024,
    dropout_rate: float = 0.0,
    users_per_node: int = 1,
    threads: int = 0,
) -> Engine:
    """The engine of a method on a data set; centralised methods use ``seed`` and ``device`` alone."""
    if isinstance(algorithm, Method):
        return Central(algorithm, dataset, seed=seed, device=device)
    return Simulator(
        algorithm,
        dataset,
        seed=seed,
        device=device,
        block_size=block_size,
        dropout_rate=dropout_rate,
        users_per_node=users_per_node,
        threads=threads,
    )


def engine_of(algorithm: AnyMethod, dataset: Dataset, run: RunSettings) -> Engine:
    """The engine of a method on a data set, by the settings of a run."""
    return engine(
        algorithm,
        dataset,
        seed=run.seed,
        device=run.device,
        block_size=run.block_size,
        dropout_rate=run.dropout_rate,
        users_per_node=run.users_per_node,
        threads=run.threads,
    )


def spread(engine: Engine, run: RunSettings) -> None:
    """Let the workers that a run asks for do the clients' work from now on. No round has been played yet."""
    if run.workers and isinstance(engine, Simulator):
        engine.spread(Machines(run.workers, run.cluster, max(run.threads, 1), run.block_size))
