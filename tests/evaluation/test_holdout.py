"""What nodes hold out: a function of ids alone, the same wherever and among whomever a user is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import words_of
from perfedrec.evaluation.holdout import TEST, TRAIN, VALID, EvaluationSettings, HoldOut, rule_in


def parts(users: dict[str, list[str]], rule: HoldOut) -> dict[str, dict[str, int]]:
    """The part of each item of each user."""
    counts = torch.tensor([len(items) for items in users.values()], dtype=torch.int64)
    segments = torch.repeat_interleave(torch.arange(len(users)), counts)
    names = [item for items in users.values() for item in items]
    found: Tensor = rule.parts(segments, counts, words_of(users), words_of(names))
    places = iter(found.tolist())
    return {user: {item: next(places) for item in items} for user, items in users.items()}


USERS = {
    "ann": [f"i{number}" for number in range(10)],
    "bob": ["i3", "i1"],
    "cem": ["i1", "i2", "i3"],
    "dee": [f"i{number}" for number in range(0, 40, 2)],
    "eve": [],
}


def sizes(own: dict[str, int]) -> tuple[int, ...]:
    return tuple(sum(part == each for part in own.values()) for each in (TRAIN, VALID, TEST))


def test_one_item_is_tested_and_one_validates_of_users_with_three_or_more() -> None:
    found = {user: sizes(own) for user, own in parts(USERS, HoldOut("leave-one-out")).items()}
    assert found == {"ann": (8, 1, 1), "bob": (2, 0, 0), "cem": (1, 1, 1), "dee": (18, 1, 1), "eve": (0, 0, 0)}


def test_shares_are_rounded_as_those_of_a_split() -> None:
    found = {user: sizes(own) for user, own in parts(USERS, HoldOut("ratio", (0.6, 0.2, 0.2))).items()}
    assert found == {"ann": (6, 2, 2), "bob": (2, 0, 0), "cem": (2, 0, 1), "dee": (12, 4, 4), "eve": (0, 0, 0)}


@pytest.mark.parametrize("rule", [HoldOut("leave-one-out"), HoldOut("ratio")])
def test_what_a_user_holds_out_depends_on_nobody_else_and_on_no_order(rule: HoldOut) -> None:
    together = parts(USERS, rule)
    for user, items in USERS.items():
        assert parts({user: items}, rule) == {user: together[user]}
        assert parts({"zoe": ["i9", "i2", "i4"], user: items[::-1]}, rule)[user] == together[user]


def test_users_with_the_same_items_hold_out_different_ones() -> None:
    items = [f"i{number}" for number in range(20)]
    found = parts({f"u{number}": items for number in range(200)}, HoldOut("leave-one-out"))
    tested = [item for own in found.values() for item, part in own.items() if part == TEST]
    assert len(tested) == 200
    assert max(tested.count(item) for item in items) < 25  # 10 on average


def test_auto_holds_out_unless_privacy_promises_noise() -> None:
    assert EvaluationSettings().resolved(noisy=False).rule == HoldOut("leave-one-out")
    assert EvaluationSettings().resolved(noisy=True).rule is None
    chosen = EvaluationSettings(hold_out="ratio", ratio="0.5,0.25,0.25")
    assert chosen.resolved(noisy=False).rule == HoldOut("ratio", (0.5, 0.25, 0.25))
    with pytest.raises(ConfigError, match=r"^evaluation.hold_out = ratio opens sums of hits without noise, .* = none"):
        chosen.resolved(noisy=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_out": "some"}, "hold_out"),
        ({"hold_out": "none", "ratio": "0.8,0.1,0.1"}, "ratio changes nothing with hold_out = none"),
        ({"hold_out": "ratio", "ratio": "0.8,0.3,0.1"}, "add up to 1"),
        ({"hold_out": "ratio", "ratio": "0.8,0.2"}, "expected three shares"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings.model_validate(options)


def test_a_node_reads_the_rule_in_its_configuration() -> None:
    assert rule_in("") is None
    assert rule_in('[evaluation]\nhold_out = "ratio"\nratio = [0.5, 0.3, 0.2]\n') == HoldOut("ratio", (0.5, 0.3, 0.2))
    for text in ('[evaluation]\nhold_out = "all"\n', "[evaluation", "evaluation = 3"):
        with pytest.raises(ConfigError, match="the section evaluation of the federation's configuration"):
            rule_in(text)
