"""Clip and noise at work: on single uploads, and on the sums that leave a group of clients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.core.keys import Key, laplace
from perfedrec.core.types import Update
from perfedrec.privacy.mechanisms import bound_of, fewest, share_scale
from perfedrec.privacy.noise import opendp_noised, row_noise, summed_noise
from perfedrec.privacy.settings import PrivacySettings

_BELOW = 1 - 2.0**-20


def protect(values: Tensor, settings: PrivacySettings, keys: Tensor) -> Tensor:
    """The paper's mechanism: clip each coordinate, and add Laplace noise drawn per row by ``keys`` [T], or
    by OpenDP.

    ``values`` [T, d]. The clip bound holds exactly for what the noise is added to. Nothing is done for other norms,
    which :func:`bounded` takes care of.
    """
    if settings.clip is not None and settings.norm == "coordinate":
        values = values.clamp(-settings.clip, settings.clip)
    if settings.noise_scale and settings.noise_source == "opendp":
        if values.numel():
            noised = opendp_noised("laplace", values.detach().cpu().numpy(), settings.noise_scale)
            values = torch.from_numpy(noised).to(values)
    elif settings.noise_scale:
        values = laplace(keys, values.shape[-1]).mul_(settings.noise_scale).add_(values)
    return values


def stretched(values: Tensor, segments: Tensor, n: int, settings: PrivacySettings) -> Tensor:
    """``values`` [T, d] with each of the ``n`` users' largest number brought to the clip, where noise is added to each.

    For releases of pre-training, whose scale is arbitrary: noise of a given scale would drown them otherwise.
    """
    if not settings.noise_scale or settings.clip is None:
        return values
    largest = values.new_zeros(n).scatter_reduce_(0, segments, values.abs().amax(1), "amax")
    return values * (settings.clip / largest.clamp(min=1e-30))[segments, None]


def bounded(update: Update, settings: PrivacySettings, phase: str) -> Update:
    """Bound the norm of everything that each client sends; in a release of pre-training, bring it to that length.

    Values lie on the grid of the sums afterwards, and the bound holds for these values without any rounding error.
    """
    bound = bound_of(settings, phase)
    if bound is None:
        return update
    norms = joint_norms(update, settings.norm)
    factors = bound / norms.clamp(min=1e-30)
    if phase == "train":
        factors.clamp_(max=1.0)
    factors[norms == 0] = 1.0
    over = norms * factors > bound * _BELOW
    factors = torch.where(over, factors * _BELOW, factors)  # what rounding to float32 and to the grid may add
    deltas, dense = update.deltas, update.dense
    if deltas is not None and update.segments is not None:
        deltas = _on_grid(deltas * factors[update.segments, None])
    if dense is not None:
        dense = _on_grid(dense * factors[:, None])
    return replace(update, deltas=deltas, dense=dense)


def joint_norms(update: Update, norm: str) -> Tensor:
    """[B] float64 norms of everything that each client sends, L1 or L2."""
    n, total = update.users.numel(), torch.zeros(update.users.numel(), dtype=torch.float64)
    total = total.to(update.users.device)
    for values, segments in (
        (update.deltas, update.segments),
        (update.dense, torch.arange(n, device=total.device)),
    ):
        if values is not None and segments is not None:
            wide = values.to(torch.float64)
            total.index_add_(0, segments, (wide.abs() if norm == "l1" else wide.square()).sum(1))
    return total if norm == "l1" else total.sqrt()


def _on_grid(values: Tensor) -> Tensor:
    """float32 values on the grid of the sums, rounded towards zero: no norm grows by it."""
    wide = values.to(torch.float64)
    return (wide * FIXED_POINT).trunc_().div_(FIXED_POINT).to(torch.float32)


def released(aggregate: Aggregate, settings: PrivacySettings, phase: str, asked: int, key: Key) -> Aggregate:
    """The sum of some clients' uploads as it leaves them: with the noise that they add, of ``asked`` in the cohort.

    Noise is on every number of every row, touched or not. Shares add up: sums of parts of a cohort have, together, the
    noise of the whole. Weights are left out, because a group's weight is a count of clients that nobody has protected.
    Under secure aggregation without noise rows that are 0 are left out: a sum does not tell which ones were touched.
    """
    if not settings.sums:
        return aggregate
    aggregate = replace(aggregate, weights=torch.zeros_like(aggregate.weights))
    law, scale = share_scale(settings, phase, asked)
    if not scale or not aggregate.clients:
        if settings.aggregation == "secure":
            told = aggregate.sums.any(1)
            aggregate = replace(aggregate, keys=aggregate.keys[told], sums=aggregate.sums[told])
        return aggregate
    n_rows, device = aggregate.weights.numel() * aggregate.n_items, aggregate.sums.device

    def noisy(values: Tensor, what: str) -> Tensor:
        shape, source = tuple(values.shape), settings.noise_source
        noise = summed_noise(law, shape, scale, aggregate.clients, key.fold(what), source)
        return values + noise.mul_(FIXED_POINT).round_().to(device)

    keys, sums = aggregate.keys, aggregate.sums
    if sums.shape[1]:
        sums = noisy(sums.new_zeros(n_rows, sums.shape[1]).index_copy_(0, keys, sums), "rows")
        keys = torch.arange(n_rows, device=device)
    dense = None if aggregate.dense is None else noisy(aggregate.dense, "dense")
    return replace(aggregate, keys=keys, sums=sums, dense=dense)


def aborted(clients: int, settings: PrivacySettings, phase: str, asked: int) -> bool:
    """Whether too few answered: the noise of a sum would be too small, or a sum would be one client's upload."""
    if settings.aggregation != "secure":
        return False
    return clients < (fewest(settings, asked) - 1e-9 if settings.noise.of(phase) else min(2, asked))


def as_seen(update: Update, settings: PrivacySettings, phase: str, n_items: int, key: Key) -> Tensor:
    """[B, m, d] dense uploads as the coordinator receives them, each with its own noise (simulation; for audits)."""
    assert update.deltas is not None
    assert update.segments is not None
    assert update.items is not None
    n, dim = update.users.numel(), update.deltas.shape[1]
    seen = torch.zeros(n, n_items, dim)
    seen[update.segments, update.items] = update.deltas
    law, scale = share_scale(settings, phase, 1)
    if scale:
        keys = key.fold("own").spread(update.users)
        seen += row_noise(law, keys, n_items * dim, scale).reshape(seen.shape)
    return seen
