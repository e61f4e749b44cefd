"""Networks whose weights are stored in one flat vector, so that each client of a block can have its own weights."""

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
    """The ``shapes`` of the weight matrices and vectors of a network, in their order in the flat vector."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """D, the number of weights."""
        return sum(prod(shape) for shape in self.shapes)

    def init(self, key: Key, scales: Sequence[float]) -> Tensor:
        """[D] initial weights of one network: normal draws, multiplied by the scale of their shape."""
        point = torch.zeros((), dtype=torch.int64)
        return torch.cat(
            [
                normal(key.fold(number).spread(point), prod(shape)) * scale
                for number, (shape, scale) in enumerate(zip(self.shapes, scales, strict=True))
            ]
        )

    def init_each(self, keys: Tensor, scales: Sequence[float]) -> Tensor:
        """[B, D] initial weights of B networks, one for each of the ``keys`` [B]; as in :meth:`init`."""
        return torch.cat(
            [
                normal(fold_in(keys, torch.full_like(keys, number)), prod(shape)) * scale
                for number, (shape, scale) in enumerate(zip(self.shapes, scales, strict=True))
            ],
            dim=1,
        )

    def unpack(self, weights: Tensor) -> list[Tensor]:
        """Split flat weights [..., D] into the weights [..., *shape] of each shape."""
        sizes = [prod(shape) for shape in self.shapes]
        parts = zip(weights.split(sizes, dim=-1), self.shapes, strict=True)
        return [part.unflatten(-1, shape) for part, shape in parts]


def apply_per_client(
    network: Callable[[Tensor, Sequence[Tensor]], Tensor], rows: Sequence[Tensor], segments: Tensor, n: int
) -> Tensor:
    """Apply the network of each client to the rows of this client. Returns the results of all rows [T, ...].

    ``rows`` are tensors [T, ...], and ``segments`` [T], in any order, are the clients of the rows, numbers below ``n``.
    ``network`` is called for groups of C clients. It gets these clients [C] and their rows, padded to [C, L, ...], and
    returns [C, L, ...].
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
