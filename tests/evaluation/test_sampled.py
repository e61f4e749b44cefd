"""The protocol of sampled negatives: which items are drawn, and that a model without knowledge gains nothing."""

import pytest
import torch

from perfedrec.core.keys import Key
from perfedrec.evaluation import Held, RandomOrder, Totals
from perfedrec.evaluation.sampled import rank_among
from perfedrec.runs.summary import sampled

N, M, FEW = 400, 300, 80
USERS, ORDER = torch.arange(N), RandomOrder.of_numbers(N, M)


def held(generator: torch.Generator, per_user: int = 2) -> tuple[Held, torch.Tensor]:
    """Random held-out items, and a mask [N, M] of seen items; no item is both."""
    order = torch.rand(N, M, generator=generator).argsort(1)
    items, seen = order[:, :per_user].sort(1).values, torch.zeros(N, M, dtype=torch.bool)
    seen.scatter_(1, order[:, per_user : per_user + 20], True)
    return Held(torch.arange(N + 1) * per_user, items.flatten()), seen


def hits(scores: torch.Tensor, wanted: Held, negatives: int = 99, seed: int = 0) -> dict[str, float]:
    totals = Totals((10, 20), M)
    rank_among(scores, USERS, wanted, negatives, Key(seed), ORDER, totals)
    return totals.means()


@pytest.mark.parametrize("kind", ["one score for all", "by position", "by number of users", "at random"])
def test_a_model_that_learns_nothing_gets_a_random_rank(kind: str) -> None:
    """There is one right answer among 100, so HR@10 of such a model is 0.1. 800 cases: the standard error is 0.0106."""
    generator = torch.Generator().manual_seed(1)
    wanted, seen = held(generator)
    scores = {
        "one score for all": torch.zeros(N, M),
        "by position": torch.arange(M, 0, -1.0).repeat(N, 1),
        "by number of users": seen.sum(0).to(torch.float32).repeat(N, 1),
        "at random": torch.rand(N, M, generator=generator),
    }[kind]
    value = hits(scores.masked_fill(seen, -torch.inf), wanted)["hr@10"]
    assert value == pytest.approx(0.1, abs=0.032)


def drawn(wanted: Held, seen: torch.Tensor, negatives: int, seed: int) -> torch.Tensor:
    """[FEW, M] which items were drawn as negatives for a user's held-out item.

    An item was drawn if the held-out item loses the first rank when this item alone has a higher score.
    """
    users, few = USERS[:FEW], Held(wanted.offsets[: FEW + 1], wanted.items[:FEW])
    found = torch.zeros(FEW, M, dtype=torch.bool)
    for item in range(M):
        scores = torch.zeros(FEW, M).masked_fill(seen[:FEW], -torch.inf)
        scores[users, few.items] = 1.0
        scores[:, item] = torch.where(scores[:, item] > -torch.inf, 2.0, scores[:, item])
        totals = Totals((1,), M)
        rank_among(scores, users, few, negatives, Key(seed), ORDER, totals)
        tested, values = totals.by_user()
        found[tested, item] = values["hr@1"] == 0
    return found


def others(wanted: Held, seen: torch.Tensor) -> torch.Tensor:
    """[FEW, M] the items that are neither seen nor held out."""
    allowed = ~seen[:FEW]
    allowed[USERS[:FEW], wanted.items[:FEW]] = False
    return allowed


def test_negatives_are_uniform_over_items_that_are_neither_seen_nor_held_out() -> None:
    """The draw does not depend on the held-out item: items next to it in number or popularity are drawn like others."""
    wanted, seen = held(torch.Generator().manual_seed(2), per_user=1)
    allowed, counts = others(wanted, seen), drawn(wanted, seen, 99, 0)
    assert torch.equal(counts & allowed, counts)
    assert counts.sum(1).tolist() == [99] * FEW
    near = (torch.arange(M) - wanted.items[:FEW, None]).abs() <= 10
    for group in (near, seen.sum(0).expand(FEW, M) > 27, torch.arange(M).expand(FEW, M) < 50):
        among = (group & allowed).sum()
        share = float((counts & group).sum() / among)
        assert share == pytest.approx(99 / 279, abs=4 * (0.355 * 0.645 / float(among)) ** 0.5)


def test_all_other_items_are_drawn_where_there_are_too_few() -> None:
    wanted, seen = held(torch.Generator().manual_seed(3), per_user=1)
    assert torch.equal(drawn(wanted, seen, 1000, 0), others(wanted, seen))


def test_another_seed_draws_other_negatives() -> None:
    wanted, seen = held(torch.Generator().manual_seed(4), per_user=1)
    scores = torch.rand(N, M, generator=torch.Generator().manual_seed(5)).masked_fill(seen, -torch.inf)
    assert hits(scores, wanted, seed=0) == hits(scores, wanted, seed=0) != hits(scores, wanted, seed=1)


def test_the_number_of_negatives_is_counted_and_not_assumed() -> None:
    """User 0 has 2 unseen items besides the held-out one, user 1 has 5; at most 3 are asked for."""
    wanted = Held(torch.tensor([0, 1, 2]), torch.tensor([0, 0]))
    scores = torch.zeros(2, 6)
    scores[0, 3:] = -torch.inf
    whole, order = Totals((1,), 6), RandomOrder.of_numbers(2, 6)
    rank_among(scores, torch.arange(2), wanted, 3, Key(0), order, whole)
    assert whole.negatives == (2, 3)
    parts = []
    for user in (0, 1):
        parts.append(Totals((1,), 6))
        rank_among(scores[user : user + 1], torch.tensor([user]), wanted, 1000, Key(0), order, parts[-1])
    assert [each.negatives for each in parts] == [(2, 2), (5, 5)]
    assert (parts[0] + parts[1]).negatives == (2, 5)
    assert (sampled((2, 5)), sampled((99, 99))) == ("2 to 5 sampled negatives", "99 sampled negatives")
