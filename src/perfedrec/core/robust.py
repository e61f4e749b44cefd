"""Rules against malicious clients: bounds on what one client may change, and robust sums of the parts of a round.

A part is what one client sends (:class:`Robust` with ``separate``) or, where sums are secret, the sum of a group of
clients (``groups``). A rule sees the parts of a round of training side by side (:class:`Stack`) and makes one aggregate
of them, on the scale of their sum. In recommenders most item rows have few contributors. So the rules that compare
numbers compare, for each row, those parts alone that changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import FIXED_POINT, LARGEST, Aggregate, reduce
from perfedrec.core.compiled import usable
from perfedrec.core.keys import uniform
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Update

Name = Literal["none", "clip", "trimmed-mean", "median", "krum", "bulyan", "robust-z", "shortest", "quorum"]
"""The rules by name; "none" is the exact sum."""

BELOW = 1 - 2.0**-20
"""What is scaled to a bound becomes this much shorter, so that rounding does not lead above the bound again."""

FEWEST = 3
"""Of fewer parts no rule can tell which one is different: they are summed."""

USUAL = 0.01
"""Lengths that differ by less than this share of their median count as equal."""


# --- bounds on what one client may change ---


def hold_rows(update: Update, bound: float) -> Update:
    """The update with each changed row scaled to a norm of at most ``bound``; rows that are not finite become 0.

    Rows within the bound stay as they are, bit for bit.
    """
    deltas = update.deltas
    if deltas is None:
        return update
    norms = row_lengths(deltas)
    if bool((norms <= bound).all()):
        return update
    if not bool(norms.isfinite().all()):
        deltas = torch.where(norms.isfinite()[:, None], deltas, 0.0)
        norms = norms.nan_to_num(0.0, 0.0, 0.0)
    factors = torch.where(norms > bound, bound * BELOW / norms, 1.0)
    return replace(update, deltas=deltas * factors[:, None])


def hold_sum(part: Aggregate, bound: float) -> Aggregate:
    """The sum over several clients with each row scaled to a norm of at most ``bound`` for each of them."""
    norms, most = part.sums.square().sum(1).sqrt(), bound * part.clients * FIXED_POINT
    over = norms > most
    if not bool(over.any()):
        return part
    factors = torch.where(over, most * BELOW / norms, 1.0)
    return replace(part, sums=torch.where(over[:, None], (part.sums * factors[:, None]).round(), part.sums))


def group_numbers(sizes: Tensor, keys: Tensor, n_groups: int) -> Tensor:
    """[N] the group, from 0 to ``n_groups`` - 1, of each of N members of ``sizes`` [N] clients, at random by the
    members' ``keys`` [N]. Groups have about the same number of clients."""
    order = uniform(keys, 1).squeeze(1).argsort(stable=True)
    before = sizes[order].cumsum(0) - sizes[order]
    numbers = torch.empty_like(order)
    numbers[order] = torch.div(before * n_groups, sizes.sum(), rounding_mode="floor")
    return numbers


def row_lengths(table: Tensor, others: Tensor | None = None) -> Tensor:
    """[m] the lengths of the rows of a ``table`` [m, d], or those [K m] of its sums with the rows of ``others`` [K m,
    d]."""
    if table.dtype == torch.float32 and usable(table.detach(), others):
        from perfedrec.core import kernels

        sums = table if others is None else others
        found = table.new_empty(sums.shape[0])
        arrays = (table.detach(), table[:0] if others is None else others, found)
        kernels.row_lengths(*(each.numpy() for each in arrays))
        return found
    sums = table if others is None else (others.view(-1, *table.shape) + table).flatten(0, 1)
    return cast(Tensor, torch.linalg.vector_norm(sums, dim=1))


def long_rows(lengths: Tensor, multiple: float) -> tuple[Tensor, Tensor]:
    """The rows [r] of a table, of ``lengths`` [m], that are longer than ``multiple`` times the median length, and the
    factors [r, 1] that bring them to it."""
    middle = (lengths.numel() - 1) // 2
    longest = multiple * float(np.partition(lengths.cpu().numpy(), middle)[middle])  # torch's median takes longer
    over = (lengths > longest).nonzero().squeeze(1)
    return over, (longest / lengths[over])[:, None]


def hold_lengths(table: Tensor, multiple: float) -> None:
    """Scale each row of a ``table`` [m, d] to at most ``multiple`` times the median length of its rows, in place."""
    over, factors = long_rows(row_lengths(table), multiple)
    if over.numel():
        table[over] *= factors


# --- lengths of parts ---

BITS = 18
"""Binary digits, from the largest number of a part on, to which its numbers are rounded for its length."""


def lengths(rows: Tensor, owners: Tensor, n: int, dense: Tensor | None = None) -> Tensor:
    """[n] the length of each of n parts, from its numbers in fixed point: ``rows`` [R, d] of the parts ``owners`` [R],
    and a shared network's changes ``dense`` [n, D].

    The numbers of a part are rounded to :data:`BITS` digits below its largest one. So their squares are whole numbers
    with an exact sum, and a length is the same in whatever order, and with whatever kernel, it is computed.
    """
    largest = rows.new_zeros(n)
    if rows.numel():
        largest.scatter_reduce_(0, owners, rows.abs().amax(1), "amax")
    if dense is not None and dense.numel():
        largest = torch.maximum(largest, dense.abs().amax(1))
    scales = _scales(largest)
    squares = rows.new_zeros(n).index_add_(0, owners, (rows * scales[owners][:, None]).round_().square_().sum(1))
    if dense is not None:
        squares += (dense * scales[:, None]).round_().square_().sum(1)
    return squares.sqrt_().div_(scales)


def _scales(largest: Tensor) -> Tensor:
    """[n] the powers of 2 that bring the ``largest`` [n] numbers of parts to :data:`BITS` binary digits."""
    return torch.ldexp(torch.ones_like(largest), BITS - torch.frexp(largest).exponent)


def lengths_of(update: Update) -> Tensor | None:
    """[B] the :func:`lengths` of what the clients of an ``update`` send in training; ``None`` where some of it cannot
    be told from the changes of rows alone, is not finite, or is so large that a sum could not hold it."""
    deltas, segments, weights = update.deltas, update.segments, update.weights
    if deltas is None or segments is None or update.dense is not None or update.edges is not None:
        return None
    if update.reports is not None and not bool(update.reports.isfinite().all()):
        return None
    n = update.users.numel()
    if deltas.dtype == weights.dtype == torch.float32 and usable(deltas, weights, segments):
        from perfedrec.core import kernels

        bits, squares = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.float64)
        kernels.largest_of_parts(deltas.view(torch.int32).numpy(), segments.numpy(), bits.numpy())
        largest = bits.view(torch.float32).to(torch.float64).mul_(weights * FIXED_POINT).round_()
        if not bool((largest < LARGEST * FIXED_POINT).all()):
            return None
        scales = _scales(largest)
        arrays = (deltas, weights, segments, scales, squares)
        kernels.squares_of_parts(*(each.numpy() for each in arrays))
        sizes = squares.sqrt_().div_(scales)
    else:
        fixed = deltas.to(torch.float64, copy=True).mul_((weights * FIXED_POINT)[segments][:, None]).round_()
        if not bool(fixed.isfinite().all()):
            return None
        sizes = lengths(fixed, segments, n)
    return sizes if bool((sizes < LARGEST * FIXED_POINT / n).all()) else None


# --- the parts of a round, side by side ---


@dataclass(frozen=True)
class Stack:
    """P parts side by side: R rows, the part ``owners`` [R] of each, its place ``places`` [R] among the U distinct
    ``keys`` [U], and its numbers ``rows`` [R, d]; and the parts themselves."""

    parts: list[Aggregate]
    keys: Tensor
    owners: Tensor
    places: Tensor
    rows: Tensor

    @staticmethod
    def of(parts: list[Aggregate], filled: bool = False) -> Stack:
        """The stack of some ``parts``. Where it is ``filled``, a row that a part does not have counts as zeros: a
        secret sum leaves out rows of zeros."""
        dim = max(each.sums.shape[1] for each in parts)
        wide = [each if each.sums.shape[1] else replace(each, sums=each.sums.new_zeros(0, dim)) for each in parts]
        keys, places = torch.cat([each.keys for each in wide]).unique(return_inverse=True)
        counts = torch.tensor([each.keys.numel() for each in wide], device=keys.device)
        owners = torch.arange(len(wide), device=keys.device).repeat_interleave(counts)
        rows = torch.cat([each.sums for each in wide])
        if filled:
            table = rows.new_zeros(len(wide), keys.numel(), dim)
            table[owners, places] = rows
            owners = torch.arange(len(wide), device=keys.device).repeat_interleave(keys.numel())
            places = torch.arange(keys.numel(), device=keys.device).repeat(len(wide))
            rows = table.flatten(0, 1)
        return Stack(parts, keys, owners, places, rows)

    @property
    def counts(self) -> Tensor:
        """[U] how many parts changed each row."""
        return torch.bincount(self.places, minlength=self.keys.numel())

    @property
    def lengths(self) -> Tensor:
        """[P] the norm of each part, a shared network's changes included."""
        dense = [each.dense for each in self.parts if each.dense is not None]
        return lengths(self.rows, self.owners, len(self.parts), torch.stack(dense) if dense else None)

    def summed(self, rows: Tensor) -> Tensor:
        """[U, d] the sums of ``rows`` [R, d] by key."""
        return rows.new_zeros(self.keys.numel(), rows.shape[1]).index_add_(0, self.places, rows)

    @property
    def starts(self) -> Tensor:
        """[U + 1] the first row of each key once rows are in the order of keys, and R."""
        return functional.pad(self.counts.cumsum(0), (1, 0))

    def products(self) -> Tensor:
        """[P, P] the inner products of the parts with each other."""
        if self.rows.shape[0] == len(self.parts) * self.keys.numel():  # all have all rows, in one order: sums of groups
            whole = self.rows.view(len(self.parts), -1)
            with one_thread():
                return whole @ whole.T
        if usable(self.rows, self.owners, self.places):
            from perfedrec.core import part_kernels

            found = self.rows.new_zeros(len(self.parts), len(self.parts))
            arrays = (self.rows, self.owners, self.places, self.starts, found)
            part_kernels.add_products(*(each.numpy() for each in arrays))
            return found
        from scipy import sparse  # here, because most runs compare nothing

        dim, rows = self.rows.shape[1], self.rows.cpu().numpy()
        columns = (self.places.cpu().numpy()[:, None] * dim + np.arange(dim)).ravel()
        owners = np.repeat(self.owners.cpu().numpy(), dim)
        shape = (len(self.parts), self.keys.numel() * dim)
        vectors = sparse.csr_array((rows.ravel(), (owners, columns)), shape=shape)
        return torch.from_numpy((vectors @ vectors.T).toarray())


Rule = Callable[[Stack], Aggregate]
"""Makes one aggregate of the parts in a stack."""


def total(parts: list[Aggregate], factors: Tensor | None = None) -> Aggregate:
    """The exact sum of ``parts``, each times its factor of ``factors`` [P], and what is collected of all of them."""
    stack, first = Stack.of(parts), parts[0]
    rows, weights = stack.rows, torch.stack([each.weights for each in parts])
    if factors is not None:
        rows = (rows * factors[stack.owners][:, None]).round()
    found = {}
    for name in ("report_users", "reports", "edges"):
        values = [value for each in parts if (value := getattr(each, name)) is not None]
        found[name] = torch.cat(values) if values else None
    return Aggregate(
        n_items=first.n_items,
        clients=sum(each.clients for each in parts),
        keys=stack.keys,
        sums=stack.summed(rows),
        weights=weights.sum(0),
        dense=_dense(parts, lambda values: (values if factors is None else values * factors[:, None]).sum(0)),
        **found,
    )


def _dense(parts: list[Aggregate], combine: Callable[[Tensor], Tensor]) -> Tensor | None:
    """What ``combine`` makes of the changes [P, D] of a shared network."""
    values = [each.dense for each in parts if each.dense is not None]
    return combine(torch.stack(values)).round() if values else None


def chosen(parts: list[Aggregate], kept: Tensor) -> Aggregate:
    """The sum of the ``kept`` [P] parts, brought to the scale of all of them: a mean of it is the mean of those."""
    mine = [each for each, keep in zip(parts, kept.tolist(), strict=True) if keep]
    clients = sum(each.clients for each in parts)
    found = total(mine)
    scale = clients / max(found.clients, 1)
    dense = None if found.dense is None else (found.dense * scale).round()
    sums, weights = (found.sums * scale).round(), (found.weights * scale).round()
    return replace(found, clients=clients, sums=sums, weights=weights, dense=dense)


# --- rules ---


def clip(stack: Stack, threshold: float) -> Aggregate:
    """The sum of all parts, each scaled to a norm of at most ``threshold`` times the median norm (norm clipping with
    a threshold from the data; Sun et al., arXiv 1911.07963, have a fixed one)."""
    return total(stack.parts, shortened(stack.lengths, threshold))


def shortened(lengths: Tensor, threshold: float) -> Tensor:
    """The factors [P] of :func:`clip` for parts of these ``lengths`` [P]."""
    most = threshold * float(np.median(lengths.cpu().numpy()))
    return (most / lengths.clamp(min=1e-30)).clamp(max=1.0)


def trimmed_mean(stack: Stack, share: float) -> Aggregate:
    """The coordinate-wise trimmed mean (Yin et al., ICML 2018, definition 2), times the number of contributors.

    Of the c parts that changed a row, ``ceil(share c)`` at each end are left out of each coordinate, and never so many
    that none is left. Departs from the paper: c is the number of contributors of the row, not of all parts; with all of
    them the mean of nearly all rows would be 0, because most clients do not touch them.
    """
    counts = stack.counts
    trimmed = torch.minimum((counts * share - 1e-9).ceil().to(torch.int64), (counts - 1).div(2, rounding_mode="floor"))
    return _by_rank(stack, trimmed)


def median(stack: Stack) -> Aggregate:
    """The coordinate-wise median (Yin et al., ICML 2018, definition 1) of those who contributed to a row, times their
    number."""
    return _by_rank(stack, (stack.counts - 1).div(2, rounding_mode="floor"))


def _by_rank(stack: Stack, trimmed: Tensor) -> Aggregate:
    """For each row and coordinate the mean without the ``trimmed`` [U] smallest and largest, times the number of
    contributors."""
    sums, counts, n = _inner(stack, trimmed), stack.counts, len(stack.parts)
    scale = counts / (counts - 2 * trimmed)

    def combine(values: Tensor) -> Tensor:
        kept = max(int(trimmed.max()), 0) if trimmed.numel() else 0
        kept = min(kept, (n - 1) // 2)
        inner = values.sort(0).values[kept : values.shape[0] - kept]
        return inner.mean(0) * values.shape[0]

    return replace(
        total(stack.parts), sums=(sums * scale[:, None]).round(), dense=_dense(stack.parts, combine), keys=stack.keys
    )


def _inner(stack: Stack, trimmed: Tensor) -> Tensor:
    """[U, d] for each row and coordinate the exact sum without the ``trimmed`` [U] smallest and largest."""
    rows, counts, places = stack.rows, stack.counts, stack.places
    sums = rows.new_zeros(stack.keys.numel(), rows.shape[1])
    if usable(rows, places, trimmed):
        from perfedrec.core import part_kernels

        part_kernels.add_inner(*(each.numpy() for each in (rows, places, stack.starts, trimmed, sums)))
        return sums
    order = rows.argsort(dim=0)
    order = order.gather(0, places[order].argsort(dim=0, stable=True))  # by row, and in a row by value
    values, places = rows.gather(0, order), places.sort().values
    ranks = torch.arange(places.numel(), device=places.device) - (counts.cumsum(0) - counts)[places]
    inside = (ranks >= trimmed[places]) & (ranks < (counts - trimmed)[places])
    return sums.index_add_(0, places, values * inside[:, None])


def distances(stack: Stack) -> Tensor:
    """[P, P] the squared distances of the parts from each other."""
    products = stack.products()
    squares = products.diagonal()
    return (squares[:, None] + squares[None] - 2 * products).clamp(min=0)


def closest(apart: Tensor, n_malicious: int, n_chosen: int) -> Tensor:
    """[P] bool: the ``n_chosen`` parts with the smallest scores of Krum, from their squared distances ``apart`` [P, P].

    A part's score is the sum of the distances to its ``P - n_malicious - 2`` nearest others (at least one).
    """
    n = apart.shape[0]
    near = max(n - n_malicious - 2, 1)
    scores = apart.sort(1).values[:, 1 : near + 1].sum(1)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[scores.argsort(stable=True)[: max(n_chosen, 1)]] = True
    return kept


def krum(stack: Stack, share: float) -> Aggregate:
    """Multi-Krum (Blanchard et al., NeurIPS 2017): the mean of the parts that are nearest to others, all but the
    ``share`` that may be malicious, on the scale of all parts."""
    n = len(stack.parts)
    f = ceil(share * n)
    return chosen(stack.parts, closest(distances(stack), f, n - f))


def bulyan(stack: Stack, share: float) -> Aggregate:
    """Bulyan (El Mhamdi et al., ICML 2018): Krum chooses ``P - 2 f`` parts, and of each coordinate the f smallest and
    largest of them are left out.

    Departs from the paper: Krum chooses all at once, not one after the other; a trimmed mean takes the place of the
    mean of those nearest to the median; both are over those who contributed to a row.
    """
    n = len(stack.parts)
    f = ceil(share * n)
    kept = closest(distances(stack), f, max(n - 2 * f, 1))
    mine = [each for each, keep in zip(stack.parts, kept.tolist(), strict=True) if keep]
    found = trimmed_mean(Stack.of(mine), min(f / len(mine), 0.49))
    scale = sum(each.clients for each in stack.parts) / max(found.clients, 1)
    dense = None if found.dense is None else (found.dense * scale).round()
    return replace(
        found,
        clients=sum(each.clients for each in stack.parts),
        sums=(found.sums * scale).round(),
        weights=(found.weights * scale).round(),
        dense=dense,
    )


def robust_z(stack: Stack, threshold: float) -> Aggregate:
    """The parts whose length is not an outlier, on the scale of all: its distance from the median length is at most
    ``threshold`` times the median of such distances, over 0.6745 (the modified z-score of Iglewicz and Hoaglin,
    1993)."""
    return chosen(stack.parts, alike(stack.lengths, threshold))


def shortest(stack: Stack, share: float) -> Aggregate:
    """The parts without the ``share`` of them that are longest, on the scale of all (ours).

    Krum takes for honest what is near to others, and sums of groups with one liar each are near to each other. A lie
    that counts for many clients makes each of them long.
    """
    n = len(stack.parts)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[stack.lengths.argsort(stable=True)[: n - ceil(share * n)]] = True
    return chosen(stack.parts, kept)


def alike(lengths: Tensor, threshold: float) -> Tensor:
    """bool [P] whether each of ``lengths`` [P] is no outlier; see :func:`robust_z`."""
    middle = lengths.quantile(0.5)
    apart = (lengths - middle).abs()
    usual = apart.quantile(0.5).clamp(min=float(middle) * USUAL)
    return 0.6745 * apart <= threshold * usual


def quorum(stack: Stack, least: int) -> Aggregate:
    """The sum without rows that fewer than ``least`` parts changed: nobody moves a row alone (ours)."""
    found, enough = total(stack.parts), stack.counts >= least
    return replace(found, keys=stack.keys[enough], sums=found.sums[enough])


def ceil(value: float) -> int:
    """The next whole number, where rounding may have made the ``value`` of a share a little too large."""
    return int(-(-(value - 1e-9) // 1))


# --- the aggregator ---


@dataclass(frozen=True)
class Robust:
    """An :class:`~perfedrec.core.aggregate.Aggregator` by a ``rule`` over the parts of those ``phases`` where clients
    can be compared; in other phases it is the exact sum.

    ``separate``: a part is one client. With ``groups`` above 0 a part is the sum of a group of the cohort. A rule that
    multiplies each part by a number which follows from the lengths [P] of all has ``factors``, so that who has the
    update of all clients need not take it apart.
    """

    rule: Rule
    phases: frozenset[str]
    separate: bool = True
    groups: int = 0
    factors: Callable[[Tensor], Tensor] | None = None

    def at_once(self, phase: str, update: Update, n_items: int, n_groups: int) -> Aggregate | None:
        """What :meth:`combine` makes of the parts of a whole cohort's ``update``, bit for bit; ``None`` where that
        needs the parts."""
        if not self.separate or self.factors is None or phase not in self.phases or update.users.numel() < FEWEST:
            return None
        sizes = lengths_of(update)
        return None if sizes is None else reduce(update, n_items, n_groups, self.factors(sizes))

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        """The aggregate by the rule; see :class:`perfedrec.core.aggregate.Aggregator`."""
        found = [each for each in parts if each.clients]
        if len(found) < 2:
            return found[0] if found else empty
        if phase not in self.phases or len(found) < FEWEST or not any(each.sums.shape[1] for each in found):
            return total(found)
        return self.rule(Stack.of(found, filled=self.groups > 0))


def rule_of(name: Name, malicious: float, threshold: float, least: int) -> Rule | None:
    """The rule of a ``name`` with its options; ``None`` for the exact sum."""
    rules: dict[str, Rule] = {
        "clip": lambda stack: clip(stack, threshold),
        "trimmed-mean": lambda stack: trimmed_mean(stack, malicious),
        "median": median,
        "krum": lambda stack: krum(stack, malicious),
        "bulyan": lambda stack: bulyan(stack, malicious),
        "robust-z": lambda stack: robust_z(stack, threshold),
        "shortest": lambda stack: shortest(stack, malicious),
        "quorum": lambda stack: quorum(stack, least),
    }
    return rules.get(name)


def factors_of(name: Name, threshold: float) -> Callable[[Tensor], Tensor] | None:
    """What :attr:`Robust.factors` is for the rule of a ``name``."""
    return partial(shortened, threshold=threshold) if name == "clip" else None
