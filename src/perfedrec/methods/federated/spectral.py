"""Spectral pre-training (our extension): federated subspace iteration on the normalised interaction matrix.

The spectral contrastive loss (HaoChen et al., NeurIPS 2021) has its optimum at the leading singular vectors of
``N = D_u^-a R D_i^-b`` with exponents a = b = 1/2. With smaller ones (``pretraining.user_exponent`` and
``item_exponent``) rare items and short lists, which are mostly chance, weigh less (docs/results.md). One pass
multiplies a basis of items by ``N^T N``; each client adds its own part of the product. With noise it is the noisy power
method (Hardt and Price, NeurIPS 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from perfedrec.core.aggregate import Aggregate, from_fixed
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows
from perfedrec.nn.propagation import HALVES, edge_weights
from perfedrec.nn.segments import segment_sum

TRUSTED = 2.0
"""An item takes part in noisy passes if its released degree is more than TRUSTED standard deviations of the noise above
0."""

MEMORY = 0.7
"""The weight of a noisy pass beside the next one. With noise no pass is good enough alone: the next basis, and the
final one, come from all passes so far."""


def gram_rows(basis: Tensor, rows: Rows, degrees: Tensor, exponents: tuple[float, float] = HALVES) -> Tensor:
    """[R, d] each client's part of ``N^T N Omega``: ``n_u (n_u^T Omega)`` on the rows of its own items.

    ``n_u`` is the client's row of ``N = D_u^-a R D_i^-b``, and ``basis`` [m, d] is Omega. The Frobenius norm of a
    client's part is at most ``||n_u||^2`` for an orthonormal basis, and this is at most 1 with exponents of 1/2.
    """
    return edge_weights(rows, degrees, exponents)[:, None] * taste_rows(basis, rows, degrees, exponents)


def taste_rows(basis: Tensor, rows: Rows, degrees: Tensor, exponents: tuple[float, float] = HALVES) -> Tensor:
    """[R, d] each client's part of a noisy pass: ``n_u^T Omega`` on the row of each of its items.

    All items of a client have the same part of the bound. The weights of :func:`gram_rows` would give more to rare
    items, whose rows are mostly noise.
    """
    weights = edge_weights(rows, degrees, exponents)[:, None]
    projection = segment_sum(weights * basis.index_select(0, rows.items), rows.segments, rows.n_users)
    return projection.index_select(0, rows.segments)


def trusted(basis: Tensor) -> Tensor:
    """[m] whether each item takes part in a noisy pass. The rows of other items are 0 in its ``basis`` [m, d]."""
    return basis.any(1)


def deflated(matrix: Tensor, degrees: Tensor, known: Tensor) -> Tensor:
    """[m, d] an orthonormal basis whose first column is ``sqrt(degrees)``, the first singular vector of ``N``.

    The other columns span the part of ``matrix[:, 1:]`` that is orthogonal to the first one. Rows of items that are not
    ``known`` [m] are 0.
    """
    first = degrees.sqrt()[:, None]
    return orthonormal(torch.cat([first, matrix[:, 1:]], dim=1) * known[:, None]) * known[:, None]


def remembered(images: Tensor | None, image: Tensor, deviation: float) -> Tensor:
    """[m, w] the noisy passes so far, side by side: ``images`` [m, w'] of earlier ones times :data:`MEMORY`, and the
    new ``image`` [m, d] without its first column, in standard deviations of its noise."""
    new = image[:, 1:] / deviation
    return new if images is None else torch.cat([images * MEMORY, new], dim=1)


def denoised(images: Tensor, degrees: Tensor, known: Tensor, dim: int, power: float) -> Tensor:
    """[m, dim] a basis from noisy passes, the :func:`remembered` ``images`` [m, w].

    It applies Wiener filters, which cost no privacy: the noise is the same on each row, the signal grows with an item's
    degree. The row of a ``known`` [m] item is multiplied by the share of signal in the mean energy of the items with
    about its degree. Of the rows the leading left singular vectors are kept, each times its singular value to
    ``power``. The sum of a client's parts of :func:`taste_rows` grows with the degree, where that of the normalised
    matrix grows with its root; so rows are divided by this root at the end. The first column is ``sqrt(degrees)``,
    which is left out of the other ones before; it has length 1, and the longest of the others, too.
    """
    result = images.new_zeros(images.shape[0], dim)
    result[:, 0] = functional.normalize(degrees.sqrt(), dim=0)
    rows, own = images[known], degrees[known]
    if not rows.numel():
        return result
    passes = rows.shape[1] // (dim - 1)
    rows = rows * _signal(rows, own, (dim - 1) * sum(MEMORY ** (2 * before) for before in range(passes)))[:, None]
    first = functional.normalize(own, dim=0)[:, None]
    with one_thread():
        left, values, _ = torch.linalg.svd((rows - first * (first.T @ rows)).to(torch.float64), full_matrices=False)
    shares = values / values[:1].clamp(min=1e-30)
    weighted = (left * shares**power * (shares > 0))[:, : dim - 1] / own.sqrt()[:, None]
    result[known, 1:] = _widened(weighted / weighted.norm(dim=0).max().clamp(min=1e-30), dim - 1)
    return result


def _signal(rows: Tensor, degrees: Tensor, noise: float) -> Tensor:
    """[R] the share of signal in the mean energy of the ``rows`` [R, w] of items with about the same degree. ``noise``
    is the energy of the noise of a row."""
    energy, order = rows.square().sum(1), degrees.argsort(stable=True)
    width = max(rows.shape[0] // 40, 1)
    ranked = functional.pad(energy[order][None, None], (width // 2, (width - 1) // 2), mode="replicate")
    mean = functional.avg_pool1d(ranked, width, 1)[0, 0]
    signal = torch.empty_like(mean)
    signal[order] = (1 - noise / mean.clamp(min=1e-30)).clamp(min=0)
    return signal


def orthonormal(matrix: Tensor) -> Tensor:
    """[m, d] an orthonormal basis of the columns, by QR in float64. The last columns are zero if m < d."""
    with one_thread():
        basis: Tensor = torch.linalg.qr(matrix.to(torch.float64))[0]
    return _widened(basis, matrix.shape[1])


def nystroem(probes: Tensor, images: Tensor) -> Tensor:
    """[m, r] a factor ``F`` with ``N^T N ~ F F^T``, from the ``images`` [m, w] ``= N^T N X`` of ``probes`` X [m, w].

    It is Nystroem's approximation. The probes need not be orthogonal to each other: those of several passes of subspace
    iteration make it a block Krylov method (Musco and Musco, NeurIPS 2015).
    """
    with one_thread():
        values, vectors = torch.linalg.eigh(probes.to(torch.float64).T @ images.to(torch.float64))
        known = values > 1e-6 * values[-1].clamp(min=1e-12)
        factor: Tensor = images.to(torch.float64) @ (vectors[:, known] * values[known].rsqrt())
    return factor.to(torch.float32)


def positive(basis: Tensor, image: Tensor) -> Tensor:
    """[m, r] a factor ``F`` of the part with positive eigenvalues of a symmetric matrix, as far as an orthonormal
    ``basis`` [m, w] reaches, of which the matrix makes the ``image`` [m, w]."""
    with one_thread():
        wide = basis.to(torch.float64)
        values, vectors = torch.linalg.eigh(wide.T @ image.to(torch.float64))
        known = values > 1e-6 * values[-1].clamp(min=1e-12)
        factor: Tensor = wide @ (vectors[:, known] * values[known].sqrt())
    return factor.to(torch.float32)


def neighbour_layers(
    factor: Tensor, items: Tensor, degrees: Tensor, exponents: tuple[float, float], length: float, scale: float
) -> list[Tensor]:
    """[m, d] twice: the sums ``sum_u x_u / sqrt(d_u d_i)`` over an item's users of their layers 0 and 1, from a
    ``factor`` F [m, r] with ``F F^T ~ N^T N`` for the ``exponents`` (a, b), and ``items`` Q [m, d].

    Layer 0 of a user is ``scale`` times its row of ``N Q``, layer 1 has exponents of 1/2. What these exponents differ
    from a and b is exact for items, by their ``degrees`` [m]. For users all lists are taken to have the mean
    ``length``: only the users know their own.
    """
    user, item = exponents
    weights = degrees.clamp(min=1.0)[:, None] ** (item - 0.5)
    with one_thread():
        first = factor @ (factor.T @ items)
        second = factor @ (factor.T @ (weights * items))
    return [first * weights * (scale * length ** (user - 0.5)), second * weights * length ** (2 * user - 1)]


def _widened(columns: Tensor, dim: int) -> Tensor:
    """[m, d] float32: ``columns`` [m, min(m, d)] padded with zero columns."""
    narrow = columns.to(torch.float32)
    return functional.pad(narrow, (0, dim - narrow.shape[1])) if narrow.shape[1] < dim else narrow.contiguous()


def fill_clusters(offsets: Tensor, items: Tensor, aggregate: Aggregate) -> None:
    """Set each cluster's table to the leading singular vectors of its members' interactions, in place.

    The sum of the members' parts of ``N^T N V`` is ``N_k^T N_k V``: one step of subspace iteration on the cluster's own
    matrix, from the global basis ``V``. Its left singular vectors, scaled by the fourth root of their relative singular
    values, become the cluster's table. A score uses the table twice, and so weights a direction by how much of the
    cluster's interactions it explains. The right singular vectors rotate the table to the coordinates of the global
    table, and it gets that table's length. No score changes by this, but members can train both tables with one change,
    and score both with one user vector. ``offsets`` [K m, d], ``items`` [m, d].
    """
    n_items = items.shape[0]
    for group in range(offsets.shape[0] // n_items):
        rows = slice(group * n_items, (group + 1) * n_items)
        own = slice(*torch.searchsorted(aggregate.keys, aggregate.keys.new_tensor([rows.start, rows.stop])).tolist())
        image = torch.zeros_like(items)
        image.index_copy_(0, aggregate.keys[own] - rows.start, from_fixed(aggregate.sums[own]))
        if not bool(image.any()):
            continue  # a cluster without members keeps the global model
        with one_thread():
            left, values, right = torch.linalg.svd(image.to(torch.float64), full_matrices=False)
            length = items.norm() / min(items.shape) ** 0.5
            table = (left * (values / values[0]).clamp(min=0) ** 0.25) @ right * length
        offsets[rows] = _widened(table, items.shape[1]) - items
