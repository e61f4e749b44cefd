"""Attacks on what everybody receives of the neighbourhood model: a factor ``F`` [m, r] of the matrix of items that
share users.

The attacker has the factor, the items' degrees, and a part of a user's list. Held-out items of the same user are the
control: people of that taste like them as well, and the factor was made without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perfedrec.audit.attacks import Finding, auc, precision_at_own
from perfedrec.methods.federated.spectral import nystroem, orthonormal

PAIRS = 200  # pairs of a user that are attacked at most


def attack_factor(
    factor: Tensor,
    train: Sequence[Tensor],
    held: Sequence[Tensor],
    together: sparse.csr_array,
    degrees: Tensor,
    source: str,
) -> list[Finding]:
    """What the ``factor`` [m, r] tells of users, whose items are ``train`` and whose held-out items are ``held``.

    ``together`` [m, m] has the number of users of each pair of items, by which the results are judged, and
    ``degrees`` [m] those of each item; ``source`` names the factor.

    - Which of a user's own and held-out items is in the list, for an attacker who knows all of the list but this item?
    - Which pairs of items does somebody have? Pairs that this user alone has, against those of an own and a held-out
      item that nobody has.
    - What else does the user have, for an attacker who knows the rarest item alone?
    """
    completion, pairs, rarest = (list[tuple[float, float]]() for _ in range(3))
    for user, (own, outside) in enumerate(zip(train, held, strict=True)):
        if own.numel() < 2 or not outside.numel():
            continue
        candidates = torch.cat([own, outside])
        positive = torch.arange(candidates.numel()) < own.numel()
        completion.append(
            (auc(_completing(factor, own, candidates, degrees), positive), auc(degrees[candidates], positive))
        )
        first, second, alone = _pairs(own, outside, together, user)
        if alone.any() and not alone.all():
            scores = (factor[first] * factor[second]).sum(1)
            pairs.append((auc(scores, alone), auc(degrees[first] * degrees[second], alone)))
        known = own[degrees[own].argmin()]
        others = torch.arange(degrees.numel()) != known
        real = torch.isin(torch.arange(degrees.numel()), own)[others]
        near = (factor @ factor[known]) * degrees.sqrt()
        found, popular = (precision_at_own(each[others], real, own.numel() - 1) for each in (near, degrees))
        rarest.append((found, popular))
    return [
        _finding(f"one item that is missing in a known list, by {source}", "AUC", 0.5, completion),
        _finding(f"pairs that one user alone has, by {source}", "AUC", 0.5, pairs),
        _finding(f"a list from its rarest item, by {source}", "precision at |I_u|", 0.0, rarest),
    ]


def by_passes(passes: Sequence[Tensor]) -> Tensor | None:
    """[m, r] the factor that a coordinator can make of the sums [m, d] of consecutive ``passes``: the basis of each
    pass follows from the pass before. ``None`` if there are not two."""
    if len(passes) < 2:
        return None
    probes = torch.cat([orthonormal(each) for each in passes[:-1]], dim=1)
    return nystroem(probes, torch.cat(list(passes[1:]), dim=1))


def _completing(factor: Tensor, own: Tensor, candidates: Tensor, degrees: Tensor) -> Tensor:
    """[N] how near each of the ``candidates``, of which the first are the user's ``own`` items, is to the other own
    items, in the mean; rare ones count more."""
    weights = 1 / degrees[own]
    sums = factor[candidates] @ (weights[:, None] * factor[own]).sum(0)
    total = weights.sum().expand_as(sums).clone()
    sums[: own.numel()] -= weights * factor[own].square().sum(1)
    total[: own.numel()] -= weights
    return sums / total


def _pairs(own: Tensor, outside: Tensor, together: sparse.csr_array, user: int) -> tuple[Tensor, Tensor, Tensor]:
    """The items of pairs, and which of them the user alone has. The others are of one item of its own and one from
    ``outside``, and nobody has them."""
    random = np.random.default_rng(user)

    def some(left: Tensor, right: Tensor, count: int) -> Tensor:
        counts = together[left.numpy()][:, right.numpy()].toarray()
        places = torch.from_numpy(counts == count).nonzero()
        places = places[left[places[:, 0]] < right[places[:, 1]]] if left is right else places
        return places[torch.from_numpy(random.permutation(places.shape[0])[:PAIRS])]

    alone, nobodys = some(own, own, 1), some(own, outside, 0)
    first = torch.cat([own[alone[:, 0]], own[nobodys[:, 0]]])
    second = torch.cat([own[alone[:, 1]], outside[nobodys[:, 1]]])
    return first, second, torch.arange(first.numel()) < alone.shape[0]


def _finding(attack: str, metric: str, guessing: float, figures: Sequence[tuple[float, ...]]) -> Finding:
    """The mean over users, with the half width of its 95 % interval."""
    values = np.array([each for each in figures if not np.isnan(each).any()]).reshape(-1, 2)
    if not len(values):
        return Finding(attack, metric, guessing, guessing, None, 0)
    margin = 1.96 * float(values[:, 0].std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    value, popular = values.mean(0).tolist()
    return Finding(attack, metric, value, guessing, popular, len(values), margin=margin)
