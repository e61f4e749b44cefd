from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.records import copied, flatten, nbytes, unflatten
from perfedrec.methods.federated.state import Clusters, OptimizerState, PerFedRecState, Service
from perfedrec.methods.federated.tables import Moments
from perfedrec.nn.propagation import Bipartite


@dataclass(frozen=True)
class Inner:
    weights: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Outer:
    number: int
    table: Tensor
    inner: Inner
    share: float = 0.5
    name: str = "a"
    flag: bool = False
    maybe: Inner | None = None
    nothing: Tensor | None = None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b) and type(a) is type(b)


def test_the_flat_form_has_names_and_values() -> None:
    record = Outer(3, torch.ones(2, 2), Inner(torch.arange(3)), maybe=Inner(torch.zeros(1), torch.ones(1)))
    tensors, scalars = flatten(record)
    assert sorted(tensors) == ["inner.weights", "maybe.bias", "maybe.weights", "table"]
    assert scalars == {"number": 3, "share": 0.5, "name": "a", "flag": False}
    assert tensors["inner.weights"].tolist() == [0, 1, 2]


def test_round_trip_with_nesting_and_none() -> None:
    for record in (
        Outer(3, torch.ones(2, 2), Inner(torch.arange(3))),
        Outer(0, torch.empty(0, 4), Inner(torch.zeros(1), torch.ones(2)), 0.0, "", True, Inner(torch.ones(1))),
    ):
        assert same(unflatten(Outer, *flatten(record)), record)


def test_round_trip_of_an_algorithms_state() -> None:
    table = torch.rand(4, 2)
    graph = Bipartite.of(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]), 2, 3)
    kind, service = PerFedRecState, Service(torch.rand(3, 2, 2), graph)
    state = kind(round=5, n_users=3, items=table, degrees=torch.ones(4), service=service)  # nested records are empty
    assert same(unflatten(kind, *flatten(state)), state)
    moments, clusters = OptimizerState(Moments.zeros(table)), Clusters(labels=torch.arange(3))
    state = replace(state, optimizer=moments, clusters=clusters, dense=torch.ones(3))
    assert same(unflatten(kind, *flatten(state)), state)


def test_bytes_are_counted_from_the_tensors() -> None:
    record = Outer(3, torch.ones(2, 2), Inner(torch.arange(3), torch.ones(5, dtype=torch.bool)))
    assert nbytes(record) == 4 * 4 + 3 * 8 + 5


def test_a_copy_shares_no_memory_and_can_change_device() -> None:
    record = Outer(3, torch.ones(2, 2), Inner(torch.arange(3)), maybe=Inner(torch.zeros(1), torch.ones(1)))
    twin = copied(record)
    assert same(twin, record)
    for name, tensor in flatten(twin)[0].items():
        tensor.fill_(9)
        assert not bool((flatten(record)[0][name] == 9).any())
    moved = copied(record, torch.device("meta"))
    assert {tensor.device.type for tensor in flatten(moved)[0].values()} == {"meta"}
    assert flatten(moved)[1] == flatten(record)[1]


def test_a_copy_shares_what_never_changes() -> None:
    @dataclass(frozen=True)
    class Kept:
        table: Tensor
        lists: Tensor = field(metadata={"constant": True})

    record = Kept(torch.zeros(2), torch.ones(2))
    other = copied(record)
    assert other.lists is record.lists
    assert other.table is not record.table
    assert copied(record, torch.device("cpu")).lists is not record.lists
