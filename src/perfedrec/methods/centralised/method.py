"""The base class of centralised methods, and the data that it receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perfedrec.core.errors import ConfigError, DataError
from perfedrec.core.keys import Key
from perfedrec.core.mapped import as_tensor
from perfedrec.core.scoring import Scoring
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows
from perfedrec.data import Dataset, Interactions, Relations
from perfedrec.data.interactions import Ints
from perfedrec.nn.propagation import Bipartite
from perfedrec.nn.social import related


@dataclass(frozen=True)
class Training:
    """All data that a method receives: the training ``rows`` of all users, over ``n_items`` items. It has no held-out
    interactions, so that neither negatives nor neighbours can depend on them.

    ``order`` [R] are the rows in the order of time, user by user, for a method that is :attr:`Method.sequential`. Rows
    without it are in this order already, or nobody asks for it. ``relations`` are those between users, if any are
    known.

    ``views``: two graphs that a contrast between graphs takes in place of its own, where somebody else has made them
    (pre-training at a neighbourhood service, whose two graphs were protected independently).
    """

    rows: Rows
    n_items: int
    order: Tensor | None = None
    relations: Relations | None = None
    views: tuple[Bipartite, ...] = ()

    @staticmethod
    def of(dataset: Dataset, device: torch.device, sequential: bool = False) -> Training:
        """The training data of a data set, with their order for a ``sequential`` method; :func:`order_of` raises."""
        order = order_of(dataset.name, dataset.train) if sequential else None
        offsets, items = as_tensor(dataset.train.offsets, device), as_tensor(dataset.train.items, device)
        everyone = torch.arange(dataset.n_users, device=device)
        segments = torch.repeat_interleave(everyone, offsets.diff())
        ordered = None if order is None else as_tensor(order, device)
        return Training(Rows(everyone, offsets, items, segments), dataset.n_items, ordered, dataset.relations)

    @property
    def n_users(self) -> int:
        return self.rows.n_users

    @cached_property
    def item_degrees(self) -> Tensor:
        """[m] the number of interactions of each item."""
        return torch.bincount(self.rows.items, minlength=self.n_items)

    @cached_property
    def sequence(self) -> Tensor:
        """[R] the items of each user, oldest first, between the same offsets."""
        return self.rows.items if self.order is None else self.rows.items[self.order]

    @cached_property
    def graph(self) -> Bipartite:
        """The normalised interaction graph."""
        return Bipartite.of(self.rows.segments, self.rows.items, self.n_users, self.n_items)

    @cached_property
    def friends(self) -> sparse.csr_array:
        """``G`` [n, n], with 1 for two users who are related, in one direction or in both. Only for a method that is
        :attr:`Method.social`."""
        assert self.relations is not None
        return related(self.n_users, self.relations.sources, self.relations.targets)

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """``R`` [n, m], with 1 for each interaction."""
        offsets, items = self.rows.offsets.cpu().numpy(), self.rows.items.cpu().numpy()
        ones = torch.ones(items.size, dtype=torch.float64).numpy()
        return sparse.csr_array((ones, items, offsets), shape=(self.n_users, self.n_items))


def order_of(name: str, part: Interactions) -> Ints:
    """int64 [R] the rows of a part of the data set ``name`` in the order of time, user by user. Raises
    :class:`DataError` where the order is not known."""
    check_order(name, part)
    order = part.in_order()
    assert order is not None
    return order


def check_order(name: str, part: Interactions) -> None:
    """Raise :class:`DataError` where the order of a part of the data set ``name`` is not known; nothing is sorted."""
    if part.positions is None and part.timestamps is None:
        raise DataError(
            f"{name}: the order of a user's interactions is not known, and the method learns from it; expected times, "
            "files of sequences (user:item item ...), or data.order=file for files that are sorted by time"
        )


T = TypeVar("T")


class Method(ABC):
    """A centralised method: a state (any record of tensors), epochs that change it, and scores."""

    Options: ClassVar[type[Settings]] = Settings
    """The class of the method's options; empty by default."""

    trained: ClassVar[bool] = False
    """Whether the method is trained in epochs (``run.rounds`` of them). Otherwise :meth:`init` fits it completely."""

    item_based: ClassVar[bool] = False
    """Whether the scores of a user depend on the state and on the user's own items alone."""

    sequential: ClassVar[bool] = False
    """Whether the order of a user's items counts. The method then receives it in :class:`Training`, and the ``rows`` of
    new users are in this order, oldest first."""

    social: ClassVar[bool] = False
    """Whether the method needs relations between users."""

    seedless: ClassVar[bool] = False
    """Whether the seed changes nothing, so that one run is enough. Each class says so for itself: a subclass may draw
    random numbers."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own, inherited = vars(cls), cls.scoring
        if "scores" in own and "scoring" not in own and inherited is not Method.scoring:  # its scores count
            cls.scoring = Method.scoring  # type: ignore[method-assign]

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings: Any = settings or self.Options()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def once(self, data: Training, make: Callable[[Training], T]) -> T:
        """What ``make`` returns for the ``data``, made once for the same data: a graph that depends on them alone."""
        made: tuple[Training, T] | None = getattr(self, "_made", None)
        if made is None or made[0] is not data:
            self._made = made = data, make(data)
        return made[1]

    def remarks(self, n_users: int) -> list[str]:
        """What is different in a run with this number of users, which is nothing, and which options that were changed
        have no effect."""
        idle = self.settings.idle()
        return [
            f"method.{name}: without effect with method.{idle[name]}"
            for name, field in type(self.settings).model_fields.items()
            if name in idle and getattr(self.settings, name) != field.default
        ]

    @abstractmethod
    def init(self, data: Training, key: Key) -> Any:
        """The state before the first epoch, or the fitted model."""

    def epoch(self, state: Any, data: Training, key: Key) -> tuple[Any, float]:
        """One pass over the interactions: the next state, and the mean loss."""
        raise NotImplementedError(f"{type(self).__name__} has no epochs: init() fits it; expected trained = False")

    def serving(self, state: Any, data: Training) -> Any:
        """The part of the state that scoring needs."""
        return state

    @abstractmethod
    def scores(self, state: Any, data: Training, users: Tensor) -> Tensor:
        """[B, m] scores of all items for ``users`` [B]."""

    def scoring(self, state: Any, data: Training, users: Tensor) -> Scoring:
        """The same as :meth:`scores`, computed where it is needed."""
        return Scoring.of(self.scores(state, data, users))

    def scores_of_new_users(self, state: Any, data: Training, rows: Rows) -> Tensor:
        """[B, m] scores of all items for B users who were not in training, from their ``rows``.

        Raises :class:`ConfigError` for a method that knows the users of its training alone.
        """
        self.check_new_users()
        return self.scores(state, Training(rows, data.n_items), torch.arange(rows.n_users, device=rows.items.device))

    def check_data(self, dataset: Dataset) -> None:
        """Raises :class:`DataError` for data that the method cannot learn from, and :class:`ConfigError` for new users
        that it cannot recommend to, before anything is trained."""
        train = dataset.train
        if self.trained and train.n_interactions == train.n_users * train.n_items:
            raise DataError(f"{dataset.name}: there is nothing to learn from: every user has every item")
        if self.social and dataset.relations is None:
            raise DataError(
                f"{dataset.name}: {type(self).__name__} needs relations between users, and the data have none; "
                "expected data.relations=FILE (train --relations FILE), such as trust.txt, with two users a line"
            )
        if dataset.new_users is not None:
            self.check_new_users()
        if self.sequential:
            for part in (train, dataset.new_users):
                if part is not None:
                    check_order(dataset.name, part)
            if train.n_interactions and int(np.diff(train.offsets).max()) < 2:
                raise DataError(
                    f"{dataset.name}: there is nothing to learn from: {type(self).__name__} learns which item follows "
                    "another, and no user has two items for training"
                )

    def check_new_users(self) -> None:
        """Raises :class:`ConfigError` for a method that knows the users of its training alone: it is not
        :attr:`item_based`, and has no :meth:`scores_of_new_users` of its own."""
        if not self.item_based and type(self).scores_of_new_users is Method.scores_of_new_users:
            raise ConfigError(
                f"{type(self).__name__} can recommend to users who were in training alone; expected a method that "
                "needs no more of a user than a list of items, for example item_knn, mf or any federated method"
            )

    def embedding(self, state: Any, data: Training, users: Tensor) -> Embedding | None:
        """Vectors whose inner products are the scores; ``None`` for a method without vectors."""
        return None
