"""Rules against malicious clients: toys by hand, a naive numpy oracle, planted outliers, invariance to order."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from perfedrec.core import compiled, robust
from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Sum, from_fixed, reduce
from perfedrec.core.robust import Stack
from perfedrec.core.types import Update

N_ITEMS = 6


def part(rows: dict[int, list[float]], dense: list[float] | None = None, clients: int = 1) -> Aggregate:
    """One client's part, with changes by item."""
    keys = sorted(rows)
    sums = (
        torch.tensor([rows[key] for key in keys], dtype=torch.float64).reshape(len(keys), -1 if keys else 1)
        * FIXED_POINT
    )
    return Aggregate(
        n_items=N_ITEMS,
        clients=clients,
        keys=torch.tensor(keys, dtype=torch.int64),
        sums=sums,
        weights=torch.tensor([float(clients)], dtype=torch.float64) * FIXED_POINT,
        dense=None if dense is None else torch.tensor(dense, dtype=torch.float64) * FIXED_POINT,
    )


def rows_of(aggregate: Aggregate) -> dict[int, list[float]]:
    return dict(zip(aggregate.keys.tolist(), from_fixed(aggregate.sums).tolist(), strict=True))


def crowd(n: int = 12, seed: int = 0) -> list[Aggregate]:
    """Parts of clients that touch random rows."""
    drawn = np.random.default_rng(seed)
    return [
        part(
            {int(item): drawn.normal(1, 0.2, 2).tolist() for item in drawn.choice(N_ITEMS, 4, replace=False)},
            drawn.normal(0, 1, 3).tolist(),
        )
        for _ in range(n)
    ]


LIAR = part({0: [500.0, -500.0], 1: [0.1, 0.1]}, [9.0, 9.0, 9.0])
RULES: dict[str, Callable[[Stack], Aggregate]] = {
    name: rule
    for name in ("clip", "trimmed-mean", "median", "krum", "bulyan", "robust-z", "shortest", "quorum")
    if (rule := robust.rule_of(name, 0.1, 3.0, 2)) is not None  # type: ignore[arg-type]
}


def test_a_trimmed_mean_is_over_those_who_touched_the_row() -> None:
    parts = [part({0: [1.0]}), part({0: [2.0]}), part({0: [3.0], 4: [7.0]}), part({0: [100.0]}), part({0: [-50.0]})]
    found = rows_of(robust.trimmed_mean(Stack.of(parts), 0.2))
    assert found[0] == [10.0]  # the mean of 1, 2 and 3, times 5 contributors
    assert found[4] == [7.0]  # nobody to compare with
    assert rows_of(robust.median(Stack.of(parts)))[0] == [10.0]


def test_rules_by_rank_are_those_of_a_naive_loop() -> None:
    parts, share = crowd(), 0.25
    found = {name: rows_of(RULES[name](Stack.of(parts))) for name in ("median",)}
    trimmed = rows_of(robust.trimmed_mean(Stack.of(parts), share))
    for item in range(N_ITEMS):
        own = np.array([rows_of(each)[item] for each in parts if item in each.keys.tolist()])
        n, ordered = len(own), np.sort(own, axis=0)
        cut = min(int(np.ceil(share * n)), (n - 1) // 2)
        np.testing.assert_allclose(trimmed[item], ordered[cut : n - cut].mean(0) * n, rtol=1e-6)
        np.testing.assert_allclose(found["median"][item], np.median(own, axis=0) * n, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 70])
def test_kernels_of_rules_find_what_torch_and_scipy_find(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, with rows of no, one and all contributors, equal numbers, and rows of any width."""
    pytest.importorskip("numba")
    for dim in (1, 16, 37):
        drawn = np.random.default_rng(100 * n + dim)
        parts = []
        for _ in range(n):
            keys = np.flatnonzero(drawn.random(9) < np.linspace(0, 1, 9))
            sums = drawn.normal(0, 9, (keys.size, dim)).round(drawn.integers(0, 9)) * FIXED_POINT
            parts.append(replace(part({}), keys=torch.from_numpy(keys), sums=torch.from_numpy(sums).round()))
        stack = Stack.of([each for each in parts if each.keys.numel()])
        inner = [torch.full_like(stack.counts, 0), (stack.counts - 1).div(2, rounding_mode="floor")]

        def found(stack: Stack = stack, inner: list[torch.Tensor] = inner) -> list[torch.Tensor]:
            return [stack.products(), *(robust._inner(stack, trimmed) for trimmed in inner)]

        mine = found()
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_installed", lambda: False)
            theirs = found()
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)


def test_krum_leaves_out_those_far_from_others() -> None:
    parts = [part({0: [float(value), 1.0]}) for value in (1.0, 1.1, 0.9, 1.05, 0.95, 40.0)]
    apart = robust.distances(Stack.of(parts)) / FIXED_POINT**2
    naive = [[(a - b) ** 2 for b in (1.0, 1.1, 0.9, 1.05, 0.95, 40.0)] for a in (1.0, 1.1, 0.9, 1.05, 0.95, 40.0)]
    np.testing.assert_allclose(apart.numpy(), naive, atol=1e-6)
    assert robust.closest(apart, 1, 5).tolist() == [True] * 5 + [False]
    found = robust.krum(Stack.of(parts), 1 / 6)
    assert found.clients == 6
    np.testing.assert_allclose(rows_of(found)[0], [6.0, 6.0], rtol=1e-6)  # the mean of five, for six clients
    assert from_fixed(found.weights).tolist() == [6.0]


def test_distances_count_rows_that_one_of_two_lacks() -> None:
    parts = [part({0: [3.0]}), part({1: [4.0]}), part({0: [3.0], 1: [4.0]})]
    apart = robust.distances(Stack.of(parts)) / FIXED_POINT**2
    assert apart.tolist() == [[0.0, 25.0, 16.0], [25.0, 0.0, 9.0], [16.0, 9.0, 0.0]]


@pytest.mark.parametrize("name", sorted(set(RULES) - {"quorum"}))
def test_one_planted_liar_changes_little(name: str) -> None:
    """The exact sum would move by 500."""
    honest = crowd()
    without = rows_of(RULES[name](Stack.of(honest)))
    found = rows_of(RULES[name](Stack.of([*honest, LIAR])))
    assert max(abs(a - b) for a, b in zip(found[0], without[0], strict=True)) < 20
    assert abs(rows_of(Sum().combine("train", [*honest, LIAR], LIAR))[0][0] - without[0][0]) > 400


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_order_of_the_parts_changes_nothing(name: str) -> None:
    parts = [*crowd(), LIAR]
    one, other = RULES[name](Stack.of(parts)), RULES[name](Stack.of(parts[::-1]))
    assert torch.equal(one.keys, other.keys)
    assert torch.allclose(one.sums, other.sums, atol=2.0)  # of 2^36: rounding
    assert torch.equal(one.weights, other.weights)
    assert one.dense is not None
    assert other.dense is not None
    assert torch.allclose(one.dense, other.dense, atol=2.0)


def test_clip_shortens_to_a_multiple_of_the_median_length() -> None:
    found = robust.clip(Stack.of([part({0: [1.0]}), part({1: [2.0]}), part({2: [50.0]})]), 3.0)
    assert rows_of(found) == {0: [1.0], 1: [2.0], 2: [6.0]}


def cohort(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Update:
    """What ``n`` clients send in a round of training: changes of some rows each, of very different sizes."""
    drawn = np.random.default_rng(seed)
    items = [np.sort(drawn.choice(40, drawn.integers(1, 9), replace=False)) for _ in range(n)]
    sizes = np.exp(drawn.normal(0, 1.5, n))
    deltas = np.concatenate(
        [size * drawn.normal(0, 1, (each.size, 5)) for size, each in zip(sizes, items, strict=True)]
    )
    return Update(
        users=torch.arange(100, 100 + n),
        groups=torch.from_numpy(drawn.integers(0, 3, n)),
        weights=torch.from_numpy(drawn.uniform(0.5, 1.5, n)).to(dtype),
        segments=torch.from_numpy(np.repeat(np.arange(n), [each.size for each in items])),
        items=torch.from_numpy(np.concatenate(items)),
        deltas=torch.from_numpy(deltas).to(dtype),
        reports=torch.from_numpy(drawn.normal(0, 1, (n, 1, 5))).to(dtype),
    )


CLIP = robust.Robust(
    lambda stack: robust.clip(stack, 1.5),
    frozenset({"train"}),
    factors=robust.factors_of("clip", 1.5),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the former by kernels
@pytest.mark.parametrize("seed", range(4))
def test_a_cohort_clipped_at_once_is_the_clipped_sum_of_its_parts(seed: int, dtype: torch.dtype) -> None:
    update = cohort(17, seed, dtype)
    parts = [reduce(update.of_user(place), 40, 3) for place in range(17)]
    expected = CLIP.combine("train", parts, parts[0])
    whole = CLIP.at_once("train", update, 40, 3)
    assert whole is not None
    found = CLIP.combine("train", [whole], parts[0])
    for name, value in vars(expected).items():
        mine = getattr(found, name)
        assert mine == value if not isinstance(value, torch.Tensor) else torch.equal(mine, value), name
    lengths = Stack.of(parts).lengths
    assert torch.equal(lengths, robust.lengths_of(update))  # type: ignore[arg-type]
    plain = torch.stack([each.sums.square().sum().sqrt() for each in parts])
    torch.testing.assert_close(lengths, plain, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e9])
def test_a_cohort_with_a_number_that_no_sum_can_hold_needs_its_parts(number: float) -> None:
    update = cohort(5, 0)
    assert update.deltas is not None
    assert CLIP.at_once("train", update, 40, 3) is not None
    update.deltas[3, 2] = number
    assert CLIP.at_once("train", update, 40, 3) is None


def test_a_cohort_is_taken_apart_for_other_rules_and_phases_and_where_it_is_small() -> None:
    update, other = cohort(5, 0), robust.Robust(robust.median, frozenset({"train"}))
    assert other.at_once("train", update, 40, 3) is None
    assert CLIP.at_once("join", update, 40, 3) is None
    assert CLIP.at_once("train", cohort(robust.FEWEST - 1, 0), 40, 3) is None


def test_robust_z_takes_long_and_short_parts_out() -> None:
    lengths = [1.0, 1.1, 0.9, 1.2, 1.0, 30.0]
    found = robust.robust_z(Stack.of([part({0: [each]}) for each in lengths]), 3.5)
    np.testing.assert_allclose(rows_of(found)[0], [1.04 * 6], rtol=1e-6)


def test_the_longest_parts_are_left_out() -> None:
    """Two of five lie alike, and so are nearer to each other than the honest ones."""
    parts = [part({0: [1.0, 0.0]}), part({0: [-1.0, 1.0]}), part({0: [2.0, 1.0]})]
    lies = [part({0: [90.0, 0.0]}), part({0: [90.0, 0.0]})]
    assert rows_of(robust.shortest(Stack.of([*lies, *parts]), 0.4)) == {
        0: [pytest.approx(2 * 5 / 3), pytest.approx(2 * 5 / 3)]
    }
    assert rows_of(robust.shortest(Stack.of([*lies, *parts]), 0.2))[0][0] > 90 / 2


def test_a_quorum_leaves_rows_of_few_out() -> None:
    parts = [part({0: [1.0], 1: [5.0]}), part({0: [2.0]}), part({0: [4.0], 3: [1.0]})]
    assert rows_of(robust.quorum(Stack.of(parts), 2)) == {0: [7.0]}


def test_few_parts_and_other_phases_are_summed_exactly() -> None:
    parts, rule = crowd(4), robust.Robust(robust.median, frozenset({"train"}))
    exact = Sum().combine("train", parts, parts[0])
    for found in (
        rule.combine("join", parts, parts[0]),
        rule.combine("train", parts[:2], parts[0]) + parts[2] + parts[3],
    ):
        assert torch.equal(found.keys, exact.keys)
        assert torch.equal(found.sums, exact.sums)
        assert torch.equal(found.weights, exact.weights)
    empty = Aggregate.empty(N_ITEMS, 1)
    assert rule.combine("train", [], empty) is empty


def test_a_missing_row_of_a_group_is_zeros() -> None:
    parts = [part({0: [4.0]}, clients=32), part({}, clients=32), part({}, clients=32)]
    grouped = robust.Robust(robust.median, frozenset({"train"}), separate=False, groups=3)
    assert rows_of(grouped.combine("train", parts, parts[0])) == {0: [0.0]}


def test_bounds_on_rows_hold_and_leave_the_rest_alone() -> None:
    deltas = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0], [float("inf"), 0.0], [0.0, 0.0]])
    zeros = torch.zeros(5, dtype=torch.int64)
    update = Update(torch.tensor([7]), torch.tensor([0]), torch.ones(1), zeros, torch.arange(5), deltas)
    held = robust.hold_rows(update, 1.0).deltas
    assert held is not None
    assert torch.equal(held[1], deltas[1])
    np.testing.assert_allclose(held[0].numpy(), [0.6, 0.8], rtol=1e-5)
    assert float(held.norm(dim=1).max()) <= 1.0
    assert held[2:].tolist() == [[0.0, 0.0]] * 3
    again = robust.hold_rows(Update(**{**vars(update), "deltas": held}), 1.0).deltas
    assert again is held  # a server that checks honest uploads changes nothing


def test_a_sum_of_several_is_bounded_for_each() -> None:
    held = robust.hold_sum(part({0: [3.0, 4.0], 1: [1.0, 1.0]}, clients=2), 1.0)
    found = rows_of(held)
    np.testing.assert_allclose(found[0], [1.2, 1.6], rtol=1e-5)
    assert found[1] == [1.0, 1.0]


def test_rows_of_a_table_are_bounded_by_their_median_length() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    robust.hold_lengths(table, 2.0)
    assert table.tolist() == [[1.0, 0.0], [0.0, 2.0], pytest.approx([2.4, 3.2]), pytest.approx([2.4, 3.2]), [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the former by a kernel
def test_lengths_of_rows_and_of_sums_of_rows(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    table, others = (torch.randn(n, 7, generator=drawn, dtype=torch.float64).to(dtype) for n in (6, 18))
    torch.testing.assert_close(robust.row_lengths(table), table.norm(dim=1))
    expected = torch.stack([(table[row % 6] + others[row]).norm() for row in range(18)])
    torch.testing.assert_close(robust.row_lengths(table, others), expected)


def test_groups_are_random_and_about_equal() -> None:
    from perfedrec.core.keys import Key

    users = torch.arange(103)
    numbers = robust.group_numbers(torch.ones_like(users), Key(1).spread(users), 4)
    assert torch.bincount(numbers).tolist() in ([26, 26, 26, 25], [26, 26, 25, 26], [26, 25, 26, 26], [25, 26, 26, 26])
    assert not torch.equal(numbers, robust.group_numbers(torch.ones_like(users), Key(2).spread(users), 4))
    mixed = torch.randperm(103)
    assert torch.equal(robust.group_numbers(torch.ones_like(users), Key(1).spread(mixed), 4), numbers[mixed])
    sizes = torch.tensor([10, 1, 1, 10, 1, 1])
    groups = robust.group_numbers(sizes, Key(3).spread(torch.arange(6)), 2)
    assert sorted(torch.zeros(2, dtype=torch.int64).index_add_(0, groups, sizes).tolist())[0] >= 2
