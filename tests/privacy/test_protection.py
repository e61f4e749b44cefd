"""Bounds that hold without any rounding error, and noise on what leaves a group of clients."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perfedrec.core import compiled
from perfedrec.core.aggregate import FIXED_POINT, from_fixed, reduce
from perfedrec.core.algorithm import Phase
from perfedrec.core.keys import Key
from perfedrec.core.types import Update
from perfedrec.privacy.protection import Protection, joint_norms
from perfedrec.privacy.settings import PrivacySettings

SPECTRAL = Phase("spectral", noise="spectral")


def protection(options: PrivacySettings) -> Protection:
    return Protection(options, [SPECTRAL])


def privacy(**changes: Any) -> PrivacySettings:
    base: dict[str, Any] = {"aggregation": "secure", "norm": "l2", "clip": 1.0, "dropout_tolerance": 0.0}
    return PrivacySettings(**(base | changes))


def update(n: int, rows: int, dim: int, scale: float, seed: int, n_items: int = 20) -> Update:
    generator = torch.Generator().manual_seed(seed)
    segments = torch.arange(n).repeat_interleave(rows)
    items = torch.stack([torch.randperm(n_items, generator=generator)[:rows] for _ in range(n)]).reshape(-1)
    deltas = torch.randn(n * rows, dim, generator=generator) * scale
    dense = torch.randn(n, 3, generator=generator) * scale
    zeros = torch.zeros(n, dtype=torch.int64)
    return Update(torch.arange(n), zeros, torch.ones(n), segments, items, deltas, dense=dense)


@settings(max_examples=60)
@given(
    norm=st.sampled_from(["l1", "l2"]),
    phase=st.sampled_from(["train", "spectral"]),
    scale=st.sampled_from([1e-12, 1e-6, 0.05, 1.0, 300.0]),
    clip=st.sampled_from([1e-3, 0.37, 1.0, 11.0]),
    dim=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_the_bound_holds_exactly_for_the_numbers_that_are_summed(
    norm: str, phase: str, scale: float, clip: float, dim: int, seed: int
) -> None:
    options = privacy(norm=norm, clip=clip, aggregation="dense", noise={"spectral": 1.0})
    sent = protection(options).clip_update(phase, update(3, 4, dim, scale, seed))
    assert sent.deltas is not None
    assert sent.dense is not None
    bound = Fraction(clip if phase == "train" else 1.0)
    for user in range(3):
        own = torch.cat([sent.deltas[sent.segments == user].reshape(-1), sent.dense[user]]).tolist()
        fixed = [Fraction(round(value * FIXED_POINT), 2**36) for value in own]
        assert fixed == [Fraction(value) for value in own]  # on the grid of the sums: nothing is rounded later
        if norm == "l1":
            assert sum(map(abs, fixed)) <= bound
        else:
            assert sum(value**2 for value in fixed) <= bound**2


def test_short_uploads_are_unchanged_in_training_and_scaled_up_before_it() -> None:
    before = update(3, 4, 2, 0.001, 0)
    options = privacy(noise={"spectral": 1.0}, rank=0)
    after = protection(options).clip_update("train", before)
    assert after.deltas is not None
    assert torch.allclose(after.deltas, before.deltas, atol=1e-9)
    lengthened = protection(options).clip_update("spectral", before)
    assert torch.allclose(joint_norms(lengthened, "l2"), torch.ones(3, dtype=torch.float64), atol=1e-5)
    nothing = protection(options).clip_update(
        "spectral", replace(before, deltas=torch.zeros(12, 2), dense=torch.zeros(3, 3))
    )
    assert not nothing.deltas.any()
    assert protection(PrivacySettings()).clip_update("train", before) is before


def test_noise_is_on_every_row_and_no_weight_is_released() -> None:
    options = privacy(noise={"training": 0.5})
    sent = update(40, 3, 4, 0.01, 1)
    noise = []
    for seed in range(30):
        total = protection(options).add_noise("train", reduce(sent, 20, 2), 40, Key(seed))
        assert total.keys.tolist() == list(range(40))
        assert not total.weights.any()
        noise.append(torch.cat([from_fixed(total.sums).reshape(-1), from_fixed(total.dense)]))
    exact = reduce(sent, 20, 2)
    table = torch.zeros(40, 4).index_copy_(0, exact.keys, from_fixed(exact.sums))
    errors = torch.stack(noise) - torch.cat([table.reshape(-1), from_fixed(exact.dense)])
    assert stats.kstest(errors.double().numpy().reshape(-1), stats.norm(scale=0.5).cdf).pvalue > 1e-3


def test_shares_of_parts_of_a_cohort_make_up_the_noise_of_the_whole() -> None:
    options, sent = privacy(noise={"training": 0.5}), update(40, 3, 4, 0.0, 1)
    errors = []
    for seed in range(40):
        parts = []
        for start, stop in ((0, 10), (10, 40)):
            mine = (sent.segments >= start) & (sent.segments < stop)
            part = Update(
                sent.users[start:stop],
                sent.groups[start:stop],
                sent.weights[start:stop],
                sent.segments[mine] - start,
                sent.items[mine],
                sent.deltas[mine],
            )
            parts.append(protection(options).add_noise("train", reduce(part, 20, 1), 40, Key(seed).fold("part", start)))
        errors.append(from_fixed((parts[0] + parts[1]).sums))
    assert stats.kstest(torch.stack(errors).double().numpy().reshape(-1), stats.norm(scale=0.5).cdf).pvalue > 1e-3


def test_each_dense_upload_has_its_own_noise_on_every_row() -> None:
    options = privacy(aggregation="dense", norm="l1", noise={"training": 0.5})
    sent = replace(update(30, 3, 4, 0.0, 1), dense=None)
    seen = protection(options).as_seen("train", sent, 20, Key(3))
    assert seen.shape == (30, 20, 4)
    assert stats.kstest(seen.double().numpy().reshape(-1), stats.laplace(scale=0.5).cdf).pvalue > 1e-3
    total = protection(options).add_noise("train", reduce(sent, 20, 1), 30, Key(4))
    reference = seen.sum(0).double().numpy().reshape(-1)
    assert stats.ks_2samp(from_fixed(total.sums).double().numpy().reshape(-1), reference).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "clients", "expected"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"noise": {"training": 1.0}, "dropout_tolerance": 0.25}, 74, True),
        ({"noise": {"training": 1.0}, "dropout_tolerance": 0.25}, 75, False),
        ({"aggregation": "dense", "noise": {"training": 1.0}}, 1, False),
    ],
)
def test_sums_of_too_few_clients_are_aborted(options: dict[str, Any], clients: int, expected: bool) -> None:
    assert protection(privacy(**options)).aborted("train", clients, 100) == expected


def test_opendp_draws_for_single_uploads_as_well() -> None:
    values = torch.full((40, 50), 3.0)
    asked = privacy(clip=0.5, norm="coordinate", noise_scale=0.2, noise_source="opendp", aggregation="sparse")
    one, two = (protection(asked).protect(values, Key(0).spread(torch.arange(40))) for _ in range(2))
    assert not torch.equal(one, two)  # no key determines it
    assert stats.kstest((one - 0.5).reshape(-1).double().numpy(), stats.laplace(scale=0.2).cdf).pvalue > 1e-3
    assert protection(asked).protect(values[:0], Key(0).spread(torch.arange(0))).shape == (0, 50)


@given(
    n_rows=st.integers(0, 9),
    width=st.sampled_from([1, 2, 7, 64]),
    clip=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_kernel_of_noise_and_torch_draw_the_same(n_rows: int, width: int, clip: float, seed: int) -> None:
    pytest.importorskip("numba")
    applied = Protection(PrivacySettings(clip=clip, noise_scale=0.2))
    values = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed))
    keys = Key(seed).spread(torch.arange(n_rows))
    noise = applied.protect(values, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        expected = applied.protect(values, keys)
    # The words are the same. A logarithm, of at most 17, may differ in its last two bits.
    torch.testing.assert_close(noise, expected, rtol=0, atol=0.2 * 17 * 2.0**-22)


def test_a_number_that_is_not_finite_stays_visible_under_noise() -> None:
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0]])
    noised = Protection(PrivacySettings(clip=0.5, noise_scale=0.1)).protect(values, Key(0).spread(torch.arange(1)))
    assert noised.isnan().tolist() == [[True, False, False, False]]
    assert bool((noised[0, 1:].abs() < 0.5 + 0.1 * 17).all())


@given(
    norm=st.sampled_from(["l1", "l2"]),
    rank=st.sampled_from([0, 4]),
    width=st.sampled_from([1, 5]),
    seed=st.integers(0, 99),
)
def test_the_kernels_of_the_clip_and_torch_agree(norm: str, rank: int, width: int, seed: int) -> None:
    """To the last bit, but for users whose norm is at the edge; there are none here."""
    pytest.importorskip("numba")
    applied = protection(privacy(norm=norm, rank=rank, clip=2.0))
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(4, (12,), generator=generator)
    deltas = torch.randn(12, width, generator=generator) * 10.0 ** torch.randint(-3, 2, (12, 1), generator=generator)
    update = Update(
        users=torch.arange(5),
        groups=torch.zeros(5, dtype=torch.int64),
        weights=torch.ones(5),
        segments=segments,
        items=torch.arange(12),
        deltas=deltas,
        dense=torch.randn(5, 3, generator=generator),
    )
    mine, norms = applied.clip_update("train", update), joint_norms(update, norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        theirs, expected = applied.clip_update("train", update), joint_norms(update, norm)
    torch.testing.assert_close(norms, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(mine.deltas, theirs.deltas, rtol=0, atol=2.0**-20)
    torch.testing.assert_close(mine.dense, theirs.dense, rtol=0, atol=2.0**-36)
