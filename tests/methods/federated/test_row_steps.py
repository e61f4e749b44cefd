"""What a round applies: what waits in the bank, and how far the mean change of a row is bounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.federated.toys import assert_same, settings, world

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, from_fixed
from perfedrec.core.keys import Key
from perfedrec.core.records import flatten, unflatten
from perfedrec.core.types import Spec
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.row_steps import bounded, empty_bank, released
from perfedrec.methods.federated.state import PerFedRecState
from perfedrec.methods.federated.tables import over_tables

SPECTRAL = {"pretraining__kind": "spectral"}
BASIS = {
    **SPECTRAL,
    "privacy__aggregation": "secure",
    "privacy__norm": "l2",
    "privacy__clip": 0.5,
    "privacy__rank": 6,
    "privacy__min_clients": 4,
    "pretraining__cluster_passes": 0,
}


def summed(rows: dict[int, list[float]], weights: list[float], n_items: int) -> Aggregate:
    """The sum of ``weights`` clients whose mean changes are ``rows``, by key."""
    keys = torch.tensor(sorted(rows))
    means = torch.tensor([rows[int(key)] for key in keys], dtype=torch.float64)
    own = torch.tensor(weights, dtype=torch.float64)
    return replace(
        Aggregate.empty(n_items, len(weights)),
        clients=int(sum(weights)),
        keys=keys,
        sums=means * own[keys // n_items, None] * FIXED_POINT,
        weights=own * FIXED_POINT,
    )


def means_of(aggregate: Aggregate, weights: torch.Tensor) -> dict[int, list[float]]:
    rows = from_fixed(aggregate.sums) / weights[aggregate.keys // aggregate.n_items, None]
    return dict(zip(aggregate.keys.tolist(), rows.tolist(), strict=True))


def test_the_largest_changes_are_applied_and_others_wait_for_more() -> None:
    """Half of three items with changes are two; item 1 is too small twice, and in the third round it is the largest."""
    bank, weights = torch.zeros(4, 2), torch.tensor([2.0])
    first = summed({0: [4.0, 0.0], 1: [1.0, 0.0], 3: [0.0, 5.0]}, [2.0], 4)
    found = released(bank, first, weights, 0.5)
    assert means_of(found, weights) == {0: [4.0, 0.0], 3: [0.0, 5.0]}
    assert bank.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]
    second = summed({0: [3.0, 0.0], 1: [1.0, 0.0], 2: [0.0, 6.0]}, [2.0], 4)
    assert means_of(released(bank, second, weights, 0.34), weights) == {0: [3.0, 0.0], 2: [0.0, 6.0]}
    third = summed({1: [1.0, 0.0], 3: [2.0, 0.0]}, [2.0], 4)
    assert means_of(released(bank, third, weights, 0.5), weights) == {1: [3.0, 0.0]}
    assert bank.tolist() == [[0, 0], [0, 0], [0, 0], [2, 0]]
    assert released(None, third, weights, None) is third


def test_what_waits_for_a_table_without_clients_goes_on_waiting() -> None:
    bank = torch.zeros(4, 1)
    both = torch.tensor([3.0, 1.0])
    found = released(bank, summed({0: [8.0], 1: [1.0], 2: [4.0], 3: [2.0]}, [3.0, 1.0], 2), both, 0.5)
    assert means_of(found, both) == {0: [8.0], 2: [4.0]}  # item 0 of both tables: 3/4 * 8 + 1/4 * 4
    alone = torch.tensor([2.0, 0.0])
    found = released(bank, summed({1: [5.0]}, [2.0, 0.0], 2), alone, 0.5)
    assert means_of(found, alone) == {1: [6.0]}
    assert bank.tolist() == [[0], [0], [0], [2]]


def test_nothing_is_lost_in_the_bank() -> None:
    generator = torch.Generator().manual_seed(4)
    bank, weights, total = torch.zeros(10, 3), torch.tensor([2.0]), torch.zeros(10, 3)
    taken = torch.zeros(10, 3)
    for _ in range(6):
        rows = {int(key): torch.randn(3, generator=generator).tolist() for key in torch.randperm(10)[:6]}
        for key, row in rows.items():
            total[key] += torch.tensor(row)
        found = released(bank, summed(rows, [2.0], 10), weights, 0.3)
        assert 1 <= found.keys.numel() <= 3
        for key, row in means_of(found, weights).items():
            taken[key] += torch.tensor(row)
    assert torch.allclose(taken + bank, total, atol=1e-5)


def test_no_mean_change_of_a_table_and_of_all_tables_is_above_the_bound() -> None:
    weights = torch.tensor([3.0, 1.0])
    before = summed({0: [30.0, 40.0], 1: [0.3, 0.4], 2: [3.0, 4.0], 4: [0.0, 1.0]}, [3.0, 1.0], 3)
    found = means_of(bounded(before, weights, 5.0), weights)
    assert found[0] == pytest.approx([3.0, 4.0], rel=1e-5)
    assert [found[1], found[2], found[4]] == [pytest.approx([0.3, 0.4]), [3, 4], [0, 1]]
    assert bounded(before, weights, None) is before
    changes = over_tables(before.keys, from_fixed(bounded(before, weights, 0.5).sums), 3)[1] / weights.sum()
    assert float(changes.norm(dim=1).max()) <= 0.5


def longest_step(**changes: Any) -> float:
    """The longest step of a row of the item table in training with a plain server, whose learning rate is 1."""
    here, longest = world(**changes, server__optimizer="fedavg", server__learning_rate=1.0), 0.0
    for _ in range(8):
        before, phase = here.state.items.clone(), here.algorithm.phase(here.state)
        here.play(1)
        longest = max(longest, float((here.state.items - before).norm(dim=1).max()) if phase == "train" else 0.0)
    return longest


@pytest.mark.parametrize(("profile", "bound"), [(SPECTRAL, 1e-3), (BASIS, 1e-3)], ids=["seen", "secret"])
def test_the_bound_holds_in_training_whether_uploads_are_seen_or_secret(profile: dict[str, Any], bound: float) -> None:
    assert 0 < longest_step(**profile, defence__row_step=bound) <= bound * (1 + 1e-3)
    assert longest_step(**profile) > 2 * bound


@pytest.mark.parametrize("profile", [SPECTRAL, BASIS], ids=["seen", "secret"])
def test_only_the_share_of_the_items_moves_in_a_round(profile: dict[str, Any]) -> None:
    here, moving = world(**profile, defence__sparse=0.25), []
    for _ in range(8):
        before, phase = here.state.items.clone(), here.algorithm.phase(here.state)
        here.play(1)
        moving.append(int((here.state.items != before).any(1).sum()) if phase == "train" else 0)
    assert 0 < max(moving) <= 6  # of 24 items
    assert here.state.bank is not None
    assert bool(here.state.bank.any())


def test_the_bank_goes_through_a_checkpoint_and_is_in_no_other_state() -> None:
    whole, halves = (world(**SPECTRAL, defence__sparse=0.25, defence__row_step=0.001) for _ in range(2))
    whole.play(8)
    halves.play(5)
    assert halves.state.bank is not None
    assert bool(halves.state.bank.any())
    tensors, scalars = flatten(halves.state)
    halves.state = unflatten(PerFedRecState, {name: each.clone() for name, each in tensors.items()}, scalars)
    halves.play(3)
    assert_same(whole.state, halves.state)
    assert halves.algorithm.serving(halves.state).bank is None
    assert "bank" not in flatten(world().state)[0]
    assert empty_bank(halves.state.items, 0, None) is None


def test_bounds_that_nothing_reaches_leave_the_model_as_it_is_bit_for_bit() -> None:
    one, other = world(**SPECTRAL), world(**SPECTRAL, defence__row_step=1e6)
    one.play(6)
    other.play(6)
    assert_same(one.state, other.state)


def test_options_of_a_service_that_a_method_lacks_are_said() -> None:
    options = FedMF.Options.model_validate({"defence": {"alike": 0.5, "holders": 5, "row_step": 0.1}})
    (said,) = FedMF(options).remarks(100)
    assert said.startswith("defence.alike, defence.holders: without effect, because this method has no neighbourhood")
    assert FedMF().remarks(100) == []
    assert PerFedRecPP(settings(defence__alike=0.5, defence__holders=5)).remarks(30) == []


def test_the_divisor_of_secret_sums_is_where_the_tables_are() -> None:
    """Rows are divided by the weights of their tables there."""
    secret = {"aggregation": "secure", "norm": "l2", "clip": 0.5}
    algorithm = FedMF(FedMF.Options.model_validate({"privacy": secret, "selection": {"n_clients_per_round": 12}}))
    state = algorithm.init(Spec(30, 4, torch.ones(4, dtype=torch.int64)), Key(0))
    assert algorithm.group_weights(state, Aggregate.empty(4, 1)).tolist() == [12]
    elsewhere = replace(state, items=state.items.to("meta"))
    assert algorithm.group_weights(elsewhere, Aggregate.empty(4, 1)).device == elsewhere.items.device
