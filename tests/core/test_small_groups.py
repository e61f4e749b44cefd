"""Rules for sums of small groups: toys by hand, a naive loop, planted lies, invariance to order."""

from statistics import median_low

import numpy as np
import pytest
import torch

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Sum, from_fixed
from perfedrec.core.small_groups import STEP, SmallGroups, held_counts, held_rows

N_ITEMS = 12


def group(rows: dict[int, list[float]], clients: int = 4) -> Aggregate:
    """The sum of one group, by item."""
    keys = sorted(rows)
    width = len(next(iter(rows.values()))) if rows else 0
    sums = torch.tensor([rows[key] for key in keys], dtype=torch.float64).reshape(len(keys), width)
    weights = torch.tensor([float(clients)], dtype=torch.float64) * FIXED_POINT
    return Aggregate(N_ITEMS, clients, torch.tensor(keys, dtype=torch.int64), sums * FIXED_POINT, weights)


def rows_of(aggregate: Aggregate) -> dict[int, list[float]]:
    return dict(zip(aggregate.keys.tolist(), from_fixed(aggregate.sums).tolist(), strict=True))


def counts(*groups: dict[int, int]) -> list[Aggregate]:
    return [group({item: [float(count)] for item, count in each.items()}) for each in groups]


def test_a_group_counts_a_rare_item_once_and_a_common_one_about_as_often_as_others() -> None:
    honest = [{0: 3, 1: 1}, {0: 4}, {0: 3}, {0: 2}]
    assert rows_of(held_counts(counts(*honest, {0: 3}), 0.2)) == {0: [15], 1: [1]}
    lies = {0: 900, 1: -50, 2: 100}
    assert rows_of(held_counts(counts(*honest, lies), 0.2)) == {0: [3 + 4 + 3 + 2 + 5], 1: [1], 2: [1]}


def test_the_share_says_how_many_groups_may_lie() -> None:
    two = counts({0: 1}, {0: 1}, {0: 1}, {0: 90}, {0: 90})
    assert rows_of(held_counts(two, 0.4)) == {0: [3 + 2 + 2]}
    assert rows_of(held_counts(two, 0.2)) == {0: [3 + 90 + 90]}


def test_the_order_of_groups_changes_no_count() -> None:
    some = counts({0: 3, 1: 1}, {0: 40}, {2: 3}, {0: 2}, {1: 7, 2: 1})
    assert torch.equal(held_counts(some[::-1], 0.3).sums, held_counts(some, 0.3).sums)


def test_a_row_of_a_rare_item_is_compared_with_those_of_items_that_as_many_groups_have() -> None:
    """Five groups. Most have item 0; items 1 to 4 are in one or two groups, and have rows of lengths 1, 2, 2, 3."""
    parts = [
        group({0: [10.0, 0.0], 1: [1.0, 0.0]}),
        group({0: [0.0, 12.0], 2: [0.0, 2.0]}),
        group({0: [11.0, 0.0], 3: [2.0, 0.0]}),
        group({0: [80.0, 0.0], 4: [0.0, 3.0]}),
        group({5: [0.0, 0.0]}),
    ]
    found = rows_of(held_rows(parts, 1.0))
    assert found[0] == pytest.approx([10 + 11 + 11, 11])
    assert (found[1], found[4]) == ([1, 0], [0, 2])
    assert found[5] == [0, 0]
    assert rows_of(held_rows(parts, 1e6)) == rows_of(Sum().combine("spectral", parts, parts[0]))


def random_parts(n: int, seed: int) -> list[Aggregate]:
    drawn, found = np.random.default_rng(seed), []
    chances = np.linspace(0.9, 0.05, N_ITEMS)
    for _ in range(n):
        own = np.flatnonzero(drawn.random(N_ITEMS) < chances)
        found.append(group({int(item): drawn.normal(0, 1, 3).tolist() for item in own}))
    return found


def naive(parts: list[Aggregate], multiple: float) -> dict[int, list[float]]:
    having: dict[int, list[float]] = {}
    for each in parts:
        for item, row in rows_of(each).items():
            having.setdefault(item, []).append(float(np.linalg.norm(row)))
    pools: dict[object, list[float]] = {}
    names = {}
    for item, lengths in having.items():
        names[item] = ("own", item) if 2 * len(lengths) > len(parts) else int(np.floor(np.log2(len(lengths)) / STEP))
        pools.setdefault(names[item], []).extend(lengths)
    total = {item: np.zeros(3) for item in having}
    for each in parts:
        for item, row in rows_of(each).items():
            factor = min(1.0, multiple * median_low(pools[names[item]]) / np.linalg.norm(row))
            total[item] += np.array(row) * factor
    return {item: row.tolist() for item, row in sorted(total.items())}


@pytest.mark.parametrize("multiple", [0.5, 1.0, 2.0])
def test_rows_are_those_of_a_naive_loop_in_any_order(multiple: float) -> None:
    parts = random_parts(9, 3)
    found, wanted = held_rows(parts, multiple), naive(parts, multiple)
    assert list(wanted) == found.keys.tolist()
    assert torch.allclose(from_fixed(found.sums), torch.tensor(list(wanted.values())), atol=1e-6)
    other = held_rows(parts[::-1], multiple)
    assert torch.equal(other.sums, found.sums)


def test_planted_lies_add_no_more_than_honest_groups_would() -> None:
    """A third of the groups lie about item 11 alone, a hundred times as long as others."""
    parts = random_parts(30, 5)
    lies = {11: [300.0, 0.0, 0.0]}
    liars = [group({**rows_of(each), **lies}) if place < 9 else each for place, each in enumerate(parts)]
    longest = float(from_fixed(held_rows(liars, 1.0).sums)[-1].norm())
    assert float(from_fixed(Sum().combine("spectral", liars, parts[0]).sums)[-1].norm()) > 2000
    usual = np.median([np.linalg.norm(row) for each in parts for row in rows_of(each).values()])
    assert longest < 15 * usual


def test_other_phases_few_groups_and_none_are_summed() -> None:
    rule = SmallGroups(Sum(), frozenset({"degrees"}), frozenset({"spectral"}), 0.3, 1.0)
    lies = counts({0: 1}, {0: 1}, {0: 90}, {0: 1})
    empty = Aggregate.empty(N_ITEMS, 1)
    assert not rule.separate
    assert rows_of(rule.combine("degrees", lies, empty)) == {0: [5]}
    assert rows_of(rule.combine("train", lies, empty)) == {0: [93]}
    assert rows_of(rule.combine("degrees", lies[1:3], empty)) == {0: [91]}
    assert rule.combine("spectral", [], empty) is empty
