"""Sums of groups of a cohort: over messages they are those of the simulator, and a robust rule sees no other sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Message
from tests.parity.federation import SINGLE, Twins, settings

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.errors import ConfigError
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.flower.exchange import Rejection

PRIVACY = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "rank": 6, "min_clients": 4}
DEFENCE = {"rule": "trimmed-mean", "groups": 5, "row_clip": 0.3}


def options(**parts: Any) -> Any:
    base = {
        "pretraining": {"kind": "spectral", "cluster_passes": 0},
        "selection": {"n_clients_per_round": 23},
        "privacy": PRIVACY,
        "defence": DEFENCE,
    }
    return settings(**{name: {**base.get(name, {}), **parts.get(name, {})} for name in base | parts})


def test_groups_of_nodes_are_the_simulators(monkeypatch: pytest.MonkeyPatch) -> None:
    twins, seen = Twins(options(), SINGLE), []
    rule = twins.algorithm.aggregator

    class Watched:
        separate, groups = rule.separate, rule.groups

        def combine(self, phase: str, parts: Any, empty: Aggregate) -> Aggregate:
            parts = list(parts)
            seen.append([each.clients for each in parts])
            return rule.combine(phase, parts, empty)

    monkeypatch.setattr(twins.algorithm, "aggregator", Watched())
    for _ in range(len(twins.algorithm.phases) + 2):
        seen.clear()
        assert twins.simulate().clients == twins.play().clients == 23
        assert twins.difference() <= 1e-5
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == [4, 4, 5, 5, 5]


def test_small_groups_before_training_are_the_simulators() -> None:
    small = {"rule": "none", "groups": 0, "row_clip": None, "group_size": 5, "malicious": 0.3}
    twins = Twins(options(defence=small, clusters={"n_clusters": 0}), SINGLE)
    assert "join" not in [each.name for each in twins.algorithm.phases]
    for _ in range(len(twins.algorithm.phases) + 1):
        assert twins.simulate().clients == twins.play().clients == 23
        assert twins.difference() <= 1e-5


def test_a_group_of_too_few_is_not_opened_and_the_others_are() -> None:
    def silent(reply: Message) -> Message | None:
        lost = reply.metadata.src_node_id in gone and reply.metadata.message_type == "train.masked"
        return None if lost else reply

    gone: set[int] = set()
    twins, rejected = Twins(options(), SINGLE, silent), list[Rejection]()
    for _ in range(len(twins.algorithm.phases)):
        twins.play()
    gone |= {100, 101}
    report = twins.play(rejected)
    assert report.aborted is None
    assert 0 < report.clients < 23 - 2 + 1
    assert {100, 101} <= {each.node for each in rejected}
    assert report.clients == 23 - len(rejected)
    assert bool(twins.flower.items.isfinite().all())


def test_the_rule_over_groups_changes_the_model_and_groups_alone_do_not() -> None:
    """Groups whose sums are added up again give the model of one sum."""

    def played(defence: dict[str, Any]) -> torch.Tensor:
        twins = Twins(options(defence=defence), SINGLE)
        for _ in range(len(twins.algorithm.phases) + 2):
            twins.simulate()
        return twins.simulated.items

    one = played({"rule": "none", "groups": 0})
    assert torch.equal(one, played({"rule": "clip", "threshold": 1e6}))
    assert not torch.equal(one, played({"rule": "median"}))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"privacy": {"rank": 0}}, "shows the items of its clients"),
        ({"defence": {"rule": "none"}}, "no effect without a rule"),
        ({"defence": {"groups": 0}}, "compares single clients"),
        ({"defence": {"groups": 2}}, "fewer than 3 groups"),
        ({"privacy": {"min_clients": 8}}, "at least 24"),
        (
            {"privacy": {"noise": {"training": 1.0}}, "clusters": {"n_clusters": 0}},
            "fewer clients, whose noise is that of the whole cohort",
        ),
        ({"privacy": {"epsilon": 8.0}, "clusters": {"n_clusters": 0}}, "no epsilon"),
    ],
)
def test_groups_that_tell_too_much_or_nothing_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**parts)


def test_a_sum_in_the_clear_is_bounded_by_the_coordinator() -> None:
    """A node that does not keep the bound on rows is held to it, as in the simulator."""
    clear = {"privacy": {"aggregation": "sparse", "norm": "coordinate", "clip": None}}
    sparse = settings(**clear, defence={"row_clip": 0.01}, selection={"n_clients_per_round": 23})
    twins = Twins(sparse, SINGLE)
    twins.algorithm.protection.hold_sum = watched = Watching(twins.algorithm.protection.hold_sum)  # type: ignore[method-assign]
    for _ in range(len(twins.algorithm.phases) + 2):
        twins.simulate()
        twins.play()
    assert twins.difference() <= 1e-5
    assert watched.changed == 0  # honest nodes keep the bound
    assert watched.calls >= 23


class Watching:
    def __init__(self, function: Any) -> None:
        self.function, self.calls, self.changed = function, 0, 0

    def __call__(self, phase: str, part: Aggregate) -> Aggregate:
        held: Aggregate = self.function(phase, part)
        self.calls, self.changed = self.calls + 1, self.changed + (held is not part)
        return held


def test_a_rule_over_single_clients_and_a_method_with_its_own_rule_are_checked() -> None:
    from perfedrec.methods.federated.fastpfrec import FastPFRec, FastPFRecSettings

    with pytest.raises(ConfigError, match="the method's own rule of aggregation"):
        FastPFRec(FastPFRecSettings.model_validate({"defence": {"rule": "krum"}}))
    assert PerFedRecPP(settings(defence={"rule": "krum"})).aggregator.separate
