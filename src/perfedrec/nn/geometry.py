"""Subspaces, their angles, and the simplex."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.threads import one_thread
from perfedrec.nn.segments import by_length


def principal_directions(vectors: Tensor, segments: Tensor, n: int, number: int) -> Tensor:
    """[n, number, d] the leading principal directions (right singular vectors) of the ``vectors`` [T, d] of each client
    ``segments`` [T]; zeros where a client's vectors span fewer. The largest number of
    a direction is positive."""
    found = vectors.new_zeros(n, number, vectors.shape[1])
    with one_thread():
        for members, where, owner, slot in by_length(segments, n):
            padded = vectors.new_zeros(members.numel(), int(slot.max()) + 1, vectors.shape[1])
            padded[owner, slot] = vectors[where]
            if padded.shape[1] < padded.shape[2]:  # of X X^T and X^T X the smaller one
                values, left = torch.linalg.eigh(padded @ padded.mT)
                directions = functional.normalize(left.mT @ padded, dim=2)
            else:
                values, right = torch.linalg.eigh(padded.mT @ padded)
                directions = right.mT
            there = values > 1e-6 * values[:, -1:].clamp(min=1e-12)
            largest = directions.gather(2, directions.abs().argmax(2, keepdim=True))
            leading = (directions * largest.sign() * there[..., None]).flip(1)[:, :number]
            found[members, : leading.shape[1]] = leading
    return found


def mean_angles(first: Tensor, second: Tensor) -> Tensor:
    """[...] the mean of the k principal angles, in radians, between two subspaces, which the orthonormal rows of
    ``first`` and ``second`` [..., k, d] span. A row of zeros is at a right angle to everything."""
    cosines: Tensor = torch.linalg.svdvals(first @ second.mT)
    return cosines.clamp(max=1).acos().mean(-1)


def to_simplex(points: Tensor) -> Tensor:
    """[B, K] for each of ``points`` [B, K] the nearest point with numbers of at least 0 that sum to 1 (Duchi et al.,
    ICML 2008)."""
    ordered = points.sort(dim=1, descending=True).values
    over = (ordered.cumsum(1) - 1) / torch.arange(1, points.shape[1] + 1, device=points.device)
    last = (ordered > over).sum(1, keepdim=True) - 1
    return (points - over.gather(1, last)).clamp(min=0)
