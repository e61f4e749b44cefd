"""Compiled kernels of federated training against torch."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perfedrec.core import compiled
from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import block_rows
from perfedrec.methods.federated import local
from perfedrec.methods.federated.cohort import select_proportional
from perfedrec.methods.federated.local import LocalTask, Parameters, autograd_steps, own_rows
from perfedrec.methods.federated.network import finish, ranking_loss
from perfedrec.methods.federated.settings import ClientSettings, ServerSettings
from perfedrec.methods.federated.state import ClientState
from perfedrec.methods.federated.subspace import _filled
from perfedrec.methods.federated.tables import Apart, Average, Moments, Received, Tables, step
from perfedrec.nn.propagation import Star
from perfedrec.nn.segments import expand
from perfedrec.privacy.labels import Labels

pytest.importorskip("numba")
Result = TypeVar("Result")
N_ITEMS, N_TABLES = 7, 3


def by_torch(function: Callable[[], Result]) -> Result:
    """What ``function`` returns without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_installed", lambda: False)
        return function()


def server_steps(rule: str, n_tables: int, averaged: bool, width: int, seed: int) -> list[Tensor]:
    """Everything that three rounds leave behind on the server."""
    generator = torch.Generator().manual_seed(seed)
    options = ServerSettings(optimizer=rule, learning_rate=0.5, averaging=0.9 if averaged else 0.0)
    items = torch.randn(N_ITEMS, width, generator=generator)
    offsets = torch.randn(n_tables * N_ITEMS, width, generator=generator)
    average = Average.start(items) if averaged else None
    moments = [None if rule == "fedavg" else Moments.zeros(each) for each in (items, offsets)]
    for played in range(3):
        keys = (torch.rand(n_tables * N_ITEMS, generator=generator) < 0.5).nonzero().squeeze(1)
        sums = (torch.randn(keys.numel(), width, generator=generator).double() * FIXED_POINT).round()
        weights = torch.rand(n_tables, generator=generator) + 1
        aggregate = Aggregate(N_ITEMS, 3, keys, sums, weights)
        apart = Apart(offsets, moments[1], weights, 0.1)
        step(options, items, moments[0], average, aggregate, weights.sum(), played, apart)
    left = [items, offsets, *([] if average is None else [average.values, average.rounds])]
    return left + [each for one in moments if one is not None for each in (one.first, one.second)]


@settings(max_examples=60)
@given(
    rule=st.sampled_from(["fedavg", "fedadam", "fedyogi", "fedadagrad"]),
    n_tables=st.sampled_from([1, N_TABLES]),
    averaged=st.booleans(),
    width=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 999),
)
def test_the_server_step(rule: str, n_tables: int, averaged: bool, width: int, seed: int) -> None:
    mine = server_steps(rule, n_tables, averaged, width, seed)
    theirs = by_torch(lambda: server_steps(rule, n_tables, averaged, width, seed))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-6)


def test_keys_that_do_not_ascend_are_refused() -> None:
    keys, sums = torch.tensor([2 * N_ITEMS - 1, N_ITEMS, 0]), torch.ones(3, 2, dtype=torch.float64)
    mixed, items = Aggregate(N_ITEMS, 1, keys, sums, torch.ones(2)), torch.zeros(N_ITEMS, 2)
    with pytest.raises(PerfedrecError, match="keys of an aggregate do not ascend"):
        step(ServerSettings(), items, None, None, mixed, torch.tensor(1.0), 0)
    assert not items.any()


@given(n=st.integers(0, 9), width=st.sampled_from([1, 5, 64]), seed=st.integers(0, 99))
def test_rows_of_several_tables(n: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table, offsets = (torch.randn(k * N_ITEMS, width, generator=generator) for k in (1, N_TABLES))
    items, groups = (torch.randint(size, (n,), generator=generator) for size in (N_ITEMS, N_TABLES))
    tables = Tables(table, offsets)
    rows = tables.rows(items, groups)
    assert torch.equal(rows, by_torch(lambda: tables.rows(items, groups)))
    assert torch.equal(rows, table[items] + offsets[groups * N_ITEMS + items])


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), n=st.integers(1, 60), seed=st.integers(0, 99))
def test_the_same_cohort(sizes: list[int], n: int, seed: int) -> None:
    """In both ways also where the draws of too few users are small."""
    labels = torch.repeat_interleave(torch.tensor([*sizes, 1])).flip(0)
    mine = select_proportional(labels, n, Key(seed))
    assert torch.equal(mine, by_torch(lambda: select_proportional(labels, n, Key(seed))))


def test_labels_of_no_cluster_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        select_proportional(torch.tensor([0, -1, 1, 1]), 2, Key(0))


def test_rows_of_a_basis_that_are_filled() -> None:
    basis = torch.tensor([[0, 0, 0], [0, 0, -1], [7, 0, 0], [0, 0, 0]], dtype=torch.int16)
    assert _filled(basis).tolist() == by_torch(lambda: _filled(basis)).tolist() == [False, True, True, False]


def test_rows_that_clients_keep() -> None:
    """Rows 0, 2 and 3 were trained; row 1 was masked, and the last label is a decoy."""
    kept, before = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0]])
    positions = torch.tensor([2, 0, 3, -1])
    found = own_rows(kept, positions, before)
    assert found.squeeze().tolist() == [2, -2, 1, 3]
    assert torch.equal(found, by_torch(lambda: own_rows(kept, positions, before)))


def task(client: ClientSettings, kind: str, begun: bool, grouped: bool, width: int, seed: int) -> LocalTask:
    """Local training of four clients, the second of which has no negatives, the third fewer than positives, and the
    last nothing at all. ``kind`` is that of the propagation. Scores are of size 1, so that rounding does not grow."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n_positives, n_negatives, n_items = [5, 2, 6, 0], [5, 0, 4, 0], 20
    if client.loss == "softmax":
        n_negatives = [client.n_negatives, 0, 1, 0]
    offsets = torch.tensor([0, *n_positives]).cumsum(0)
    rows, _ = block_rows(offsets, torch.randint(n_items, (13,), generator=generator), torch.arange(4))
    owners = torch.repeat_interleave(torch.tensor(n_negatives))
    labels = Labels(rows, torch.arange(13), torch.randint(n_items, owners.shape, generator=generator), owners)
    private, items = numbers(4, width) * width**-0.5, numbers(n_items, width) * width**-0.5
    every, segments = torch.cat([rows.items, labels.negatives]), torch.cat([rows.segments, owners])
    tables = Tables(items, numbers(3 * n_items, width) * 0.1 if grouped else None)
    received = Received(tables, torch.tensor([2, 0, 1, 1]), every, segments, every)
    stars = {
        "none": None,
        "first layer": Star(0.5, numbers(13)),
        "shifted": Star(0.3, numbers(13), numbers(4, width) * width**-0.5, 0.3, numbers(n_items, width) * width**-0.5),
        "scaled": Star(1.0, numbers(13), scale=numbers(n_items, 1)),
    }
    star, moments = stars[kind], (numbers(4, width), numbers(4, width).abs())
    whole = torch.zeros(4, dtype=torch.int64)
    state = ClientState(private, *moments, torch.tensor([0, 1, 5, 900]), whole.float(), whole, whole, numbers(13, 1))

    def objective(parameters: Parameters) -> tuple[Tensor, Tensor]:
        user, up, down = parameters.private, parameters.positives, parameters.negatives
        if star is not None:
            user = star.users(user, up, rows.segments)
            up, down = star.items(up, rows.items), star.items(down, labels.negatives)
        context = expand(user, rows.segments)
        loss = ranking_loss(client, labels, lambda each: finish(each, "inner"), parameters, user, context, up, down)
        return loss, loss

    offset = numbers(13 + owners.numel(), width) * width**-0.5 if begun else None
    return LocalTask(labels, received, private, None, offset, state, objective, client.loss, False, star, client)


@settings(max_examples=100)
@given(
    loss=st.sampled_from(["bpr", "softmax"]),
    kind=st.sampled_from(["none", "first layer", "shifted", "scaled"]),
    n_steps=st.integers(1, 3),
    l2=st.sampled_from([0.0, 0.1]),
    begun=st.booleans(),
    grouped=st.booleans(),
    width=st.sampled_from([1, 5, 16, 64]),
    seed=st.integers(0, 999),
)
def test_local_steps(
    loss: str, kind: str, n_steps: int, l2: float, begun: bool, grouped: bool, width: int, seed: int
) -> None:
    client = ClientSettings(
        loss=loss,
        n_negatives=6,
        local_steps=n_steps,
        l2=l2,
        learning_rate=0.05,
        user_learning_rate=0.1,
        temperature=0.7,
    )
    given_ = task(client, kind, begun, grouped, width, seed)
    before = given_.start.private.clone(), given_.client_state.first.clone()
    mine, theirs = local.steps(given_), autograd_steps(given_)
    for name in ("private", "first", "second", "delta", "loss", "steps"):
        one, other = getattr(mine, name), getattr(theirs, name)
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4, msg=name)
    assert torch.equal(given_.start.private, before[0])
    assert torch.equal(given_.client_state.first, before[1])
