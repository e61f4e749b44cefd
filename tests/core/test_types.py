from dataclasses import fields, replace
from functools import reduce as fold

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perfedrec.core import types
from perfedrec.core.aggregate import Aggregate, distinct, from_fixed, reduce
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Update, block_rows, items_of

N_ITEMS, N_GROUPS, DIM = 11, 3, 4


def update(n: int = 23, seed: int = 0) -> Update:
    """Contributions of ``n`` users with 0 to 6 rows each; numbers of very different sizes, so that order matters."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randperm(N_ITEMS, generator=generator)[: int(torch.randint(7, (), generator=generator))] for _ in range(n)
    ]
    segments = torch.cat([torch.full_like(each, number) for number, each in enumerate(rows)])

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 10.0 ** torch.randint(-5, 3, shape, generator=generator)

    return Update(
        users=torch.arange(100, 100 + n),
        groups=torch.randint(N_GROUPS, (n,), generator=generator),
        weights=torch.randint(1, 30, (n,), generator=generator).float(),
        segments=segments,
        items=torch.cat(rows),
        deltas=numbers(segments.numel(), DIM),
        dense=numbers(n, 5),
        reports=numbers(n, 2, DIM),
        edges=torch.stack([torch.zeros_like(segments), segments, torch.cat(rows)], dim=1),
    )


def part(whole: Update, users: Tensor) -> Update:
    """The contributions of the users at some positions, in the order given."""
    place = {int(user): number for number, user in enumerate(users)}
    assert whole.segments is not None
    assert whole.edges is not None
    rows = torch.cat([(whole.segments == user).nonzero().squeeze(1) for user in users])
    segments = torch.tensor([place[int(each)] for each in whole.segments[rows]], dtype=torch.int64)
    edges = whole.edges[rows].clone()
    edges[:, 1] = segments
    pick = {name: getattr(whole, name)[users] for name in ("users", "groups", "weights", "dense", "reports")}
    return Update(**pick, segments=segments, items=whole.items[rows], deltas=whole.deltas[rows], edges=edges)


def assert_equal(a: Aggregate, b: Aggregate) -> None:
    for field in fields(Aggregate):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


def test_sums_against_a_loop_over_clients() -> None:
    whole = update()
    total = reduce(whole, N_ITEMS, N_GROUPS)
    expected: dict[int, list[float]] = {}
    for row in range(whole.items.numel()):
        user = int(whole.segments[row])
        sums = expected.setdefault(int(whole.groups[user]) * N_ITEMS + int(whole.items[row]), [0.0] * DIM)
        for column in range(DIM):
            sums[column] += float(whole.weights[user]) * float(whole.deltas[row, column])
    assert total.keys.tolist() == sorted(expected)
    torch.testing.assert_close(
        from_fixed(total.sums), torch.tensor([expected[key] for key in sorted(expected)]), rtol=1e-5, atol=1e-6
    )
    weights = [float(whole.weights[whole.groups == group].sum()) for group in range(N_GROUPS)]
    assert from_fixed(total.weights).tolist() == weights
    dense = (whole.dense.double() * whole.weights.double()[:, None]).sum(0)
    torch.testing.assert_close(from_fixed(total.dense).double(), dense, rtol=1e-5, atol=1e-6)
    assert total.clients == 23
    assert total.report_users.tolist() == whole.users.tolist()
    assert total.edges[:, 1].tolist() == (whole.segments + 100).tolist()


@pytest.mark.parametrize("size", [1, 2, 7, 22])
def test_blocks_of_any_size_give_the_same_bits(size: int) -> None:
    whole = update()
    blocks = [reduce(part(whole, users), N_ITEMS, N_GROUPS) for users in torch.arange(23).split(size)]
    assert_equal(fold(lambda a, b: a + b, blocks), reduce(whole, N_ITEMS, N_GROUPS))


@settings(max_examples=40)
@given(order=st.permutations(range(23)), size=st.integers(1, 23), backwards=st.booleans())
def test_any_order_of_users_and_of_sums_gives_the_same_bits(order: list[int], size: int, backwards: bool) -> None:
    whole = update(seed=1)
    blocks = [reduce(part(whole, users), N_ITEMS, N_GROUPS) for users in torch.tensor(order).split(size)]
    total = fold(lambda a, b: b + a if backwards else a + b, blocks)
    reference = reduce(whole, N_ITEMS, N_GROUPS)
    for name in ("keys", "sums", "weights", "dense"):
        assert torch.equal(getattr(total, name), getattr(reference, name)), name
    assert total.clients == 23
    by_user = total.report_users.argsort()
    assert torch.equal(total.reports[by_user], reference.reports)
    assert sorted(total.edges.tolist()) == sorted(reference.edges.tolist())


def test_the_empty_aggregate_is_neutral() -> None:
    total = reduce(update(), N_ITEMS, N_GROUPS)
    for dim in (0, DIM):
        empty = Aggregate.empty(N_ITEMS, N_GROUPS, dim)
        assert_equal(total + empty, total)
        assert_equal(empty + total, total)
        assert_equal(empty + empty, empty)


@pytest.mark.parametrize("name", ["deltas", "weights", "dense", "reports"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    whole = update()
    broken = getattr(whole, name).clone()
    broken.view(-1)[3] = value
    with pytest.raises(PerfedrecError, match="not finite"):
        reduce(replace(whole, **{name: broken}), N_ITEMS, N_GROUPS)


@pytest.mark.parametrize("value", [1e5, -1e5, 1e12, 3e38])
def test_a_number_beyond_what_a_sum_can_hold_is_refused(value: float) -> None:
    """Whole numbers of that size are not exact any more, and the sum would depend on the order of the clients."""
    whole = update()
    deltas = whole.deltas.clone()
    deltas[3, 1] = value
    with pytest.raises(PerfedrecError, match="larger than a sum can hold"):
        reduce(replace(whole, deltas=deltas), N_ITEMS, N_GROUPS)


def test_large_but_allowed_numbers_are_summed_exactly() -> None:
    one = Update(
        users=torch.arange(2),
        groups=torch.zeros(2, dtype=torch.int64),
        weights=torch.ones(2),
        segments=torch.tensor([0, 1]),
        items=torch.tensor([4, 4]),
        deltas=torch.tensor([[50_000.0, 2.0**-30], [25_000.0, -(2.0**-31)]]),
    )
    assert from_fixed(reduce(one, N_ITEMS, 1).sums).tolist() == [[75_000.0, 2.0**-31]]


def test_upload_bytes_by_hand() -> None:
    sent = Update(
        users=torch.arange(3),
        groups=torch.zeros(3, dtype=torch.int64),
        weights=torch.ones(3),
        segments=torch.tensor([0, 0, 2]),
        items=torch.tensor([1, 2, 1]),
        deltas=torch.zeros(3, 5),
        dense=torch.zeros(3, 7),
        reports=torch.zeros(3, 2, 5),
        edges=torch.tensor([[0, 0, 9], [0, 1, 3], [1, 1, 3]]),
    )
    # group and weight 8; rows of 4 + 5 * 4; dense 7 * 4; reports 10 * 4; edges of 4
    assert sent.upload_bytes().tolist() == [8 + 2 * 24 + 28 + 40 + 4, 8 + 0 + 28 + 40 + 8, 8 + 24 + 28 + 40]
    bare = replace(sent, segments=None, items=None, deltas=None, dense=None, reports=None, edges=None)
    assert bare.upload_bytes().tolist() == [8, 8, 8]


def test_a_node_sends_rows_that_its_users_share_once_and_in_more_bytes_where_4_would_lose_something() -> None:
    sent = Update(
        users=torch.arange(2),
        groups=torch.zeros(2, dtype=torch.int64),
        weights=torch.ones(2),
        segments=torch.tensor([0, 0, 1, 1]),
        items=torch.tensor([1, 4, 4, 5]),
        deltas=torch.tensor([[0.3, 2.0], [0.1, 0.25], [0.5, 0.25], [0.7, 0.0]]),
        dense=torch.tensor([[1.0], [2.0]]),
    )
    rounded = reduce(sent, 9, 1)  # float32 has no 0.1 + 0.5: 3 keys; 3 rows of 2 numbers, a weight, a dense number
    assert rounded.upload_bytes() == 3 * 4 + 8 * (3 * 2 + 1 + 1)
    exact = reduce(replace(sent, deltas=sent.deltas.round()), 9, 1)
    assert exact.upload_bytes() == 3 * 4 + 4 * (3 * 2 + 1 + 1)
    assert exact.upload_bytes(masked=True) == rounded.upload_bytes(masked=True) == 8 * (9 * 2 + 1)
    reporting = reduce(replace(sent, reports=torch.zeros(2, 3, 2), edges=torch.zeros(5, 3, dtype=torch.int64)), 9, 1)
    assert reporting.upload_bytes() == rounded.upload_bytes() + 2 * (4 + 4 * 3 * 2) + 5 * 3 * 4


@given(keys=st.lists(st.integers(0, 99), max_size=30), extra=st.sampled_from([0, 10_000]))
def test_distinct_by_counting_and_by_sorting(keys: list[int], extra: int) -> None:
    values, places = distinct(torch.tensor(keys, dtype=torch.int64), 100 + extra)
    assert values.tolist() == sorted(set(keys))
    assert [values.tolist()[place] for place in places] == keys


def test_block_rows_cut_users_out_of_the_whole() -> None:
    offsets, items = torch.tensor([0, 2, 2, 5]), torch.tensor([3, 8, 1, 4, 9])
    attributes = torch.tensor([[1.0], [2.0], [3.0]])
    rows, positions = block_rows(offsets, items, torch.tensor([2, 1, 0]), attributes)
    assert rows.users.tolist() == [2, 1, 0]
    assert rows.offsets.tolist() == [0, 3, 3, 5]
    assert rows.items.tolist() == [1, 4, 9, 3, 8]
    assert rows.segments.tolist() == [0, 0, 0, 2, 2]
    assert positions.tolist() == [2, 3, 4, 0, 1]
    assert rows.attributes.tolist() == [[3.0], [2.0], [1.0]]
    assert rows.counts.tolist() == [3, 0, 2]


def test_lists_of_tokens_become_lists_of_items_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "_LISTS_AT_ONCE", 2)
    tokens = torch.tensor([2, 0, 3, 1])  # of items 0 to 3
    lists = torch.tensor([[0, 3, -1], [2, -1, -1], [1, 0, 2]], dtype=torch.int32)
    found = items_of(lists, tokens)
    assert found.tolist() == [[1, 2, -1], [0, -1, -1], [3, 1, 0]]
    assert found.dtype == torch.int32
    assert lists[0].tolist() == [0, 3, -1]  # which stay as they are
