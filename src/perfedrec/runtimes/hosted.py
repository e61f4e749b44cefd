"""A part of the users of a federation, as one node or one worker hosts it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from perfedrec.core.algorithm import C
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Rows
from perfedrec.runtimes.population import USERS_OF, Population


class Hosted(Population[C]):
    """The users of one node or worker, known by their identities ``users`` [h], ascending.

    ``offsets`` [h + 1], ``items`` and ``attributes`` [h, F] hold the data of these users, in the same order.
    """

    def __init__(
        self, users: Tensor, offsets: Tensor, items: Tensor, n_items: int, attributes: Tensor | None = None
    ) -> None:
        super().__init__(offsets, items, n_items, attributes)
        self.users = users

    @staticmethod
    def part(population: Population[C], users: Tensor) -> Hosted[C]:
        """These ``users`` [h] of a population, as they are on a node or worker."""
        users = users.sort().values
        rows, _ = population.rows(users)
        return Hosted(users, rows.offsets, rows.items, population.n_items, rows.attributes)

    def everyone(self) -> Tensor:
        """[h] all these users."""
        return self.users

    def rows(self, users: Tensor) -> tuple[Rows, Tensor]:
        """The rows of ``users`` [B], and their positions among all interactions here. Raises
        :class:`PerfedrecError` for users that it does not host."""
        rows, positions = super().rows(self._places(users))
        return replace(rows, users=users), positions

    def load_client_states(self, users: Tensor, positions: Tensor, unread: Collection[str] = ()) -> C:
        return super().load_client_states(self._places(users), positions, unread)

    def save_client_states(self, users: Tensor, positions: Tensor, client_state: C, before: C | None = None) -> None:
        super().save_client_states(self._places(users), positions, client_state, before)

    def written(self, users: Tensor) -> dict[str, Tensor]:
        return _renamed(super().written(self._places(users)), self._numbers)

    def write(self, written: Mapping[str, Tensor]) -> None:
        super().write(_renamed(written, self._places))

    def _numbers(self, places: Tensor) -> Tensor:
        return self.users[places]

    def _places(self, users: Tensor) -> Tensor:
        places = torch.searchsorted(self.users, users)
        if bool((places == self.users.numel()).any()) or not torch.equal(self.users[places], users):
            raise PerfedrecError(
                f"this node was asked for users that it does not host; expected some of its {self.users.numel()}"
            )
        return places


def _renamed(written: Mapping[str, Tensor], names: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What was ``written`` of client states, with other numbers of its users."""
    return {name: names(value) if name.startswith(USERS_OF) else value for name, value in written.items()}
