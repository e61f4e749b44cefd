"""Metrics of lists from anywhere: hand-checked, and compared with ir-measures."""

from typing import Any

import ir_measures
import numpy as np
import polars as pl
import pytest

from perfedrec import ConfigError, DataError, metrics

LISTS = {"u": ["a", "b", "c", "d"], "v": ["c", "a"], "w": ["d", "b", "a"]}
TRUTH = {"u": ["b", "d"], "v": ["x"], "w": ["d", "c", "a"], "x": []}


def test_by_hand() -> None:
    """u finds b at rank 2 and d at rank 4, v nothing, w finds d at rank 1 and a at rank 3; x has nothing to find."""
    assert metrics.recall(LISTS, TRUTH, k=3) == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)
    assert metrics.precision(LISTS, TRUTH, k=3) == pytest.approx((1 / 3 + 0 + 2 / 3) / 3)
    assert metrics.hr(LISTS, TRUTH, k=1) == pytest.approx(1 / 3)
    assert metrics.mrr(LISTS, TRUTH, k=4) == pytest.approx((1 / 2 + 0 + 1) / 3)
    gain = {rank: 1 / np.log2(1 + rank) for rank in range(1, 5)}
    u, w = (gain[2] + gain[4]) / (gain[1] + gain[2]), (gain[1] + gain[3]) / (gain[1] + gain[2] + gain[3])
    assert metrics.ndcg(LISTS, TRUTH, k=4) == pytest.approx((u + 0 + w) / 3)


def frame(lists: dict[str, list[str]], ranked: bool) -> pl.DataFrame:
    rows = [(user, item, rank) for user, items in lists.items() for rank, item in enumerate(items, 1)]
    whole = pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "rank": pl.Int64}, orient="row")
    return whole.sample(fraction=1, shuffle=True, seed=1) if ranked else whole.drop("rank")


def test_all_forms_say_the_same() -> None:
    expected = metrics.evaluate(LISTS, TRUTH, ks=(1, 3))
    assert expected["users"] == 3
    assert set(expected) == {f"{name}@{k}" for name in ("recall", "ndcg", "hr", "mrr", "precision") for k in (1, 3)} | {
        "users"
    }
    lists, truth = [LISTS.get(user, []) for user in TRUTH], list(TRUTH.values())
    forms: list[tuple[Any, Any]] = [
        (frame(LISTS, True), frame(TRUTH, False)),
        (frame(LISTS, False), TRUTH),
        (lists, truth),
        (lists, [set(items) for items in truth]),
        ({user: np.array(items) for user, items in LISTS.items()}, TRUTH),
    ]
    for form in forms:
        assert metrics.evaluate(*form, ks=[1, 3]) == expected
    by_user = metrics.per_user(LISTS, TRUTH, ks=3)
    assert by_user["user"].to_list() == ["u", "v", "w"]
    assert by_user["recall@3"].to_list() == pytest.approx([1 / 2, 0, 2 / 3])


def test_the_items_of_one_user_need_no_more_brackets() -> None:
    assert metrics.recall(["a", "b", "c"], ["c", "z"], k=3) == 0.5
    assert metrics.recall(np.array([4, 5, 6]), {6}, k=2) == 0.0


def test_a_user_without_a_list_has_found_nothing() -> None:
    assert metrics.hr({"u": ["a"]}, {"u": ["a"], "v": ["a"]}, k=1) == 0.5


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_values_are_those_of_ir_measures(k: int) -> None:
    rng = np.random.default_rng(k)
    lists = {f"u{u}": [f"i{i}" for i in rng.permutation(60)[: rng.integers(1, 30)]] for u in range(80)}
    truth = {f"u{u}": [f"i{i}" for i in rng.permutation(60)[: rng.integers(1, 9)]] for u in range(85)}
    qrels = [ir_measures.Qrel(user, item, 1) for user, items in truth.items() for item in items]
    run = [
        ir_measures.ScoredDoc(user, item, -float(rank))
        for user, items in lists.items()
        for rank, item in enumerate(items)
    ]
    theirs = {
        "recall": ir_measures.R @ k,
        "precision": ir_measures.P @ k,
        "ndcg": ir_measures.nDCG @ k,
        "mrr": ir_measures.RR @ k,
        "hr": ir_measures.Success @ k,
    }
    found = ir_measures.calc_aggregate(list(theirs.values()), qrels, run)
    ours = metrics.evaluate(lists, truth, k)
    for name, measure in theirs.items():
        assert ours[f"{name}@{k}"] == pytest.approx(found[measure], abs=1e-9), name
        assert getattr(metrics, name)(lists, truth, k) == ours[f"{name}@{k}"]


@pytest.mark.parametrize(
    ("lists", "truth", "message"),
    [
        ({"u": ["a", "a"]}, {"u": ["a"]}, "the list of user 'u' has an item twice"),
        ({"u": ["a"]}, {"u": []}, "nobody has an item to find"),
        ([["a"]], {"u": ["a"]}, "only one of lists and truth names its users"),
        ([["a"], ["b"]], [["a"]], "2 lists for 1 user; expected one list for each"),
        ({1: ["a"]}, {"1": ["a"]}, "no user of truth has a list, for example '1'; expected the same ids"),
        ({"u": ["1"]}, {"u": [1]}, "items are str in lists and int in truth; expected the same ids"),
        (pl.DataFrame({"u": [1], "item": [2]}), {1: [2]}, "needs the columns user and item; it has u, item, and no u"),
    ],
)
def test_what_cannot_be_compared_is_an_error(lists: Any, truth: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.recall(lists, truth, k=2)


@pytest.mark.parametrize("ks", [0, (), (5, -1)])
def test_a_cut_off_below_1_is_an_error(ks: Any) -> None:
    with pytest.raises(ConfigError, match="expected one or several whole numbers from 1 on"):
        metrics.evaluate(LISTS, TRUTH, ks)
