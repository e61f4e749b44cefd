"""What pages show of the rows of a node: hand-checked."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from perfedrec.core.algorithm import EVALUATE, TRAIN
from perfedrec.methods.federated import phases as phases_module
from perfedrec.runtimes.node import journal as names_of
from perfedrec.web import views
from perfedrec.web.language import texts

EN = texts("en")


def test_a_card_has_a_title_and_a_letter_where_there_is_no_picture() -> None:
    row = {"item": 7, "title": "The “Other” Shore", "picture": False, "attributes": {"genre": "Drama", "year": ""}}
    card = views.card(row)
    assert (card["item"], card["title"], card["letter"], card["picture"]) == ("7", "The “Other” Shore", "O", None)
    assert card["genres"] == ["Drama"]
    assert (
        views.card({"item": "a&b=c/ü", "title": None, "picture": True})["picture"] == "/picture?item=a%26b%3Dc%2F%C3%BC"
    )
    assert views.card({"item": "…"})["letter"] == "·"
    assert views.card({"item": "x", "title": "The"})["letter"] == "T"
    assert 1 <= views.card({"item": "x"})["tint"] <= views.TINTS


def test_shares_are_of_the_size_of_each_part() -> None:
    row = {"item": 1, "rank": 1, "score": 2.0, "local": 1.0, "global": -2.0, "cluster": 1.0, "moved": 0, "own": 0.0}
    assert views.shares(row) == [("global", 50.0), ("cluster", 25.0), ("local", 25.0)]
    assert views.shares({"item": 1, "global": 0.0}) == []
    assert views.shares({"global": 1.0, "local": 0.004}) == [("global", pytest.approx(99.6, abs=0.01))]


def test_a_suggestion_says_why_and_draws_its_shares_one_after_the_other() -> None:
    row = {
        **{"item": 1, "rank": 1, "score": 1.0, "global": 3.0, "local": 1.0, "own": 4.0, "moved": 0},
        "because": [{"item": 2, "title": "A <b>", "share": 0.5}, {"item": 3, "title": None, "share": 0.2}],
    }
    found = views.suggestion(row, EN)
    assert found["because"] == "Because of <cite>A &lt;b&gt;</cite> and <cite>3</cite>"
    assert [(each["model"], each["start"], each["width"]) for each in found["bars"]] == [
        (1, 0.0, 37.5),
        (3, 37.5, 12.5),
        (5, 50.0, 50.0),
    ]
    assert found["share"] == (
        "Where this comes from: what everybody likes 38 %, you alone, learned here 12 %, other parts 50 %"
    )
    assert views.suggestion({"item": 1, "because": []}, EN)["because"] == ""
    assert views.legend([row], EN) == [(1, "what everybody likes"), (3, "you alone, learned here"), (5, "other parts")]


def test_own_things_are_found_by_id_title_and_genre() -> None:
    rows = [
        {"item": "a1", "title": "Über Land", "attributes": {"genre": "Drama"}},
        {"item": "b1", "title": "Inland", "attributes": {}},
        {"item": "c1", "title": None},
    ]
    assert [row["item"] for row in views.fitting(rows, "LAND")] == ["a1", "b1"]
    assert [row["item"] for row in views.fitting(rows, "land drama")] == ["a1"]
    assert [row["item"] for row in views.fitting(rows, "c1")] == ["c1"]
    assert views.fitting(rows, " ") == rows


def entry(number: int, minute: int, **more: Any) -> dict[str, Any]:
    when = datetime(2026, 3, 4, 10, minute).timestamp()
    base = {"entry": number, "time": when, "times": 1, "coordinator": "c:1", "run": "r", "phase": "train"}
    base |= {"round": number, "stage": "sum", "sent": 1000, "received": 2500, "users": 2, "others": 3}
    base |= {"protection": {"profile": "secure", "statement": "only sums"}, "epsilon": None, "against": None}
    return base | {"refused": None} | more


def test_entries_of_a_day_run_and_phase_stand_together() -> None:
    rows = [
        entry(5, 50, others=5),
        entry(4, 40, phase="evaluate"),
        entry(3, 30, refused="policy: privacy.rank is 0", sent=0, times=4),
        entry(2, 20, epsilon=1.25, against="the coordinator"),
        entry(1, 10, phase="mine", others=None),
    ]
    train, evaluate, refused, own = views.journal(rows, EN)
    assert (train["title"], train["day"], train["clock"]) == (
        "Helped to train the model",
        "4 Mar 2026",
        "10:20 – 10:50",
    )
    assert train["words"] == (
        "2 kB left, 5 kB came in. Mixed with the numbers of 3–5 other devices before anybody could read them."
    )
    assert [row["round"] for row in train["rows"]] == ["5", "2"]
    assert train["first"] == 2
    assert evaluate["title"] == "Helped to measure how good the lists are"
    assert (refused["title"], refused["times"]) == ("Refused to answer", 4)
    assert refused["words"] == "It asked for more than the rules of this device allow."
    assert dict(refused["facts"])["exact reason"] == "policy: privacy.rank is 0"
    assert own["title"] == "Answered a question of the federation: mine"
    assert own["words"].endswith("How many other devices were in the sum is not known here.")
    assert own["statement"] == "secure: only sums"
    (first, second) = (views.journal([row], EN)[0]["words"] for row in (entry(1, 1, others=1), entry(1, 1, others=0)))
    assert "numbers of 1 other device before" in first
    assert "Not mixed" in second
    joined = views.journal([entry(1, 1, phase="who takes part", stage=None, others=None)], EN)[0]
    assert (joined["title"], joined["words"]) == ("Said how many people take part here", "1 kB left, 2.5 kB came in.")
    assert views.journal([entry(1, 1, refused="code 7: lost")], EN)[0]["words"] == EN("refused.other")
    facts = dict(views.journal([rows[3]], EN)[0]["facts"])
    assert facts["epsilon so far"] == "1.25 against the coordinator"
    assert facts["people of this device in it"] == "2"


def test_every_phase_that_a_node_of_this_package_answers_has_words() -> None:
    phases = [phases_module.DEGREES, phases_module.SPECTRAL, phases_module.SIZES, phases_module.CLUSTERS]
    names = [each.name for each in (*phases, phases_module.JOIN, TRAIN, EVALUATE)]
    for name in (*names, names_of.JOIN, names_of.MODEL, names_of.TABLE, names_of.SUM):
        assert EN.has(f"phase.{name}"), name


def test_totals_add_up_and_claim_a_limit_only_where_every_run_has_one() -> None:
    run = {"run": "a", "answers": 3, "epsilon": 1.5, "against": "the coordinator"}
    known = {
        "answers": 4,
        "refusals": 0,
        "sent": 1500,
        "received": 0,
        "runs": [run, run | {"run": "b", "epsilon": 2.0}],
    }
    sent, _, epsilon = views.totals(known, EN)
    assert sent == ("Left this device", "1.5 kB", "with the answers to 4 questions")
    assert epsilon[1] == "3.5"
    assert "against the coordinator:" in epsilon[2]
    open_run = known | {"refusals": 2, "runs": [run, run | {"epsilon": None}]}
    assert [each[1] for each in views.totals(open_run, EN)][2:] == ["2", "none"]
    refused_only = known | {"answers": 0, "runs": [run | {"answers": 0, "epsilon": None}]}
    assert len(views.totals(refused_only, EN)) == 2


def test_a_table_of_ones_things_is_quoted_as_csv_is() -> None:
    rows = [{"item": 'a,"b"', "title": "x\ny"}, {"item": 7, "title": None}]
    assert views.as_csv("Ann, B", rows) == 'user,item,title\n"Ann, B","a,""b""","x\ny"\n"Ann, B",7,\n'
