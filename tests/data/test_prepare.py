import networkx as nx
import numpy as np
import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import prepare


def test_threshold_then_repetitions_earliest_kept() -> None:
    frame = pl.DataFrame(
        {
            "user": [2, 1, 1, 1, 1],
            "item": [5, 6, 6, 7, 5],
            "rating": [4.0, 2.0, 5.0, 4.0, 4.0],
            "timestamp": [9, 1, 8, 3, 3],
        }
    )
    done, report = prepare(frame, min_rating=4)
    assert done.columns == ["user", "timestamp", "item"]
    assert done.select("user", "item", "timestamp").rows() == [(1, 5, 3), (1, 7, 3), (1, 6, 8), (2, 5, 9)]
    assert report.duplicates == 0
    assert [step.interactions for step in report.steps] == [5, 4, 4]

    done, report = prepare(frame)
    assert done.filter(item=6)["timestamp"].to_list() == [1]
    assert report.duplicates == 1
    assert report.lines() == [
        "as read: 2 users, 3 items, 5 interactions",
        "each pair of user and item once: 2 users, 3 items, 4 interactions",
    ]


def test_k_core_is_iterated() -> None:
    # A 2 x 2 block, and a chain attached to it that is removed link by link from its end.
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)]
    frame = pl.DataFrame(pairs, schema=["user", "item"], orient="row")
    done, report = prepare(frame, k_core=2)
    assert done.rows() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert report.lines()[-1] == "2-core: 2 users, 2 items, 4 interactions"


@pytest.mark.parametrize("k", [2, 3, 4])
def test_k_core_against_a_graph_library(k: int) -> None:
    rng = np.random.default_rng(k)
    pairs = {(int(u), int(i)) for u, i in rng.integers(0, 40, size=(130, 2))}
    frame = pl.DataFrame(sorted(pairs), schema=["user", "item"], orient="row")
    core = nx.k_core(nx.Graph([(f"u{u}", f"i{i}") for u, i in pairs]), k)
    expected = {(u, i) for u, i in pairs if core.has_edge(f"u{u}", f"i{i}")}
    if expected:
        assert set(prepare(frame, k_core=k)[0].rows()) == expected
    else:
        with pytest.raises(DataError, match="no interaction is left"):
            prepare(frame, k_core=k)


def test_impossible_preparations_are_refused() -> None:
    frame = pl.DataFrame({"user": [1], "item": [2]})
    with pytest.raises(DataError, match="no ratings to compare with min_rating"):
        prepare(frame, min_rating=3)
    with pytest.raises(
        DataError,
        match=r"no interaction is left after preparation \(as read: 1 user, .* 2-core: 0.*\); expected a lower k_core$",
    ):
        prepare(frame, k_core=2)
    with pytest.raises(DataError, match="k_core must be at least 0"):
        prepare(frame, k_core=-1)


def test_a_table_without_rows_is_said_to_be_one() -> None:
    with pytest.raises(DataError, match="no interaction was read: there are no rows; expected a file with a row for"):
        prepare(pl.DataFrame({"user": [], "item": []}, schema={"user": pl.Int64, "item": pl.Int64}))
