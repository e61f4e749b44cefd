"""The best items by scores that are computed tile by tile are those by all scores at once."""

import pytest
import torch

from perfedrec.core.scoring import Lists, Product, Scoring
from perfedrec.evaluation import RandomOrder, best, mask_seen, rank_block
from perfedrec.evaluation.best import rank_scoring

B, M = 70, 1500


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles of few users and items, of which the last ones are smaller."""
    monkeypatch.setattr(best, "MANY_ITEMS", 100)
    monkeypatch.setattr(best, "USERS", 32)
    monkeypatch.setattr(best, "ITEMS", 400)
    monkeypatch.setattr(best, "AT_ONCE", 8)


def drawn(seed: int, whole: bool, n_settings: int, n_parts: int, groups: bool, listed: bool) -> Scoring:
    """A model. ``whole`` numbers are added up without rounding, and many scores are equal."""
    source = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=source).float() if whole else torch.randn(shape, generator=source)

    tables = numbers(n_parts, 3, M, 6)

    def product(part: int) -> Product:
        return Product(numbers(B, 6), lambda group, which: tables[part, group][which])

    lists = None
    if listed:
        items = torch.stack([torch.randperm(M, generator=source)[:30] for _ in range(B)])
        items = items.masked_fill(torch.rand(B, 30, generator=source) < 0.3, -1)
        lists = Lists(items, numbers(B, 30, n_settings))
    return Scoring(
        B,
        M,
        tuple(product(part) for part in range(n_parts)),
        None if n_settings == n_parts == 1 else numbers(B, n_settings, n_parts).abs(),
        lists,
        torch.randint(0, 3, (B,), generator=source) if groups else None,
    )


def hidden(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed + 100)
    return tuple(torch.randint(0, n, (900,), generator=source) for n in (B, M))  # type: ignore[return-value]


@pytest.mark.parametrize("k", [1, 20, 300, 2000])
@pytest.mark.parametrize(
    ("n_settings", "n_parts", "groups", "listed"),
    [(1, 1, False, False), (1, 1, True, True), (3, 1, False, True), (3, 2, True, True), (2, 3, True, False)],
)
def test_tiles_give_the_lists_of_all_scores(n_settings: int, n_parts: int, groups: bool, listed: bool, k: int) -> None:
    """With equal scores at the end of lists and inside them."""
    scoring, pairs = drawn(k, True, n_settings, n_parts, groups, listed), hidden(k)
    users, order = torch.arange(B).flip(0), RandomOrder.of_numbers(B, M)
    found = rank_scoring(scoring, k, users, order, *pairs)
    assert len(found) == n_settings
    for (values, items), scores in zip(found, scoring.each(), strict=True):
        expected, lists = rank_block(mask_seen(scores, *pairs), k, users, order)
        assert torch.equal(values, expected)
        there = expected > -torch.inf
        assert torch.equal(items[there], lists[there])


def test_tiles_give_scores_to_within_rounding() -> None:
    scoring, pairs = drawn(0, False, 3, 2, True, True), hidden(0)
    users, order = torch.arange(B), RandomOrder.of_numbers(B, M)
    for (values, _), scores in zip(rank_scoring(scoring, 50, users, order, *pairs), scoring.each(), strict=True):
        assert torch.allclose(values, rank_block(mask_seen(scores, *pairs), 50, users, order)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["equal", "whole", "few"])
def test_known_scores_are_ranked_as_they_are(kind: str) -> None:
    source = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 40, (B, M), generator=source).float()
    if kind == "equal":
        scores.zero_()
    if kind == "few":
        scores.masked_fill_(torch.rand(B, M, generator=source) < 0.999, -torch.inf)
    users, order, pairs = torch.arange(B), RandomOrder.of_numbers(B, M), hidden(1)
    ((values, items),) = rank_scoring(Scoring.of(scores.clone()), 20, users, order, *pairs)
    expected, lists = rank_block(mask_seen(scores, *pairs), 20, users, order)
    assert torch.equal(values, expected)
    assert torch.equal(items[expected > -torch.inf], lists[expected > -torch.inf])


def test_a_user_has_the_same_list_alone_and_among_others() -> None:
    scoring, order = drawn(2, True, 1, 1, True, True), RandomOrder.of_numbers(B, M)
    nothing = torch.zeros(0, dtype=torch.int64)
    ((values, items),) = rank_scoring(scoring, 20, torch.arange(B), order, nothing, nothing)
    for user in (0, 41, 69):
        one = torch.tensor([user])
        assert scoring.lists is not None
        assert scoring.groups is not None
        alone = Scoring(
            1,
            M,
            tuple(Product(part.users[one], part.table) for part in scoring.parts),
            None,
            Lists(scoring.lists.items[one], scoring.lists.values[one]),
            scoring.groups[one],
        )
        ((own, found),) = rank_scoring(alone, 20, one, order, nothing, nothing)
        assert torch.equal(own[0], values[user])
        assert torch.equal(found[0], items[user])


def test_which_way_is_taken_depends_on_the_number_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few items are ranked by all scores at once, for one user as for many."""
    called = []
    monkeypatch.setattr(best, "MANY_ITEMS", M + 1)
    monkeypatch.setattr(best, "rank_block", lambda *given: called.append(given[0].shape) or rank_block(*given))
    nothing = torch.zeros(0, dtype=torch.int64)
    rank_scoring(
        drawn(3, False, 2, 1, False, False), 5, torch.arange(B), RandomOrder.of_numbers(B, M), nothing, nothing
    )
    assert called == [(B, M), (B, M)]
