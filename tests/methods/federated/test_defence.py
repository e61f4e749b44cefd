"""What a defence does to a method: bounds on tables and passes, repeated edges, and nothing by default."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.federated.toys import World, settings, world
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Sum, from_fixed
from perfedrec.core.types import Update
from perfedrec.methods.federated.defence import DefenceSettings, distinct_edges, hold_pass, hold_reports, hold_tables
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes import round as runtime

SPECTRAL = {"pretraining__kind": "spectral", "pretraining__at": "service"}


def passed(rows: list[list[float]]) -> Aggregate:
    sums = torch.tensor(rows, dtype=torch.float64) * FIXED_POINT
    return replace(Aggregate.empty(len(rows), 1), clients=9, keys=torch.arange(len(rows)), sums=sums)


def test_a_row_of_a_pass_is_bounded_by_what_its_degree_makes_usual() -> None:
    """With exponent 1/2 a row grows with the root of the degree: the rows of 1, 4 and 16 users are all usual."""
    degrees = torch.tensor([1.0, 4.0, 16.0, 4.0, 1.0])
    found = hold_pass(passed([[1, 0], [0, 2], [4, 0], [0, 60], [0, 0]]), degrees, 0.5, 3.0)
    assert from_fixed(found.sums).tolist() == [[1, 0], [0, 2], [4, 0], [0, 6], [0, 0]]
    before = passed([[1, 0], [0, 900]])
    assert hold_pass(before, degrees[:2], 0.5, None) is before


def test_a_long_report_is_shortened_in_each_layer() -> None:
    reports = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 80.0]], [[30.0, 40.0], [2.0, 0.0]]])
    found = hold_reports(reports, 2.0)
    assert found.tolist() == [[[1, 0], [0, 2]], [[0, 1], [0, 4]], [pytest.approx([1.2, 1.6]), [2, 0]]]
    assert hold_reports(reports, None) is reports


def test_all_tables_are_bounded_the_clusters_with_the_shared_one() -> None:
    items = torch.tensor([[1.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    offsets = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 50.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    hold_tables(items, offsets, 2.0)
    assert items.tolist() == [[1, 0], [1, 0], [2, 0]]
    whole = offsets.view(2, 3, 2) + items
    assert whole.norm(dim=2).amax(1).tolist() == pytest.approx([2.0, 2.0])
    assert whole[1].tolist() == [[2, 0], [2, 0], [2, 0]]
    hold_tables(items, None, None)
    assert items.tolist() == [[1, 0], [1, 0], [2, 0]]


def test_an_edge_counts_once() -> None:
    edges = torch.tensor([[0, 2, 5], [0, 1, 5], [0, 2, 3]])
    assert distinct_edges(edges) is edges
    again = distinct_edges(torch.cat([edges, edges[:1], edges[:1]]))
    assert sorted(again.tolist()) == sorted(edges.tolist())


def test_rows_cannot_grow_beyond_the_bound_in_training() -> None:
    here = world(**{**SPECTRAL, "defence__row_length": 1.1})
    here.play(8)
    lengths = here.state.items.norm(dim=1)
    assert float(lengths.max() / lengths.median()) <= 1.1 * 1.01
    free = world(**SPECTRAL)
    free.play(8)
    lengths = free.state.items.norm(dim=1)
    assert float(lengths.max() / lengths.median()) > 1.25


def test_clipped_clients_are_the_same_in_one_block_and_in_several() -> None:
    clipped = {**SPECTRAL, "defence__rule": "clip", "defence__threshold": 0.5}
    one, several, free = world(**clipped), world(**clipped), world(**SPECTRAL)
    for each in (one, free):
        each.play(4)
    several.play(4, block_size=2)  # each client's part is then made and compared
    assert torch.equal(one.state.items, several.state.items)
    assert not torch.equal(one.state.items, free.state.items)


def test_by_default_there_is_no_defence() -> None:
    assert DefenceSettings().given == ""
    assert DefenceSettings(rule="clip", row_clip=0.3).given == "rule = clip, row_clip = 0.3"
    here = world()
    assert here.algorithm.defence == DefenceSettings()
    assert type(here.algorithm.aggregator) is Sum
    assert here.algorithm.protection.row_clip is None


BASIS = {"privacy__aggregation": "secure", "privacy__norm": "l2", "privacy__clip": 0.5, "privacy__rank": 6}
SECURE = {**BASIS, "privacy__min_clients": 4, "pretraining__kind": "spectral"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**SECURE, "defence__holders": 5}, "holders = 5 has no effect: the neighbourhood service"),
        ({**SECURE, "defence__report_length": 1.5}, "report_length = 1.5 has no effect"),
        ({**SECURE, "defence__max_edges": 9}, "with privacy.aggregation = secure it is not asked"),
        ({**SECURE, "defence__alike": 0.5}, "expected defence.alike = off, or privacy.aggregation = sparse"),
        (
            {**SECURE, "defence__alike": 0.5, "defence__holders": 5},
            "expected defence.alike = off, defence.holders = 3, or",
        ),
        ({"defence__threshold": 2.0}, "threshold = 2.0 has no effect with defence.rule = none"),
        ({"defence__rule": "clip", "defence__quorum": 3}, "expected defence.rule = quorum, or defence.quorum = 2"),
        ({"defence__rule": "median", "defence__malicious": 0.2}, "trimmed-mean or krum or bulyan or shortest"),
        ({"defence__group_size": 8}, "group_size = 8 is for secure sums in a basis"),
        ({**SECURE, "privacy__rank": 0, "defence__group_size": 8}, "with privacy.rank above 0"),
        ({**SECURE, "defence__group_size": 3}, "is below privacy.min_clients = 4"),
        ({**SECURE, "defence__group_size": 8, "privacy__noise": {"training": 1.0}}, "expected no noise"),
        ({**SECURE, "defence__group_rows": 2.0}, "group_rows = 2.0 has no effect without groups before training"),
    ],
)
def test_an_option_that_would_defend_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


SMALL = {**SECURE, "defence__group_size": 4, "clusters__n_clusters": 0}


def begun(sent: Any = None, **changes: Any) -> World:
    """A world after all phases before training. ``sent`` changes what clients send in them."""
    here = world(**{**SMALL, **changes})
    if sent is not None:
        honest = here.algorithm.protection.upload
        here.algorithm.protection.upload = lambda phase, update, key: sent(phase, honest(phase, update, key))  # type: ignore[method-assign]
    here.play(len(here.algorithm.phases))
    return here


def test_lies_before_training_reach_no_further_than_a_group() -> None:
    """Two of 30 clients count and send everything a thousand times."""

    def lying(phase: str, update: Update) -> Update:
        if update.deltas is None or update.segments is None or phase == "train":
            return update
        return replace(update, deltas=update.deltas * torch.where(update.users < 2, 1000.0, 1.0)[update.segments, None])

    def apart(base: World, other: World) -> float:
        """How far two item tables are from each other, as inner products: a basis has no direction of its own."""
        one, two = (each.state.items @ each.state.items.T for each in (base, other))
        return float((one - two).norm() / one.norm())

    groups = {"defence__malicious": 0.4, "defence__group_rows": 1.0}
    free, held = begun(defence__group_size=0), begun(**groups)
    forged, bounded = begun(lying, defence__group_size=0), begun(lying, **groups)
    assert float((forged.state.degrees - free.state.degrees).max()) > 900
    assert float((bounded.state.degrees - held.state.degrees).abs().max()) <= 2 * 2
    assert apart(free, forged) > 1.5 * apart(held, bounded)


def test_groups_before_training_are_the_same_in_all_blocks_and_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = runtime.group_numbers

    def watched(sizes: Tensor, keys: Tensor, number: int) -> Tensor:
        seen.append(draw(sizes, keys, number))
        return seen[-1]

    monkeypatch.setattr(runtime, "group_numbers", watched)
    one, several = world(**SMALL), world(**SMALL)
    n = len(one.algorithm.phases)
    one.play(n)
    assert len(seen) == n
    assert all(torch.equal(each, seen[0]) for each in seen)
    assert torch.bincount(seen[0]).tolist().count(4) >= 5
    several.play(n, block_size=2)
    assert torch.equal(one.state.items, several.state.items)
    assert "join" not in {each.name for each in one.algorithm.phases}
    assert one.state.neighbours is not None


@pytest.mark.parametrize(
    "change", [{"defence__group_size": 7}, {"defence__group_rows": 0.5}, {"defence__malicious": 0.45}]
)
def test_each_option_of_groups_before_training_changes_the_table(change: dict[str, Any]) -> None:
    assert not torch.equal(begun().state.items, begun(**change).state.items)


def test_few_users_have_few_groups_which_is_said() -> None:
    remarks = PerFedRecPP(settings(**SMALL)).remarks
    assert remarks(30) == []
    assert "8 users are 2 groups before training, and of fewer than 3 no rule compares the sums" in remarks(8)[0]


def test_bounds_that_nobody_checks_and_fewer_groups_are_said() -> None:
    def remarks(n_users: int, **changes: Any) -> list[str]:
        return PerFedRecPP(settings(**changes)).remarks(n_users)

    assert remarks(30, **SECURE) == remarks(30, defence__row_clip=0.3) == []
    assert "malicious ones need not" in remarks(30, **SECURE, defence__row_clip=0.3)[0]
    grouped = {**SECURE, "defence__rule": "median", "defence__groups": 500}
    (said,) = remarks(200, **grouped)
    assert "a cohort of 12 clients has 3 groups, not 500" in said
    assert "no rule compares" in remarks(9, **grouped)[0]
    assert remarks(200, **{**grouped, "defence__groups": 3}) == []
