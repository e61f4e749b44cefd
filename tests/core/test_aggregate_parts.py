"""Sums of several parts of a block at once are those of the parts alone, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perfedrec.core.aggregate import Aggregate, reduce, reduce_apart, taken_apart
from perfedrec.core.types import Update

N_ITEMS, N_GROUPS, N_PARTS = 7, 2, 3


def block(seed: int, tables: bool, dense: bool) -> Update:
    random = torch.Generator().manual_seed(seed)
    segments = torch.arange(9).repeat_interleave(4)
    return Update(
        users=torch.arange(9),
        groups=torch.randint(0, N_GROUPS, (9,), generator=random),
        weights=torch.rand(9, generator=random),
        segments=segments,
        items=torch.cat([torch.randperm(N_ITEMS, generator=random)[:4] for _ in range(9)]),
        deltas=torch.randn(36, 3, generator=random),
        tables=torch.randint(0, N_GROUPS, (36,), generator=random) if tables else None,
        dense=torch.randn(9, 5, generator=random) if dense else None,
    )


def same(found: Aggregate, wanted: Aggregate) -> bool:
    """Whether two sums are equal, keys of other parts apart."""
    if (found.dense is None) != (wanted.dense is None) or found.clients != wanted.clients:
        return False
    pairs = [(found.keys, wanted.keys), (found.sums, wanted.sums), (found.weights, wanted.weights)]
    pairs += [] if found.dense is None or wanted.dense is None else [(found.dense, wanted.dense)]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("tables", "dense"), [(False, False), (True, False), (True, True)])
def test_parts_of_blocks_are_those_of_each_part_alone(tables: bool, dense: bool) -> None:
    numbers, update = torch.tensor([2, 0, 0, 2, 1, 2, 0, 1, 2]), block(0, tables, dense)
    halves = [torch.arange(9) < 5, torch.arange(9) >= 5]
    first, second = (reduce_apart(update.part(each), numbers[each], N_PARTS, N_ITEMS, N_GROUPS) for each in halves)
    found = taken_apart(first + second, torch.bincount(numbers).tolist())
    for part, own in enumerate(found):
        assert same(own, reduce(update.part(numbers == part), N_ITEMS, N_GROUPS))


def test_a_part_without_rows_is_empty() -> None:
    update = block(1, False, False).part(torch.arange(9) < 1)
    found = taken_apart(reduce_apart(update, torch.tensor([1]), 2, N_ITEMS, N_GROUPS), [0, 1])
    assert found[0].keys.numel() == 0
    assert same(found[1], replace(reduce(update, N_ITEMS, N_GROUPS)))
