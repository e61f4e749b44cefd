"""Networks whose weights lie flat in one vector, so that each client of a block can have weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from perfedrec.core.keys import Key, fold_in, normal
from perfedrec.nn.segments import by_length


@dataclass(frozen=True)
class Flat:
    """The ``shapes`` of a network's weight matrices and vectors, in the order in which they lie in a flat vector."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """D, the number of weights."""
        return sum(prod(shape) for shape in self.shapes)

    def init(self, key: Key, scales: Sequence[float]) -> Tensor:
        """[D] normal draws for one network, each shape's times its scale."""
        point = torch.zeros((), dtype=torch.int64)
        return torch.cat(
            [
                normal(key.fold(number).spread(point), prod(shape)) * scale
                for number, (shape, scale) in enumerate(zip(self.shapes, scales, strict=True))
            ]
        )

    def init_each(self, keys: Tensor, scales: Sequence[float]) -> Tensor:
        """[B, D] the same for B networks, one for each of the ``keys`` [B]."""
        return torch.cat(
            [
                normal(fold_in(keys, torch.full_like(keys, number)), prod(shape)) * scale
                for number, (shape, scale) in enumerate(zip(self.shapes, scales, strict=True))
            ],
            dim=1,
        )

    def unpack(self, weights: Tensor) -> list[Tensor]:
        """The weights [..., *shape] of each shape, out of flat ones [..., D]."""
        sizes = [prod(shape) for shape in self.shapes]
        parts = zip(weights.split(sizes, dim=-1), self.shapes, strict=True)
        return [part.unflatten(-1, shape) for part, shape in parts]


def apply_per_client(
    network: Callable[[Tensor, Sequence[Tensor]], Tensor], rows: Sequence[Tensor], segments: Tensor, n: int
) -> Tensor:
    """Apply each client's own network to its rows: [T, ...] what ``network`` makes of each row.

    ``rows`` are tensors [T, ...] of which ``segments`` [T] (any order) name the client, below ``n``. ``network`` is
    called for groups of C clients with these clients [C] and the rows padded to [C, L, ...], and returns [C, L, ...].
    """
    results, places = [], []
    for members, where, owner, slot in by_length(segments, n):
        size = (members.numel(), int(slot.max()) + 1)
        padded = [each.new_zeros(*size, *each.shape[1:]).index_put((owner, slot), each[where]) for each in rows]
        results.append(network(members, padded)[owner, slot])
        places.append(where)
    if not results:
        return network(segments[:0], [each.new_zeros(0, 1, *each.shape[1:]) for each in rows]).flatten(0, 1)
    return torch.cat(results)[torch.cat(places).argsort()]
