"""What a defence does to a method: bounds on tables and passes, repeated edges, and nothing by default."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.federated.toys import settings, world

from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Sum, from_fixed
from perfedrec.methods.federated.defence import DefenceSettings, distinct_edges, hold_pass, hold_reports, hold_tables
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP

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
        ({"defence__rule": "median", "defence__malicious": 0.2}, "trimmed-mean or krum or bulyan"),
    ],
)
def test_an_option_that_would_defend_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


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
