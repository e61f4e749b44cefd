"""What the privacy block of a federation says of its nodes."""

from __future__ import annotations

from typing import Any

import pytest

from perfedrec.privacy.report import between_nodes, claim, lines, privacy_block
from perfedrec.privacy.settings import PrivacySettings

SECURE = {"aggregation": "secure", "norm": "l2", "clip": 0.5}


@pytest.mark.parametrize(
    ("privacy", "sizes", "told"),
    [
        (SECURE, [9], "there are none: the coordinator sees the sum of the only node"),
        (SECURE, [9, 4], "each of the 2 nodes learns the sum of the other (3 nodes or more avoid that)"),
        (
            SECURE,
            [1, 4],
            "each of the 2 nodes learns the sum of the other; where that node has 1 user, it is this user's",
        ),
        (SECURE, [1, 4, 4, 4], "one node learns the sum of the 3 others, 3 nodes together that of the last one"),
        (SECURE | {"noise": {"training": 1.0}}, [9, 4, 4], "2 nodes together that of the last one, with noise"),
        ({}, [9, 4], "learn from the model that all receive; the coordinator sees the sum of each node"),
    ],
)
def test_it_is_said_what_nodes_learn_of_each_other(privacy: dict[str, Any], sizes: list[int], told: str) -> None:
    settings = PrivacySettings.model_validate(privacy)
    assert told in between_nodes(settings, sizes)
    block = privacy_block(settings, [], "SecAgg+", False, sizes)
    assert block["other_nodes"] == between_nodes(settings, sizes)
    shown = dict(lines(block | {"releases": [{"release": "a", "times": 1, "noise": "none"}]}))
    assert shown["other nodes"] == between_nodes(settings, sizes)


def test_a_simulation_has_no_other_nodes() -> None:
    assert "other_nodes" not in privacy_block(PrivacySettings.model_validate(SECURE), [], "simulated", False)


@pytest.mark.parametrize(
    ("epsilon", "narrower", "labels"),
    [
        (None, [], []),
        (None, ["per coordinate: epsilon 10"], ["unit, adjacency"]),
        (2.0, [], ["unit, adjacency", "delta, accountant"]),
    ],
)
def test_what_belongs_to_a_guarantee_is_shown_with_one(
    epsilon: float | None, narrower: list[str], labels: list[str]
) -> None:
    block = privacy_block(PrivacySettings(), [], "simulated", False) | {"narrower": narrower}
    block |= {"releases": [{"release": "a", "times": 1, "noise": "none"}], "epsilon_coordinator": epsilon}
    block |= {"epsilon_recipients": None}
    shown = dict(lines(block))
    assert [each for each in ("unit, adjacency", "delta, accountant") if each in shown] == labels
    assert shown["epsilon, coordinator"].startswith("none (" if epsilon is None else "2")
    assert (shown["epsilon, model recipients"] == "none (for the same reason)") == (epsilon is None)
    assert {"claim", "noise source", "released", "not covered"} <= set(shown)


def test_sums_of_groups_are_said() -> None:
    settings = PrivacySettings.model_validate(SECURE | {"rank": 6, "min_clients": 4})
    assert "groups" not in privacy_block(settings, [], "simulated", False)["sums"]
    block = privacy_block(settings, [], "simulated", False, groups=5)
    assert "of up to 5 groups of a cohort, each by itself (defence.groups); over 4 clients" in block["sums"]
    small = privacy_block(settings, [], "simulated", False, group_size=6)
    assert "degrees and passes of groups of 6 clients or more, each by itself and by item" in small["sums"]
    assert small["row_sets"] == "shown to the coordinator without names, in groups of 6 clients or more before training"
    assert block["row_sets"] == "hidden"
    assert "sums by item show the items of many users" in claim(small | {"epsilon_coordinator": None})
    assert "by item" not in claim(block | {"epsilon_coordinator": None})
