"""Random samples without repetition, drawn by keys: for cohorts, negatives and decoys."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from perfedrec.core.compiled import LIGHT, spread, usable
from perfedrec.core.keys import Key, domain, network, shuffle
from perfedrec.core.types import Rows


def choose(size: int, n: int, key: Key) -> Tensor:
    """int64 [min(n, size)] distinct random numbers below ``size``, in random order.

    The cost depends on ``n`` and not on ``size``.
    """
    if usable():
        from perfedrec.core import sample_kernels

        chosen, word = torch.empty(min(n, size), dtype=torch.int64), key.spread(torch.zeros(1, dtype=torch.int64))
        sample_kernels.choose(word.numpy().view("uint64")[0], size, network(size), chosen.numpy())
        return chosen
    positions = torch.arange(min(n + domain(size) - size, domain(size)))
    images = shuffle(key.spread(torch.zeros_like(positions)), positions, size)
    return images[images < size][:n]


def draw_outside(rows: Rows, n_items: int, counts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """For each user of ``rows``, draw distinct items that the user does not have, uniformly.

    ``counts`` [B] are the numbers of items to draw, and ``keys`` [B] decide the draws. Returns ``items`` [T] and their
    ``segments`` [T], user by user: the first items of the user's random permutation that are not in the user's rows. A
    user with fewer such items than asked for gets all of them.

    The sampler knows only the rows that are given here. It cannot avoid held-out items, and so cannot leak them.
    """
    counts = torch.minimum(counts, n_items - rows.counts).clamp_(min=0)
    if usable(rows.items, rows.offsets, counts, keys):
        return _drawn_outside(rows, n_items, counts, keys)
    owned = rows.segments * n_items + rows.items  # ascending, because rows are
    expected = (counts + 1).to(torch.float32) * n_items / (n_items - rows.counts).clamp(min=1)
    tried = expected.mul_(1.05).add_(4.0).to(torch.int64)  # nearly always enough; else doubled for that user
    while True:
        tried.clamp_(max=domain(n_items))
        ends = tried.cumsum(0)
        starts, segments = ends - tried, torch.repeat_interleave(tried)
        numbers = torch.arange(segments.numel(), device=counts.device)
        images = shuffle(keys[segments], numbers - starts[segments], n_items)
        fits = (images < n_items) & ~member(segments * n_items + images, owned)
        found = torch.zeros(numbers.numel() + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(fits, 0, out=found[1:])
        before = found[starts]
        short = found[ends] - before < counts
        if not bool(short.any()):
            wanted = (fits & (found[1:] <= (before + counts)[segments])).nonzero().squeeze(1)
            return images[wanted], segments[wanted]
        tried = torch.where(short, tried * 2, tried)


def _drawn_outside(rows: Rows, n_items: int, counts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    from perfedrec.core import sample_kernels

    limits = torch.zeros_like(rows.offsets)
    torch.cumsum(counts, 0, out=limits[1:])
    items, owners = (counts.new_empty(int(limits[-1])) for _ in range(2))
    owned, result = (rows.offsets.numpy(), rows.items.numpy()), (limits.numpy(), items.numpy(), owners.numpy())
    words = keys.numpy().view("uint64")
    draw = partial(sample_kernels.draw_outside, words, counts.numpy(), owned, n_items, network(n_items), result)
    spread(draw, rows.n_users, items.numel() // LIGHT)
    return items, owners


def paired(rows: Rows, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row a negative of the same user.

    ``owners`` [T] are the users of the negatives, user by user. Returns the positions [P] of the rows, and the
    positions [P] of their negatives, which ascend.

    A user who has more than half of all items has fewer negatives than rows; these negatives are then used several
    times, in turn. The rows of a user without negatives are left out.
    """
    if owners.numel() == rows.items.numel():  # no user has too few: the k-th row of a user gets the k-th negative
        every = torch.arange(owners.numel(), device=owners.device)
        return every, every
    available = torch.bincount(owners, minlength=rows.n_users)
    places = (available > 0)[rows.segments].nonzero().squeeze(1)
    segments, starts = rows.segments[places], available.cumsum(0) - available
    negatives = starts[segments] + ranks(rows.segments, rows.n_users)[places] % available[segments]
    order = negatives.argsort(stable=True)
    return places[order], negatives[order]


def member(values: Tensor, ascending: Tensor) -> Tensor:
    """Whether each of ``values``, of any shape, is one of the ``ascending`` [E], bool of the shape of ``values``."""
    if not ascending.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    places = torch.searchsorted(ascending, values).clamp_(max=ascending.numel() - 1)
    return ascending[places] == values


def ranks(segments: Tensor, n: int) -> Tensor:
    """[T] the position of each row within its segment; ``segments`` [T] must ascend."""
    counts = torch.bincount(segments, minlength=n)
    return torch.arange(segments.numel(), device=segments.device) - (counts.cumsum(0) - counts)[segments]
