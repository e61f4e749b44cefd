"""Popularity: the same list for everybody, the baseline of every table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.method import Method, Training


@dataclass(frozen=True)
class Counts:
    """``counts`` [m] interactions of each item."""

    counts: Tensor


class Popularity(Method):
    """Ranks items by their number of interactions in the training data. There is no paper to depart from."""

    item_based = True
    seedless = True

    def init(self, data: Training, key: Key) -> Counts:
        return Counts(data.item_degrees.to(torch.float32))

    def scores(self, state: Counts, data: Training, users: Tensor) -> Tensor:
        return state.counts.repeat(users.numel(), 1)
