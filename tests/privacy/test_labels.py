import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

from perfedrec.core import compiled
from perfedrec.core.keys import Key, fold_in
from perfedrec.core.types import Rows, block_rows
from perfedrec.privacy.labels import Labels, label, truth_probability
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings


def rows_of(lists: list[list[int]]) -> Rows:
    offsets = torch.tensor([0, *itertools.accumulate(len(each) for each in lists)])
    items = torch.tensor([item for each in lists for item in sorted(each)], dtype=torch.int64)
    return block_rows(offsets, items, torch.arange(len(lists)))[0]


def keys(n: int) -> Tensor:
    return Key(1).fold("noise").spread(torch.arange(n))


def test_clipping_is_exact_and_changes_nothing_else() -> None:
    values = torch.tensor([[-9.0, -0.5, -0.25, 0.0, 0.49999, 0.5, 0.50001, 3.0]])
    assert Protection(PrivacySettings(clip=0.5)).protect(values, keys(1)).tolist() == [
        [-0.5, -0.5, -0.25, 0.0, values[0, 4].item(), 0.5, 0.5, 0.5]
    ]
    assert torch.equal(Protection(PrivacySettings()).protect(values, keys(1)), values)


def test_noise_is_laplace_of_the_given_scale_on_top_of_the_clipped_value() -> None:
    values = torch.tensor([[-3.0, 0.2, 7.0, 0.0]]).expand(20_000, 4)
    noise = Protection(PrivacySettings(clip=0.5, noise_scale=0.1)).protect(values, keys(20_000)) - values.clamp(
        -0.5, 0.5
    )
    flat = noise.to(torch.float64).numpy()
    assert stats.kstest(flat.reshape(-1), stats.laplace(scale=0.1).cdf).pvalue > 1e-3
    for column in flat.T:
        assert abs(column.mean()) < 4 * 0.1 * (2 / 20_000) ** 0.5
        assert abs(column.var() - 0.02) < 4 * 0.02 * (5 / 20_000) ** 0.5
    assert np.abs(np.corrcoef(flat.T)[np.triu_indices(4, 1)]).max() < 4 / 20_000**0.5


def test_noise_depends_on_user_and_item_and_not_on_the_block() -> None:
    settings_ = PrivacySettings(clip=0.5, noise_scale=0.1)
    users, items = torch.arange(12).repeat_interleave(5), torch.arange(60) % 7
    values = torch.rand(60, 3)
    key = Key(3).fold("noise")
    whole = Protection(settings_).protect(values, fold_in(key.spread(users), items))
    for part in (torch.arange(60).flip(0), torch.tensor([17, 3, 59]), torch.tensor([8])):
        assert torch.equal(
            Protection(settings_).protect(values[part], fold_in(key.spread(users[part]), items[part])), whole[part]
        )
    assert (whole - values).unique(dim=0).shape[0] == 60  # no two pairs have the same noise


def test_noise_without_a_clip_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs clip"):
        PrivacySettings(noise_scale=0.1)


def test_without_labelling_the_rows_do_not_change() -> None:
    rows = rows_of([[1, 4, 7], [2], []])
    labels = label(rows, 20, PrivacySettings(), None, Key(0), keys(3))
    assert labels.rows is rows
    assert labels.positions.tolist() == [0, 1, 2, 3]
    assert labels.owners.tolist() == [0, 0, 0, 1]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[list[int]], PrivacySettings, int | None, int]:
    n_items = draw(st.integers(1, 50))
    lists = [sorted(draw(st.sets(st.integers(0, n_items - 1)))) for _ in range(draw(st.integers(1, 5)))]
    privacy = PrivacySettings(
        pseudo_items=draw(st.sampled_from([0.0, 0.1, 0.5, 3.0])), masking=draw(st.sampled_from([0.0, 0.3, 0.9]))
    )
    return n_items, lists, privacy, draw(st.sampled_from([None, 0, 1, 20])), draw(st.integers(0, 10_000))


@settings(max_examples=300)
@given(case=cases())
def test_rules_for_labels_and_negatives(case: tuple[int, list[list[int]], PrivacySettings, int | None, int]) -> None:
    n_items, lists, privacy, n_negatives, seed = case
    rows = rows_of(lists)
    labels = label(rows, n_items, privacy, n_negatives, Key(seed), keys(len(lists)))
    got = labels.rows
    assert got.offsets.tolist() == [
        0,
        *itertools.accumulate(torch.bincount(got.segments, minlength=len(lists)).tolist()),
    ]
    assert bool((got.segments.diff() >= 0).all())
    assert bool((labels.owners.diff() >= 0).all())
    for user, own in enumerate(lists):
        mine = got.segments == user
        labelled, where = got.items[mine].tolist(), labels.positions[mine]
        real = [item for item, place in zip(labelled, where.tolist(), strict=True) if place >= 0]
        decoys = [item for item, place in zip(labelled, where.tolist(), strict=True) if place < 0]
        negatives = labels.negatives[labels.owners == user].tolist()
        assert rows.items[where[where >= 0]].tolist() == real
        assert set(real) <= set(own)
        assert len(real) >= min(1, len(own))
        assert privacy.masking > 0 or real == own
        assert not set(own) & {*decoys, *negatives}  # a masked item is neither decoy nor negative
        assert not set(decoys) & set(negatives)
        for each in (real, decoys, negatives):
            assert len(set(each)) == len(each)
        exact = len(own) * privacy.pseudo_items
        assert len(decoys) in {min(int(exact) + extra, n_items - len(own)) for extra in (0, 1)}
        wanted = len(labelled) if n_negatives is None else n_negatives
        assert len(negatives) == min(wanted, n_items - len(own) - len(decoys))


def test_mean_shares_of_decoys_and_masked_items_are_as_configured() -> None:
    n, size = 4000, 7
    rows = rows_of([list(range(user % 50, user % 50 + size)) for user in range(n)])
    labels = label(rows, 400, PrivacySettings(pseudo_items=0.1, masking=0.3), 0, Key(5), keys(n))
    decoys = torch.bincount(labels.rows.segments[labels.positions < 0], minlength=n).double()
    assert abs(float(decoys.mean()) - 0.7) < 4 * (0.7 * 0.3 / n) ** 0.5
    assert decoys.unique().tolist() == [0.0, 1.0]
    kept = int((labels.positions >= 0).sum())
    expected = n * (size * 0.7 + 0.3**size)  # all masked except the one that must stay
    assert abs(kept - expected) < 4 * (n * size * 0.3 * 0.7) ** 0.5
    ranks = (labels.positions % size)[labels.positions >= 0].numpy()
    assert stats.chisquare(np.bincount(ranks, minlength=size)).pvalue > 1e-3  # all positions are masked equally often


def test_labels_of_a_user_do_not_depend_on_the_others() -> None:
    lists = [[1, 5, 9], [2, 3, 4, 8, 11], [0], [7, 12, 13, 14]]
    whole, privacy, key = rows_of(lists), PrivacySettings(pseudo_items=0.7, masking=0.4), Key(9)
    labels = label(whole, 30, privacy, None, key, keys(4))
    for order in ([2], [3, 1], [1, 0, 2]):
        block, _ = block_rows(whole.offsets, whole.items, torch.tensor(order))
        own = label(block, 30, privacy, None, key, keys(4)[order])
        for place, user in enumerate(order):
            for found, expected in (
                (own.rows.items[own.rows.segments == place], labels.rows.items[labels.rows.segments == user]),
                (own.negatives[own.owners == place], labels.negatives[labels.owners == user]),
            ):
                assert torch.equal(found, expected)


def same(a: Labels, b: Labels) -> bool:
    return torch.equal(a.rows.items, b.rows.items) and torch.equal(a.positions, b.positions)


@settings(max_examples=80)
@given(cases())
def test_the_kernels_of_labels_and_torch_agree(
    case: tuple[int, list[list[int]], PrivacySettings, int | None, int],
) -> None:
    pytest.importorskip("numba")
    n_items, lists, options, n_negatives, seed = case
    rows, secrets = rows_of(lists), Key(9).spread(torch.arange(len(lists)))
    mine = label(rows, n_items, options, n_negatives, Key(seed), secrets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        theirs = label(rows, n_items, options, n_negatives, Key(seed), secrets)
    assert same(mine, theirs)


def test_sticky_decoys_and_masked_items_are_the_same_in_every_round() -> None:
    lists = [[1, 5, 9, 22], [2, 3, 4, 8, 11], [0, 7], [7, 12, 13, 14]]
    rows, own = rows_of(lists), keys(4)
    for privacy in (
        PrivacySettings(pseudo_items=1.0, masking=0.4, sticky=True),
        PrivacySettings(randomised_response=2.0, sticky=True),
    ):
        one, two = (label(rows, 30, privacy, None, Key(seed), own) for seed in (1, 2))
        assert same(one, two)
        assert not torch.equal(one.negatives, two.negatives)  # negatives are drawn again
        for labels in (one, two):
            for user in range(4):
                labelled = labels.rows.items[labels.rows.segments == user].tolist()
                negatives = labels.negatives[labels.owners == user].tolist()
                real = [] if privacy.randomised_response else lists[user]  # which may be negatives in this case
                assert not set(negatives) & {*labelled, *real}
                assert len(set(labelled)) == len(labelled)
        assert not same(
            one, label(rows, 30, privacy, None, Key(1), keys(5)[1:])
        )  # they follow from the client's secret
        fresh = privacy.model_copy(update={"sticky": False})
        assert not same(*(label(rows, 30, fresh, None, Key(seed), own) for seed in (1, 2)))


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_truthful_with_its_probability(epsilon: float) -> None:
    n, n_items, size = 3000, 40, 10
    rows = rows_of([sorted((user + step * 3) % n_items for step in range(size)) for user in range(n)])
    labels = label(rows, n_items, PrivacySettings(randomised_response=epsilon), 0, Key(3), keys(n))
    truth = truth_probability(epsilon)
    real = torch.bincount(labels.rows.segments[labels.positions >= 0], minlength=n).numpy()
    decoys = torch.bincount(labels.rows.segments[labels.positions < 0], minlength=n).numpy()
    for counts, law in ((real, stats.binom(size, truth)), (decoys, stats.binom(n_items - size, 1 - truth))):
        expected = np.array([law.pmf(k) for k in range(int(counts.max()) + 1)])
        observed = np.bincount(counts)
        many = expected * n >= 5
        shares = [np.append(each[many], each[~many].sum()) for each in (observed, expected * n)]
        shares[1][-1] = n - shares[1][:-1].sum()
        assert stats.chisquare(shares[0], shares[1]).pvalue > 1e-3
    items = labels.rows.items[labels.positions < 0]
    assert stats.chisquare(torch.bincount(items, minlength=n_items).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("sticky", [False, True])
def test_randomised_response_bounds_what_labels_and_negatives_reveal_about_an_item(sticky: bool) -> None:
    """Half of the users have item 0 and half do not. Users who have it are labelled with it e^epsilon times as
    often; it is a negative as often as every other item that is not labelled (an item that never is one would be
    recognised)."""
    n, epsilon = 6000, 1.0
    rows = rows_of([[0, 3, 5], [3, 5]] * n)
    privacy = PrivacySettings(randomised_response=epsilon, sticky=sticky)
    labels = label(rows, 12, privacy, 3, Key(3), keys(2 * n))
    table = []
    for owner in (0, 1):
        labelled = labels.rows.segments[labels.rows.items == 0]
        negative = labels.owners[labels.negatives == 0]
        counts = [int((each % 2 == owner).sum()) for each in (labelled, negative)]
        table.append([*counts, n - sum(counts)])
    p = truth_probability(epsilon)
    assert stats.binomtest(table[0][0], n, p).pvalue > 1e-3
    assert stats.binomtest(table[1][0], n, 1 - p).pvalue > 1e-3
    # Users with item 0 have other total numbers of labels; given that item 0 is no label, nothing else depends on it.
    unlabelled = [row[1:] for row in table]
    assert stats.chi2_contingency(unlabelled).pvalue > 1e-3
    assert table[0][1] > 0
