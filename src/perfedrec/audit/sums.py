"""Attacks on sums over the clients of a round, as pure functions of what the coordinator sees: a sum of item tables
[m, d] (a row per item) and the users who took part.

A row to which one client alone contributed is this client's upload. In neighbour sums all rows of a client are one
vector times a number; in training they lie in few directions. So rows that lie in one direction, or in few, come from
the same client, and their items are a part of its list. Item lists are used only to measure what an attack found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from perfedrec.audit.attacks import Finding, precision_at_own

CHUNK = 512  # rows that are compared with all rows at a time
SIGNATURE = 1e-6  # 1 - cos of two signatures of one subspace, at most
RIGHT, FEWEST = 0.9, 3  # a group exposes its user if it has this share and this number of the user's items, or more


def collinear(rows: Tensor, items: Tensor, tolerance: float = 1e-6, fewest: int = 3) -> list[Tensor]:
    """Groups of ``items`` [k] whose rows, of ``rows`` [k, d], are multiples of one vector: ``|cos| > 1 - tolerance``,
    directly or through other rows of the group.

    Returns the items of each group with at least ``fewest`` rows, in ascending order. Rows of zeros are in no group.
    With d = 1 all rows are multiples of each other, which says nothing, so there are no groups.
    """
    unit, numbers = _unit(rows, items)
    if unit.shape[1] < 2:
        return []
    return _ordered(numbers[each] for each in _members(_alike(unit, tolerance)) if each.numel() >= fewest)


def same_subspace(
    rows: Tensor, items: Tensor, rank: int, tolerance: float = 1e-4, fewest: int | None = None, smallest: int = 1
) -> list[Tensor]:
    """Groups of ``items`` [k] whose rows, of ``rows`` [k, d], lie in one subspace of ``smallest`` to ``rank``
    dimensions.

    Sparse self-representation (SSC-OMP; You, Robinson, Vidal, CVPR 2016): each row is represented by at most ``rank``
    other rows, chosen greedily. It is exact where what remains is at most ``tolerance`` of the row's length, which rows
    in general position never reach if d is some dimensions larger than ``rank``. The next row is chosen by what then
    remains (orthogonal least squares), not by its inner product with the rest, because the rows of a client are often
    nearly collinear. Two rows are linked if both are exact and their representations, by equally many rows, span one
    subspace: a sum of a row each of two clients links to neither. A row that the greedy choice misses joins the group
    whose subspace contains it.

    The rows of a client's negatives lie in fewer dimensions than those of its own items (one per local step, and one
    more), so they form other groups, which ``smallest`` can leave out; a ``tolerance`` of 1e-6 then keeps dimensions
    apart in which rows are short. Returns the items of each group with at least ``fewest`` rows (by default ``rank +
    2``), in ascending order; no groups if d is at most ``rank``.
    """
    unit, numbers = _unit(rows, items)
    least = rank + 2 if fewest is None else fewest
    if unit.shape[1] <= rank or unit.shape[0] < 2:
        return []
    chunks = [_represent(unit, each, rank, tolerance) for each in torch.arange(unit.shape[0]).split(CHUNK)]
    bases, sizes = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    seeds, free = list[Tensor](), torch.ones(unit.shape[0], dtype=torch.bool)
    for size in range(1, rank + 1):
        here = (sizes == size).nonzero().squeeze(1)
        groups = _members(_alike(_signatures(bases[here, :size]), SIGNATURE))
        seeds += [here[each] for each in groups if each.numel() >= 2]
    free[torch.cat([*seeds, torch.arange(0)])] = False
    seeds = [each for each in seeds if sizes[each[0]] >= smallest]
    found = _joined(unit, free.nonzero().squeeze(1), bases, seeds, tolerance)
    return _ordered(numbers[each] for each in found if each.numel() >= least)


def few_contributors(
    rows: Tensor, items: Tensor, groups: Sequence[Tensor], most: int = 5, tolerance: float = 1e-5
) -> list[Tensor]:
    """Each of ``groups`` (items), extended by the items whose rows have 2 to ``most`` contributors, all of them known.

    ``rows`` [k, d] and ``items`` [k] are the table. A row that is a combination of the directions of few groups, exact
    to ``tolerance`` of its length, belongs to each of these groups; rows in general position are never exact. The
    groups are chosen by orthogonal matching pursuit, up to twice ``most`` of them, so that a wrong first choice can
    still get the weight 0. Groups that span more than d / 4 dimensions are left as they are.

    Where all rows of a group point the same way (neighbour sums), so do its parts of other rows: weights must be
    positive. Items that the same few clients share then form a group of their own, which is a combination of these
    clients' groups; it is left as it is, and its items are added to theirs. (In training, clients contribute to the
    rows of their negatives as well, and all such items are added.) Returns the items of each group, in order, sorted.
    """
    unit, numbers = _unit(rows, items)
    bases, positive = _directions(unit, numbers, groups, tolerance)
    found = [set(each.tolist()) for each in groups]
    one_way, usable = positive.nonzero(), bases.flatten(1).any(1)
    for at, _ in _combined(bases[one_way[:, 0], 0], one_way, bases, positive, positive, most, tolerance):
        usable[one_way[at]] = False
    nothing = torch.zeros(unit.shape[0], 0, dtype=torch.int64)
    for at, parts in _combined(unit, nothing, bases, positive, usable, most, tolerance):
        for part in parts:
            found[part].add(int(numbers[at]))
    return [torch.tensor(sorted(each), dtype=torch.int64) for each in found]


def shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    """The control: ``rows`` [k, d] with each column permuted by itself, over the rows that are not 0. The columns keep
    their numbers, but nothing ties the rows of a client together."""
    places = rows.any(1).nonzero().squeeze(1)
    order = torch.rand(places.numel(), rows.shape[1], generator=generator).argsort(0)
    return rows.index_copy(0, places, rows[places].gather(0, order))


def _unit(rows: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """The nonzero rows [k', d] with length 1, in float64, and their items [k']."""
    wide = rows.detach().to(torch.float64)
    length = wide.norm(dim=1)
    kept = (length > 0) & length.isfinite()
    return wide[kept] / length[kept, None], items[kept]


def _alike(unit: Tensor, tolerance: float) -> NDArray[np.int64]:
    """[k] a row number for each row of ``unit`` [k, d], the same for rows that are linked by ``|cos| > 1 - tolerance``,
    directly or through others."""
    k = unit.shape[0]
    first: NDArray[np.int64] = np.arange(k)
    for start in range(0, k, CHUNK):
        near = (unit[start : start + CHUNK] @ unit[start:].T).abs_() > 1 - tolerance
        left, right = (each.numpy() + start for each in near.nonzero(as_tuple=True))
        ends = np.concatenate([left, np.arange(k)]), np.concatenate([right, first])
        labels = connected_components(csr_array((np.ones(ends[0].size), ends), shape=(k, k)), directed=False)[1]
        _, start_of, inverse = np.unique(labels, return_index=True, return_inverse=True)
        first = start_of[inverse]
    return first


def _members(labels: NDArray[np.int64]) -> list[Tensor]:
    """The places of each label."""
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [torch.from_numpy(each) for each in parts if each.size]


def _ordered(groups: Iterable[Tensor]) -> list[Tensor]:
    """Groups of items in an order that does not depend on the order of rows."""
    return sorted((each.sort().values for each in groups), key=lambda each: each.tolist())


def _represent(unit: Tensor, mine: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Representations of the rows ``mine`` [n] of ``unit`` [k, d] by at most ``rank`` other rows: orthonormal bases
    [n, rank, d] of their spans, with zeros after the last, and their numbers of rows [n]; 0 where none is exact."""
    n, d = mine.numel(), unit.shape[1]
    bases, sizes = unit.new_zeros(n, rank, d), torch.zeros(n, dtype=torch.int64)
    rest, left = unit[mine], unit.new_ones(n, unit.shape[0])  # left: the squared length of each row outside the span
    left[torch.arange(n), mine] = 0.0
    searching = torch.arange(n)
    for step in range(rank):
        fit = (rest @ unit.T).square_().div_(left.clamp(min=1e-30))
        fit[left < tolerance**2] = 0.0  # what is left of such a row is rounding
        gain, best = fit.max(1)
        new = unit[best]
        for _ in range(2):  # once is not orthogonal enough
            new = new - (bases[searching].mT @ (bases[searching] @ new[:, :, None])).squeeze(2)
        new = torch.nn.functional.normalize(new, dim=1) * (gain > 0)[:, None]
        bases[searching, step] = new
        rest = rest - (rest * new).sum(1, keepdim=True) * new
        exact = rest.norm(dim=1) <= tolerance
        sizes[searching[exact]] = step + 1
        searching, rest, left, new = searching[~exact], rest[~exact], left[~exact], new[~exact]
        left -= (new @ unit.T).square_()
    return bases, sizes


def _signatures(bases: Tensor) -> Tensor:
    """[n, 2 d] unit vectors that are equal where ``bases`` [n, s, d] span the same subspace: the projections of two
    fixed random vectors."""
    probes = torch.from_numpy(np.random.default_rng(0).standard_normal((bases.shape[2], 2)))
    return torch.nn.functional.normalize((bases.mT @ (bases @ probes)).flatten(1), dim=1)


def _joined(unit: Tensor, free: Tensor, bases: Tensor, seeds: Sequence[Tensor], tolerance: float) -> list[Tensor]:
    """``seeds`` (places of rows with the same subspace, in ``bases`` [k, s, d]), each with those of the places ``free``
    that lie in its subspace and in no other that is nearer."""
    if not seeds:
        return []
    spans = bases[torch.stack([each[0] for each in seeds])]
    nearest = []
    for mine in unit[free].split(CHUNK):
        inside = (mine @ spans.flatten(0, 1).T).square_().view(-1, *spans.shape[:2]).sum(2)
        largest, seed = inside.max(1)
        nearest.append(seed.where(1 - largest <= tolerance**2, -1))
    owner = torch.cat(nearest)
    return [torch.cat([each, free[owner == number]]) for number, each in enumerate(seeds)]


def _directions(unit: Tensor, items: Tensor, groups: Sequence[Tensor], tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal directions [G, s, d] of ``groups``, with zeros after a group's last, and for a group that spans more
    than d / 4 dimensions; and whether all rows of a group are positive multiples of its only direction [G]."""
    spans, positive = [unit.new_zeros(1, unit.shape[1])], list[bool]()
    for group in groups:
        mine = unit[torch.isin(items, group)]
        values, span = torch.linalg.svd(mine, full_matrices=False)[1:]
        size = int((values > tolerance * values[:1]).sum())
        size = size if size <= unit.shape[1] // 4 else 0
        along = mine @ span[:size].sum(0)
        turned = span[:size] if along.sum() > 0 else -span[:size]
        spans.append(turned)
        positive.append(size == 1 and bool((mine @ turned[0] > 0).all()))
    padded = torch.nn.utils.rnn.pad_sequence(spans, batch_first=True)
    return padded[1:], torch.tensor(positive, dtype=torch.bool)


def _combined(
    targets: Tensor, barred: Tensor, bases: Tensor, positive: Tensor, usable: Tensor, most: int, tolerance: float
) -> list[tuple[int, list[int]]]:
    """Which of ``targets`` [n, d], of length 1, are combinations of the directions of 2 to ``most`` groups, and of
    which. ``bases`` [G, s, d] and ``positive`` [G] are those of :func:`_directions`. Groups that are not ``usable`` [G]
    for any target, or ``barred`` [n, b] for one, take no part."""
    n_groups, size, d = bases.shape
    found: list[tuple[int, list[int]]] = []
    places, rest, chosen = torch.arange(targets.shape[0]), targets, barred
    for step in range(1, min(2 * most, d // 2 // size, int(usable.sum()) - barred.shape[1]) + 1):
        fit = (rest @ bases.flatten(0, 1).T).square_().view(-1, n_groups, size).sum(2)
        fit = fit.scatter_(1, chosen, -1.0).masked_fill_(~usable, -1.0)
        chosen = torch.cat([chosen, fit.argmax(1, keepdim=True)], dim=1)
        groups = chosen[:, barred.shape[1] :]
        basis = bases[groups].flatten(1, 2)
        gram = basis @ basis.mT
        gram.diagonal(dim1=1, dim2=2).add_((~basis.any(2)).to(basis.dtype) + 1e-12)  # directions of 0 get the weight 0
        weights = torch.linalg.solve(gram, basis @ targets[places, :, None])
        rest = targets[places] - (weights * basis).sum(1)
        exact = rest.norm(dim=1) <= tolerance
        parts = weights.view(places.numel(), step, size)
        large = parts.norm(dim=2) > tolerance
        wrong = large & positive[groups] & (parts[:, :, 0] < 0)
        right = exact & (large.sum(1) >= 2) & (large.sum(1) <= most) & ~wrong.any(1)
        found += [(int(places[at]), groups[at, large[at]].tolist()) for at in right.nonzero().squeeze(1).tolist()]
        places, rest, chosen = places[~exact], rest[~exact], chosen[~exact]
    return found


@dataclass(frozen=True)
class Exposure:
    """What ``groups`` groups of a round show of a cohort of ``cohort`` users.

    ``users`` are exposed: each is the best explanation of a group of which 90 % and at least 3 items are theirs.
    ``precision`` is the share of a group's items that its best user has, mean over all groups. ``share`` and
    ``largest_share``: mean and maximum over the exposed users of the share of their list that these groups show
    together. Means over nothing are 0.

    The controls need no sums: groups of the same sizes that hold the most popular items. ``popularity`` is their
    precision for the user who explains each best. It is the fair control for ``precision``, because both choose the
    user with the truth at hand. ``popular_users`` is how many users they expose: few, because they are all alike.
    ``popularity_of_anyone`` is their precision in the mean over the cohort, the fair control where the attacker knows
    the user beforehand.
    """

    cohort: int
    groups: int
    users: tuple[int, ...]
    precision: float
    share: float
    largest_share: float
    popularity: float
    popular_users: int
    popularity_of_anyone: float


@dataclass(frozen=True, eq=False)
class Owners:
    """For each of G groups the user of the cohort whose list explains it best, the ``precision`` (share of the group's
    items that this user has), the ``share`` of the user's list that the group shows, and the mean ``of_anyone`` of the
    precision over the cohort, all [G]. ``exposing`` [G]: whether the group exposes the user."""

    users: Tensor
    precision: Tensor
    share: Tensor
    of_anyone: Tensor
    exposing: Tensor


def owners(groups: Sequence[Tensor], offsets: Tensor, items: Tensor, cohort: Tensor) -> Owners:
    """For each of ``groups`` (distinct items) the user of ``cohort`` [n] who has most of its items and, among these,
    the one with the shortest list. The list of user u is ``items[offsets[u]:offsets[u + 1]]``."""
    users = cohort.unique()
    if not groups or not users.numel():
        none = torch.zeros(0)
        return Owners(users[:0], none, none, none, none > 0)
    lists = [items[offsets[each] : offsets[each + 1]] for each in users.tolist()]
    width = 1 + max(int(each.max()) for each in (*groups, *lists) if each.numel())
    common = torch.from_numpy((_indicator(groups, width) @ _indicator(lists, width).T).toarray())
    of_list = common / torch.tensor([max(each.numel(), 1) for each in lists])
    sizes = torch.tensor([max(each.numel(), 1) for each in groups])
    best = (common + of_list / 2).argmax(1)
    here = torch.arange(len(groups)), best
    precision = common[here] / sizes
    exposing = (precision >= RIGHT) & (common[here] >= FEWEST)
    return Owners(users[best], precision, of_list[here], common.mean(1) / sizes, exposing)


def exposed(groups: Sequence[Tensor], offsets: Tensor, items: Tensor, cohort: Tensor, degrees: Tensor) -> Exposure:
    """What ``groups`` (items) show of the users of ``cohort`` [n], with lists in ``offsets`` and ``items`` as for
    :func:`owners`, next to what the most popular items by ``degrees`` [m] show."""
    found = owners(groups, offsets, items, cohort)
    shown: dict[int, list[Tensor]] = {}
    for at in found.exposing.nonzero().squeeze(1).tolist():
        shown.setdefault(int(found.users[at]), []).append(groups[at])
    lists = {user: items[offsets[user] : offsets[user + 1]] for user in shown}
    shares = [float(torch.isin(lists[user], torch.cat(each)).double().mean()) for user, each in shown.items()]
    order = degrees.argsort(descending=True, stable=True)
    control = owners([order[: each.numel()] for each in groups], offsets, items, cohort)
    return Exposure(
        cohort=cohort.numel(),
        groups=len(groups),
        users=tuple(sorted(shown)),
        precision=_mean(found.precision.tolist()),
        share=_mean(shares),
        largest_share=max(shares, default=0.0),
        popularity=_mean(control.precision.tolist()),
        popular_users=control.users[control.exposing].unique().numel(),
        popularity_of_anyone=_mean(control.of_anyone.tolist()),
    )


def _indicator(sets: Sequence[Tensor], width: int) -> csr_array:
    """[len(sets), width] 1 where a set holds an item."""
    offsets, places = np.cumsum([0, *(each.numel() for each in sets)]), torch.cat(list(sets)).numpy()
    return csr_array((np.ones(places.size), places, offsets), shape=(len(sets), width))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


class Follower:
    """Follows groups over rounds, and names users by who took part.

    A group continues the earlier chain of groups that it shares most items with, if their Jaccard overlap is at least
    0.5 or at least 0.8 of the smaller one is in the other. The candidates of a chain are the users who took part in all
    of its rounds; one that would have none left is not continued. A chain with one candidate names this user.
    """

    def __init__(self) -> None:
        self._items: list[set[int]] = []
        self._candidates: list[set[int]] = []
        self._holding: dict[int, set[int]] = {}  # the chains that hold an item

    def see(self, groups: Sequence[Tensor], cohort: Tensor) -> None:
        """A round: its ``groups`` (items) and the user numbers of its ``cohort`` [n]."""
        present, sets = set(cohort.tolist()), [set(each.tolist()) for each in groups]
        earlier = [self._continued(each, present) for each in sets]  # before any group of this round is added
        for group, number in zip(sets, earlier, strict=True):
            if number is None:
                number = self.chains
                self._items.append(set())
                self._candidates.append(present)
            self._items[number] |= group
            self._candidates[number] = self._candidates[number] & present
            for item in group:
                self._holding.setdefault(item, set()).add(number)

    @property
    def chains(self) -> int:
        """How many chains there are."""
        return len(self._items)

    def named(self) -> dict[int, Tensor]:
        """The users who are named, each with the items of its chains, in ascending order."""
        found: dict[int, set[int]] = {}
        for items, candidates in zip(self._items, self._candidates, strict=True):
            if len(candidates) == 1:
                found.setdefault(next(iter(candidates)), set()).update(items)
        return {user: torch.tensor(sorted(each)) for user, each in sorted(found.items())}

    def _continued(self, group: set[int], present: set[int]) -> int | None:
        """The chain that ``group`` continues, if there is one that a user of the round can be."""
        best, found = 0.0, None
        for number, n in sorted(Counter(each for item in group for each in self._holding.get(item, ())).items()):
            chain = self._items[number]
            jaccard = n / len(group | chain)
            alike = jaccard >= 0.5 or n >= 0.8 * min(len(group), len(chain))
            if alike and n + jaccard > best and not self._candidates[number].isdisjoint(present):
                best, found = n + jaccard, number
        return found


def by_cohorts(sums: Tensor, took_part: Tensor, lift: Tensor | None, users: Tensor, ridge: float = 10.0) -> Tensor:
    """[B, m] scores of all items for ``users`` [B], from the ``sums`` [T, r, d] of T rounds and who took part in them,
    ``took_part`` [T, n].

    Ridge regression of the centred sums on the centred participation, in its dual form (a T x T system): it estimates
    what a user adds to a sum. An item's score is the length of its row of that, divided by the length of its row of
    ``lift`` [m, r], which gives back a row for each item (rows of 0 score 0). Without ``lift``, r = m and the divisor
    is the standard deviation of the item's row over the rounds, because rows that always vary say little.
    """
    part = took_part.to(torch.float64) - took_part.to(torch.float64).mean(0)
    system = part @ part.T + ridge * torch.eye(part.shape[0], dtype=torch.float64)
    weights = torch.linalg.solve(system, part[:, users]).T.to(sums.dtype)  # they add up to 0, which centres the sums
    divisor = sums.std(0, correction=0).norm(dim=1) if lift is None else lift.norm(dim=1)
    scores = []
    for few in weights.split(16):
        added = (few @ sums.flatten(1)).view(-1, *sums.shape[1:])
        scores.append((added if lift is None else lift.to(sums.dtype) @ added).norm(dim=2))
    return torch.cat(scores).div_(divisor + 1e-6)


def by_directions(table: Tensor, lift: Tensor | None, lists: Sequence[Tensor]) -> Tensor:
    """[n] for each of ``lists`` (the items of n users) the precision at its length of the items that come first along a
    singular direction of an opened ``table`` [r, d]: of the direction and sign that is best for the user.

    A user whose upload stands out in a sum bends a direction towards its items. Choosing the direction needs the truth,
    so the result means something only beside that of users who did not take part, who are found because tastes are
    shared. With a ``lift`` [m, r] the scores of items are divided by the lengths of its rows.
    """
    directions = torch.linalg.svd(table.to(torch.float64), full_matrices=False)[0]
    scores = directions if lift is None else lift.to(torch.float64) @ directions
    if lift is not None:
        scores = scores / lift.norm(dim=1, keepdim=True).clamp(min=1e-6)
    places = torch.cat([scores.T, -scores.T]).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    best = [
        (places[:, own] < own.numel()).double().mean(1).max() if own.numel() else torch.tensor(0.0) for own in lists
    ]
    return torch.stack([each.to(torch.float64) for each in best])


def infer_by_cohorts(scores: Tensor, own: Sequence[Tensor], degrees: Tensor, where: str) -> Finding:
    """Attack: do the ``scores`` [B, m] of :func:`by_cohorts` rank the real items of users, ``own``, first? ``degrees``
    [m] are the items' popularities."""
    figures = []
    for row, real in zip(scores, own, strict=True):
        positive, n = torch.isin(torch.arange(degrees.numel()), real), real.numel()
        ranked = (precision_at_own(each, positive, n) for each in (row, degrees))
        figures.append((*ranked, n / degrees.numel()))
    value, popular, guess = np.nanmean(np.array(figures), axis=0).tolist()
    return Finding(f"differences between {where}", "precision at |I_u|", value, guess, popular, len(figures))


def exposure_findings(attack: str, found: Exposure, control: Exposure, round: int | None = None) -> list[Finding]:
    """The findings of an ``attack`` on a round, with the exposure by its groups and by those of its ``control``, which
    takes the place of guessing (see :func:`shuffled`). Users are counted, not a share."""
    users, popular = len(found.users), found.popular_users
    return [
        Finding(attack, "users exposed", users, len(control.users), popular, found.cohort, round),
        Finding(attack, "item precision", found.precision, control.precision, found.popularity, found.groups, round),
        Finding(attack, "share of list", found.share, control.share, None, users, round),
    ]


def naming_findings(
    attack: str, named: Mapping[int, Tensor], control: Mapping[int, Tensor], offsets: Tensor, items: Tensor
) -> list[Finding]:
    """The findings of following groups, from what a :class:`Follower` named in the attack and in its ``control``: the
    number of users named rightly (90 % of the items named with them are theirs), and the share of these items that are
    the user's, mean over all who are named. The cases are the users named, rightly or not."""
    shares = [
        [
            float(torch.isin(each, items[offsets[user] : offsets[user + 1]]).double().mean())
            for user, each in who.items()
        ]
        for who in (named, control)
    ]
    value, guess = (sum(each >= RIGHT for each in one) for one in shares)
    return [
        Finding(attack, "users named", value, guess, None, len(named)),
        Finding(attack, "item precision", _mean(shares[0]), _mean(shares[1]), None, len(named)),
    ]
