"""Equal scores: their order depends on ids alone, not on numbers, lengths or blocks, and gives chance its due."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perfedrec.evaluation import Held, RandomOrder, Recommender, rank_block
from perfedrec.evaluation.lists import explained

N, M = 300, 120


class Fixed(Recommender):
    """A recommender with given scores [n, m]."""

    def __init__(self, table: torch.Tensor, offsets: torch.Tensor, items: torch.Tensor, order: RandomOrder) -> None:
        super().__init__(offsets, items, table.shape[1], order)
        self.table = table

    def raw_scores(self, users: torch.Tensor) -> torch.Tensor:
        return self.table[users]

    def for_new_users(self, offsets: torch.Tensor, items: torch.Tensor, order: RandomOrder | None = None) -> "Fixed":
        return self

    def explain(self, users: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"global": self.table[users]}

    def records(self) -> dict[str, object]:
        return {}

    def with_records(self, records: object) -> "Fixed":
        return self


def csr(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0, *np.cumsum([len(each) for each in lists])])
    return offsets, torch.tensor([item for each in lists for item in sorted(each)], dtype=torch.int64)


class World:
    """N users with five seen and two held-out items, which are among the ten popular items for most users. External ids
    are words; ``users`` [N] and ``items`` [M] say by which number each is known here."""

    def __init__(self, users: np.ndarray, items: np.ndarray, scores: np.ndarray) -> None:
        draw, seen, held = np.random.default_rng(0), {}, {}
        weights = np.where(np.arange(M) < 10, 5.0, 0.2)
        for user in range(N):
            own = draw.choice(M, 7, replace=False, p=weights / weights.sum())
            seen[users[user]], held[users[user]] = items[own[:5]].tolist(), items[own[5:]].tolist()
        user_ids, item_ids = np.empty(N, dtype=object), np.empty(M, dtype=object)
        user_ids[users], item_ids[items] = [f"u{i}" for i in range(N)], [f"i{i}" for i in range(M)]
        table = np.empty_like(scores)
        table[np.ix_(users, items)] = scores
        order = RandomOrder(user_ids, item_ids)
        self.recommender = Fixed(torch.tensor(table), *csr([seen[i] for i in range(N)]), order)
        self.held, self.user_ids, self.item_ids = Held(*csr([held[i] for i in range(N)])), user_ids, item_ids

    def lists(self, k: int) -> dict[str, list[str]]:
        items, _ = self.recommender.recommend(torch.arange(N), k)
        return {user: self.item_ids[own].tolist() for user, own in zip(self.user_ids, items.numpy(), strict=True)}


SAME = (np.arange(N), np.arange(M))
REVERSED = (np.arange(N)[::-1].copy(), np.arange(M)[::-1].copy())
MIXED = (np.random.default_rng(1).permutation(N), np.random.default_rng(2).permutation(M))
SCORES = {
    "one score": np.zeros((N, M), np.float32),
    "many zeros": np.random.default_rng(3).integers(-12, 3, (N, M)).clip(0).astype(np.float32),
    "counts": np.tile((60 / np.arange(1, M + 1)).round().astype(np.float32), (N, 1)),
    "all differ": np.random.default_rng(4).permutation(N * M).reshape(N, M).astype(np.float32),
}


@pytest.mark.parametrize("numbering", [REVERSED, MIXED], ids=["reversed", "mixed"])
@pytest.mark.parametrize("kind", SCORES)
def test_numbering_changes_no_list_and_no_figure(kind: str, numbering: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = World(*SAME, SCORES[kind]), World(*numbering, SCORES[kind])
    assert first.lists(20) == second.lists(20)
    assert first.recommender.evaluate(first.held) == pytest.approx(second.recommender.evaluate(second.held), abs=1e-12)
    sampled = [each.recommender.rank_sampled(each.held, n_negatives=30).means() for each in (first, second)]
    assert sampled[0] == pytest.approx(sampled[1], abs=1e-12)


@pytest.mark.parametrize("numbering", [SAME, REVERSED, MIXED], ids=["popular first", "popular last", "mixed"])
def test_a_model_that_learnt_nothing_is_at_chance_level(numbering: tuple[np.ndarray, np.ndarray]) -> None:
    """115 items are unseen: 20 places find a held-out one with probability 20 / 115. 600 cases, four standard
    errors."""
    world = World(*numbering, SCORES["one score"])
    chance = 20 / 115
    found = world.recommender.evaluate(world.held)
    assert found["recall@20"] == pytest.approx(chance, abs=4 * (chance * (1 - chance) / (2 * N)) ** 0.5)
    assert found["coverage@20"] == 1.0  # each user has an order of its own
    sampled = world.recommender.rank_sampled(world.held, n_negatives=99).means()
    assert sampled["hr@10"] == pytest.approx(0.1, abs=4 * (0.09 / (2 * N)) ** 0.5)


@pytest.mark.parametrize("kind", SCORES)
def test_a_shorter_list_is_the_beginning_of_a_longer_one_and_blocks_change_nothing(kind: str) -> None:
    world = World(*SAME, SCORES[kind])
    users = torch.arange(N)
    whole, scores = world.recommender.recommend(users, M - 5)
    assert torch.equal(scores, scores.sort(1, descending=True).values)
    for k in (1, 2, 10, 20, 64, M - 6):
        items, values = world.recommender.recommend(users, k, block_size=7)
        assert torch.equal(items, whole[:, :k])
        assert torch.equal(values, scores[:, :k])


def test_a_list_does_not_depend_on_what_is_hidden_or_on_other_users() -> None:
    world = World(*SAME, SCORES["many zeros"])
    full = world.recommender.recommend(torch.arange(N), M)[0]
    hidden = full[:, ::3].sort(1).values
    hide = Held(torch.arange(N + 1) * hidden.shape[1], hidden.flatten())
    for user in (0, 17, 299):
        users = torch.tensor([user])
        scores = world.recommender.scores(users, hide=hide)
        values, items = rank_block(scores, 20, users, world.recommender.order)
        left = [item for item in full[user, : M - 5].tolist() if item not in hidden[user].tolist()]
        assert items[0].tolist() == left[:20]
        assert torch.equal(values[0], scores[0, items[0]])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_lists_equal_a_sort_by_score_and_word(n: int, m: int, k: int, seed: int, removed: bool) -> None:
    draw, order, users = np.random.default_rng(seed), RandomOrder.of_numbers(n, m), torch.arange(n)
    scores = torch.tensor(draw.integers(-2, 2, (n, m)), dtype=torch.float32)
    if removed:
        scores.masked_fill_(torch.tensor(draw.random((n, m)) < 0.4), -torch.inf)
    before, words = scores.clone(), order.words(users)
    values, items = rank_block(scores, k, users, order)
    assert torch.equal(scores, before)
    assert items.shape == (n, min(k, m))
    for user in range(n):
        wanted = sorted(range(m), key=lambda item: (float(scores[user, item]), int(words[user, item])), reverse=True)
        wanted = [item for item in wanted if scores[user, item] > -torch.inf][:k]
        assert items[user, : len(wanted)].tolist() == wanted
        assert (values[user, len(wanted) :] == -torch.inf).all()
        assert sorted(set(items[user].tolist())) == sorted(items[user].tolist())


def test_words_are_those_of_the_ids_and_differ_by_user() -> None:
    numbers, texts = RandomOrder(np.array([7, 3]), np.array([1, 20])), np.array(["3", "7"], dtype=object)
    other = RandomOrder(texts, np.array(["20", "x", "1"], dtype=object))
    first, second = numbers.words(torch.tensor([0])), other.words(torch.tensor([1]))
    assert first[0].tolist() == [second[0, 2], second[0, 0]]
    assert not torch.equal(first, numbers.words(torch.tensor([1])))
    some = torch.tensor([[1], [0]])
    assert torch.equal(numbers.words(torch.arange(2), some), numbers.words(torch.arange(2)).gather(1, some))


def test_every_place_is_equally_likely() -> None:
    """Over 2,000 users, each of ten items is first for about 200: four standard errors are 54."""
    order, users = RandomOrder.of_numbers(2000, 10), torch.arange(2000)
    _, items = rank_block(torch.zeros(2000, 10), 10, users, order)
    for place in (0, 4, 9):
        assert torch.bincount(items[:, place], minlength=10).sub(200).abs().max() < 54


def test_an_explained_list_is_the_recommended_one_and_equal_parts_move_nothing() -> None:
    for kind, scores in SCORES.items():
        world = World(*MIXED, scores)
        lists = world.lists(30)
        for user in (0, 5):
            own = world.recommender.scores(torch.tensor([user]))[0]
            parts = {"global": world.recommender.table[user]}
            frame = explained(own, parts, world.user_ids[user], world.item_ids, 30)
            assert frame["item"].to_list() == lists[world.user_ids[user]], kind
            assert frame["moved"].to_list() == [0] * 30


def test_items_that_cannot_be_recommended_are_not_found() -> None:
    """A held-out item whose score is minus infinity is in no list, also where the list has places left."""
    recommender = Fixed(
        torch.tensor([[1.0, -torch.inf, -torch.inf]]),
        torch.tensor([0, 0]),
        torch.zeros(0, dtype=torch.int64),
        RandomOrder.of_numbers(1, 3),
    )
    found = recommender.evaluate(Held(torch.tensor([0, 1]), torch.tensor([2])), (3,))
    assert found["recall@3"] == 0
    assert found["coverage@3"] == pytest.approx(1 / 3)
