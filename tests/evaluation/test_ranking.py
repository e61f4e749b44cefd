from math import log2
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from perfedrec.core.errors import ConfigError
from perfedrec.core.types import block_rows
from perfedrec.evaluation import Held, RandomOrder, Totals, mask_seen, rank_block
from perfedrec.evaluation.ranking import cutoffs, cutoffs_of
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.popularity import Counts, Popularity
from perfedrec.runs.engine import CentralRecommender

N, M, KS = 60, 40, (3, 10, 20)


def world(seed: int = 0) -> tuple[torch.Tensor, list[set[int]], list[set[int]], Held]:
    """Scores without ties, and seen and held-out items of N users; some users have none held out, some more than k."""
    generator = np.random.default_rng(seed)
    scores = torch.from_numpy(generator.permutation(N * M).reshape(N, M).astype(np.float32))
    seen, wanted = [], []
    for user in range(N):
        order = generator.permutation(M).tolist()
        count = [0, 1, 2, 5, 15][user % 5]
        wanted.append(set(order[:count]))
        seen.append(set(order[count : count + 4]))
    counts = torch.tensor([len(each) for each in wanted])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return scores, seen, wanted, Held(offsets, torch.tensor([item for each in wanted for item in sorted(each)]))


def ranked(scores: torch.Tensor, seen: list[set[int]], users: list[int], k: int) -> torch.Tensor:
    pairs = torch.tensor([(row, item) for row, user in enumerate(users) for item in seen[user]])
    masked = mask_seen(scores[users].clone(), pairs[:, 0], pairs[:, 1])
    return rank_block(masked, k, torch.tensor(users), RandomOrder.of_numbers(N, M))[1]


def brute(scores: torch.Tensor, seen: list[set[int]], wanted: list[set[int]], k: int) -> dict[str, float]:
    """The metrics by their definitions, one user after the other."""
    sums = dict.fromkeys(("recall", "ndcg", "hr", "mrr", "precision"), 0.0)
    shown: set[int] = set()
    tested = 0
    for user in range(N):
        if not wanted[user]:
            continue
        tested += 1
        candidates = [item for item in range(M) if item not in seen[user]]
        best = sorted(candidates, key=lambda item: -float(scores[user, item]))[:k]
        shown |= set(best)
        found = [place for place, item in enumerate(best, start=1) if item in wanted[user]]
        ideal = sum(1 / log2(1 + place) for place in range(1, min(k, len(wanted[user])) + 1))
        sums["recall"] += len(found) / len(wanted[user])
        sums["precision"] += len(found) / k
        sums["hr"] += bool(found)
        sums["mrr"] += 1 / found[0] if found else 0
        sums["ndcg"] += sum(1 / log2(1 + place) for place in found) / ideal
    means = {f"{name}@{k}": value / tested for name, value in sums.items()}
    return means | {f"coverage@{k}": len(shown) / M, "users": float(tested)}


def totals(users: list[int]) -> Totals:
    scores, seen, _, held = world()
    lists = ranked(scores, seen, users, max(KS))
    result, which = Totals(KS, M), torch.tensor(users)
    result.add(held.hits(which, lists, M), held.counts(which), lists, which)
    return result


def test_all_metrics_equal_their_definitions() -> None:
    scores, seen, wanted, _ = world()
    expected: dict[str, float] = {}
    for k in KS:
        expected |= brute(scores, seen, wanted, k)
    assert totals(list(range(N))).means() == pytest.approx(expected, abs=1e-12)
    assert expected["users"] == 48


def test_metrics_of_a_small_case_computed_by_hand() -> None:
    held = Held(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 4, 0]))
    users, lists = torch.tensor([2, 0, 1]), torch.tensor([[3, 2], [0, 4], [1, 2]])
    hits = held.hits(users, lists, 5)
    assert hits.tolist() == [[False, False], [False, True], [False, False]]
    result = Totals((1, 2), 5)
    result.add(hits, held.counts(users), lists, users)
    ndcg = (1 / log2(3)) / (1 + 1 / log2(3))
    expected = {
        "recall@2": 0.25,
        "precision@2": 0.25,
        "hr@2": 0.5,
        "mrr@2": 0.25,
        "ndcg@2": ndcg / 2,
        "coverage@2": 0.8,
    }
    expected |= {"recall@1": 0, "precision@1": 0, "hr@1": 0, "mrr@1": 0, "ndcg@1": 0, "coverage@1": 0.4, "users": 2}
    assert result.means() == pytest.approx(expected)


def test_ndcg_equals_that_of_scikit_learn() -> None:
    """Both have the same ideal ranking where the list is at least as long as the held-out set, or cut off."""
    scores, seen, wanted, _ = world()
    for k in KS:
        values = []
        for user in range(N):
            if wanted[user]:
                candidates = [item for item in range(M) if item not in seen[user]]
                truth = [[float(item in wanted[user]) for item in candidates]]
                values.append(ndcg_score(truth, scores[user, candidates].numpy()[None], k=k))
        assert totals(list(range(N))).means()[f"ndcg@{k}"] == pytest.approx(float(np.mean(values)), abs=1e-9)


@pytest.mark.parametrize("size", [1, 7, 59])
def test_adding_blocks_gives_the_metrics_of_all_users(size: int) -> None:
    blocks = [totals(list(range(start, min(start + size, N)))) for start in range(0, N, size)]
    total = Totals(KS, M)
    for block in reversed(blocks):
        total = total + block
    assert total.means() == pytest.approx(totals(list(range(N))).means(), abs=1e-12)
    piecewise = Totals(KS, M)
    scores, seen, _, held = world()
    for start in range(0, N, size):
        users = list(range(start, min(start + size, N)))
        lists = ranked(scores, seen, users, max(KS))
        piecewise.add(
            held.hits(torch.tensor(users), lists, M), held.counts(torch.tensor(users)), lists, torch.tensor(users)
        )
    assert piecewise.means() == pytest.approx(total.means(), abs=1e-12)


def test_without_held_out_items_there_are_no_metrics() -> None:
    held = Held(torch.zeros(4, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    lists = torch.tensor([[0, 1], [1, 2], [2, 0]])
    result = Totals((2,), 3)
    result.add(held.hits(torch.arange(3), lists, 3), held.counts(torch.arange(3)), lists, torch.arange(3))
    assert result.means() == {"users": 0.0}


def test_a_list_that_is_longer_than_the_catalogue() -> None:
    held = Held(torch.tensor([0, 1]), torch.tensor([2]))
    users = torch.tensor([0])
    _, lists = rank_block(torch.tensor([[1.0, 3.0, 2.0]]), 10, users, RandomOrder.of_numbers(1, 3))
    assert lists.tolist() == [[1, 2, 0]]
    result = Totals((2, 10), 3)
    result.add(held.hits(users, lists, 3), held.counts(users), lists, users)
    assert result.means() == pytest.approx(
        {"recall@2": 1, "precision@2": 0.5, "hr@2": 1, "mrr@2": 0.5, "ndcg@2": 1 / log2(3), "coverage@2": 2 / 3}
        | {"recall@10": 1, "precision@10": 0.1, "hr@10": 1, "mrr@10": 0.5, "ndcg@10": 1 / log2(3), "coverage@10": 1}
        | {"users": 1}
    )


def test_seen_items_are_not_recommended_while_there_are_others() -> None:
    scores, seen, _, _ = world()
    for row, own in zip(ranked(scores, seen, list(range(N)), M - 4).tolist(), seen, strict=True):
        assert set(row) == set(range(M)) - own


def test_a_short_list_is_not_filled_with_seen_items_and_they_are_not_covered() -> None:
    counts = Counts(torch.tensor([3.0, 2.0, 1.0, 1.0]))
    rows, _ = block_rows(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0]))
    recommender = CentralRecommender(Popularity(), counts, Training(rows, 4))
    found = recommender.evaluate(Held(torch.tensor([0, 1]), torch.tensor([3])), (2, 4))
    assert found["coverage@4"] == 2 / 4
    assert found["recall@4"] == found["recall@2"] == 1


def test_rows_and_hits_of_users_in_any_order() -> None:
    _, _, wanted, held = world()
    users = torch.tensor([14, 3, 8, 10])
    segments, items = held.rows(users)
    assert [set(items[segments == row].tolist()) for row in range(4)] == [wanted[user] for user in users.tolist()]
    lists = torch.arange(M).expand(4, M)
    assert held.hits(users, lists, M).tolist() == [
        [item in wanted[user] for item in range(M)] for user in users.tolist()
    ]


def test_lengths_of_lists_are_one_number_or_several() -> None:
    assert cutoffs(5) == (5,)
    assert cutoffs([20, 5, 5]) == (5, 20)
    assert cutoffs_of(["ndcg@20", "recall@5", "users", "hr@5"]) == (5, 20)
    wrong: list[Any] = [0, [], [5, -1], [2.5], True]
    for ks in wrong:
        with pytest.raises(ConfigError, match="expected one or several whole numbers from 1 on"):
            cutoffs(ks)


def test_nobody_is_scored_where_nothing_is_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after every round of a run without validation data."""
    rows, _ = block_rows(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.arange(2))
    recommender = CentralRecommender(Popularity(), Counts(torch.ones(4)), Training(rows, 4))
    monkeypatch.setattr(CentralRecommender, "raw_scores", None)
    nothing = Held(torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert recommender.evaluate(nothing) == {"users": 0.0}
