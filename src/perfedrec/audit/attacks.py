"""Attacks on the data that leave clients, as pure functions of what an attacker has.

Each attack returns values between 0 and 1, next to the values of random guessing and of popularity, which needs no
upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """The result of an attack: the ``value`` of ``metric`` (mean over ``cases``), with those of random guessing and
    popularity. ``margin`` is half the width of its 95 % interval, where it is known."""

    attack: str
    metric: str
    value: float
    guessing: float
    popularity: float | None
    cases: int
    round: int | None = None
    margin: float | None = None


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of ``scores`` [N], where ``positive`` [N] marks the positives. Ties count half. NaN if
    there are no positives or no negatives."""
    labels = positive.cpu().numpy().astype(bool)
    n = int(labels.sum())
    if n in (0, labels.size):
        return float("nan")
    ranks = rankdata(scores.detach().cpu().numpy())
    return float((ranks[labels].sum() - n * (n + 1) / 2) / (n * (labels.size - n)))


def precision_at_own(scores: Tensor, positive: Tensor, own: int) -> float:
    """The share of real items among the ``own`` highest of ``scores`` [N]. Ties are broken at random, in expectation.
    NaN if ``own`` or N is 0."""
    k = min(own, scores.numel())
    if not k:
        return float("nan")
    threshold = scores.topk(k).values[-1]
    above, tied = scores > threshold, scores == threshold
    missing = k - int(above.sum())
    expected = float(positive[above].sum()) + missing * float(positive[tied].float().mean())
    return expected / own


def infer_items(
    rows: Sequence[tuple[Tensor, Tensor]], own: Sequence[Tensor], vectors: Tensor | None, degrees: Tensor, where: str
) -> list[Finding]:
    """Attack: which of the rows that a client sent are items that it has?

    ``rows``: for each client the items [T] and their changes [T, d] as received. ``own``: its real items. ``vectors``
    [B, d] the clients' vectors, for an attacker who knows them, else ``None``. The row of a positive moves along the
    client's vector and that of a negative in the opposite direction. So rows are ranked by ``<change, e_u>`` (changes
    are minus gradients) or, without the vector, by the first singular vector of the changes, with the sign that agrees
    with popularity.
    """
    known = "with the user's vector" if vectors is not None else "without the user's vector"
    figures: list[tuple[float, float, float, float, float]] = []
    for number, ((items, changes), real) in enumerate(zip(rows, own, strict=True)):
        positive = torch.isin(items, real)
        popular = degrees[items]
        direction = vectors[number] if vectors is not None else torch.linalg.svd(changes, full_matrices=False)[2][0]
        scores = changes @ direction
        if vectors is None and float(((scores - scores.mean()) * (popular - popular.mean())).sum()) < 0:
            scores = -scores
        kept = real.numel()
        figures.append(
            (
                auc(scores, positive),
                auc(popular, positive),
                precision_at_own(scores, positive, kept),
                precision_at_own(popular, positive, kept),
                float(positive.float().mean()) * min(items.numel(), kept) / max(kept, 1),
            )
        )
    rated = np.array([each for each in figures if not np.isnan(each[0])]).reshape(-1, 5)
    precision, precision_popular, guess = np.nanmean(np.array(figures)[:, 2:], axis=0).tolist()
    name, found = f"items from {where}, {known}", []
    if len(rated):  # else all rows are real, and there is nothing to distinguish
        found.append(Finding(name, "AUC", float(rated[:, 0].mean()), 0.5, float(rated[:, 1].mean()), len(rated)))
    return [*found, Finding(name, "precision at |I_u|", precision, guess, precision_popular, len(figures))]


def intersect(
    row_sets: Sequence[Sequence[Tensor]], own: Sequence[Tensor], after: int, degrees: Tensor
) -> Finding | None:
    """Attack: items are ranked by how many of a client's first ``after`` uploads contain them, because rows that come
    back are real.

    ``row_sets``: for each client the items of its uploads, in order. Returns ``None`` if no client took part ``after``
    times.
    """
    values, popular, guesses = [], [], []
    for uploads, real in zip(row_sets, own, strict=True):
        if len(uploads) < after or not real.numel():
            continue
        items, counts = torch.cat(list(uploads[:after])).unique(return_counts=True)
        positive = torch.isin(items, real)
        values.append(precision_at_own(counts.to(torch.float32), positive, real.numel()))
        popular.append(precision_at_own(degrees[items], positive, real.numel()))
        guesses.append(float(positive.float().mean()) * min(items.numel(), real.numel()) / real.numel())
    if not values:
        return None
    means = [float(np.mean(each)) for each in (values, guesses, popular)]
    name = f"intersection of {after} upload{'s' if after > 1 else ''}"
    return Finding(name, "precision at |I_u|", means[0], means[1], means[2], len(values))


def fit_vectors(vectors: Tensor, table: Tensor, own: Sequence[Tensor], degrees: Tensor) -> Finding:
    """Attack: does a user's vector [d], one row of ``vectors`` [B, d], reveal its items, by ``<p_u, q_i>`` over all
    items of ``table`` [m, d]?"""
    figures = []
    for vector, real in zip(vectors, own, strict=True):
        positive = torch.zeros(table.shape[0], dtype=torch.bool)
        positive[real] = True
        figures.append((auc(table @ vector, positive), auc(degrees, positive)))
    return _area("fit of the user vector", figures)


def link_vectors(before: Tensor, after: Tensor) -> Finding:
    """Attack: is a user's vector of one round, in ``before`` [B, d], nearest (by cosine) to the same user's vector of
    another round, in ``after`` [B, d]?"""
    unit = [torch.nn.functional.normalize(each, dim=1) for each in (before, after)]
    nearest = (unit[0] @ unit[1].T).argmax(1)
    n = before.shape[0]
    linked = float((nearest == torch.arange(n)).float().mean())
    return Finding("linkage of user vectors", "top-1", linked, 1 / n, None, n)


def infer_membership(scores: Tensor, train: Sequence[Tensor], held: Sequence[Tensor], degrees: Tensor) -> Finding:
    """Attack: was an item trained on, by the ``scores`` [B, m] of the final model? The control is the same user's
    held-out items. Whether trained items score higher or lower an attacker knows from own items: lists of a
    neighbourhood model leave out what a user has."""
    figures = []
    for row, inside, outside in zip(scores, train, held, strict=True):
        items = torch.cat([inside, outside])
        positive = torch.arange(items.numel()) < inside.numel()
        figures.append((auc(row[items], positive), auc(degrees[items], positive)))
    found = _area("membership in the final model", figures)
    return replace(found, value=max(found.value, 1 - found.value))


def _area(attack: str, figures: Sequence[tuple[float, float]]) -> Finding:
    """The finding of an attack by its AUC and that of popularity for each user. Users without both kinds of items have
    none (NaN) and are left out; where all are, there is nothing to tell apart, as in :mod:`.recipients`."""
    rated = np.array([each for each in figures if not np.isnan(each[0])]).reshape(-1, 2)
    if not len(rated):
        return Finding(attack, "AUC", 0.5, 0.5, None, 0)
    area, popular = rated.mean(0).tolist()
    return Finding(attack, "AUC", area, 0.5, popular, len(rated))
