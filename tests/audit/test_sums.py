"""Attacks on sums over clients: toys computed by hand, planted truths, and controls in which nothing is to be found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perfedrec.audit import sums
from perfedrec.audit.attacks import Finding

WIDTH = 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64)


def plain(groups: list[Tensor]) -> list[list[int]]:
    return [each.tolist() for each in groups]


class World:
    """Clients with lists of ``own`` items out of ``m``, some items more popular than others."""

    def __init__(self, clients: int, m: int, own: int, seed: int = 0) -> None:
        chance = torch.linspace(1.0, 0.02, m).expand(clients, m)
        self.m, self.clients = m, clients
        self.lists = list(torch.multinomial(chance, own, generator=generator(seed)))
        self.items = torch.cat(self.lists)
        self.offsets = torch.arange(clients + 1) * own
        self.degrees = torch.bincount(self.items, minlength=m).to(torch.float64)
        self.vectors = normal(clients, WIDTH, seed=seed + 1)

    def neighbour_sum(self, cohort: Tensor) -> Tensor:
        """[m, d] rows like those of neighbour sums: a user's vector divided by the root of the item's degree."""
        table = torch.zeros(self.m, WIDTH, dtype=torch.float64)
        for user in cohort.tolist():
            mine = self.lists[user]
            table[mine] += self.vectors[user] / self.degrees[mine].sqrt()[:, None]
        return table.float()

    def training_sum(self, cohort: Tensor, rank: int, minor: float = 1.0) -> Tensor:
        """[m, d] each user's rows lie in ``rank`` directions, the first of which dominates if ``minor`` is small."""
        table = torch.zeros(self.m, WIDTH, dtype=torch.float64)
        for user in cohort.tolist():
            mine = self.lists[user]
            parts = normal(mine.numel(), rank, seed=1000 + user) * minor
            parts[:, 0] += 1.0
            table[mine] += parts @ normal(rank, WIDTH, seed=5000 + user)
        return table.float()

    def alone(self, cohort: Tensor, fewest: int) -> list[list[int]]:
        """The items that one user of the cohort alone has, for users with enough of these."""
        counts = torch.bincount(torch.cat([self.lists[user] for user in cohort.tolist()]), minlength=self.m)
        sole = [self.lists[user][counts[self.lists[user]] == 1].sort().values for user in cohort.tolist()]
        return sorted(each.tolist() for each in sole if each.numel() >= fewest)


EVERY = torch.arange(400)


@pytest.fixture(scope="module")
def world() -> World:
    return World(clients=60, m=400, own=12)


# --- collinear rows ---


def test_collinear_rows_of_three_clients_by_hand() -> None:
    """A has items 1 to 4, B 4 to 7, C 7 to 9; nobody has 0. Vectors are unit vectors, degrees 1, 4 or 9."""
    table = torch.tensor(
        [
            [0.0, 0.0, 0.0],
            [1.0, 0.0, 0.0],  # A alone
            [0.5, 0.0, 0.0],
            [-1 / 3, 0.0, 0.0],
            [0.5, 0.5, 0.0],  # A and B
            [0.0, 1.0, 0.0],  # B alone
            [0.0, 0.5, 0.0],
            [0.0, 1 / 3, 1 / 3],  # B and C
            [0.0, 0.0, 1.0],  # C alone
            [0.0, 0.0, 2.0],
        ]
    )
    items = torch.arange(10)
    assert plain(sums.collinear(table, items)) == [[1, 2, 3]]
    assert plain(sums.collinear(table, items, fewest=2)) == [[1, 2, 3], [5, 6], [8, 9]]
    assert plain(sums.collinear(table, items + 70, fewest=2))[0] == [71, 72, 73]


def test_items_that_the_same_two_clients_share_are_a_group_too() -> None:
    a, b = normal(2, WIDTH)
    table = torch.stack([a, b, (a + b) / 2, a + b, (a + b) / 3, a + 2 * b])
    assert plain(sums.collinear(table, torch.arange(6))) == [[2, 3, 4]]


def test_rows_are_linked_through_others() -> None:
    angles = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64) * 1e-3
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert plain(sums.collinear(table, torch.arange(4), tolerance=0.6e-6)) == [[0, 1, 2]]
    assert sums.collinear(table, torch.arange(4), tolerance=0.4e-6) == []
    assert plain(sums.collinear(table[[0, 2]], torch.arange(2), tolerance=0.6e-6, fewest=1)) == [[0], [1]]


def test_no_rows_and_one_column_have_no_groups() -> None:
    assert sums.collinear(torch.zeros(5, 4), torch.arange(5)) == []
    assert sums.collinear(torch.ones(5, 1), torch.arange(5)) == []
    assert sums.collinear(torch.zeros(0, 4), torch.arange(0)) == []


def test_links_reach_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(clients=60, m=400, own=12, seed=3)
    table = world.neighbour_sum(torch.arange(25))
    whole = plain(sums.collinear(table, EVERY)), plain(sums.same_subspace(table, EVERY, 2))
    assert min(len(each) for each in whole) > 5
    monkeypatch.setattr(sums, "CHUNK", 7)
    assert (plain(sums.collinear(table, EVERY)), plain(sums.same_subspace(table, EVERY, 2))) == whole


def test_sole_rows_of_neighbour_sums_are_found_and_nothing_else(world: World) -> None:
    cohort = torch.arange(0, 60, 3)
    table = world.neighbour_sum(cohort)
    groups, truth = plain(sums.collinear(table, EVERY)), world.alone(cohort, 3)
    assert len(truth) >= 10
    assert [each for each in truth if each not in groups] == []
    found = sums.owners([torch.tensor(each) for each in groups], world.offsets, world.items, cohort)
    assert float(found.precision.min()) == 1.0
    mixed = sums.shuffled(table, generator())
    assert sums.collinear(mixed, EVERY) == []
    assert sums.same_subspace(mixed, EVERY, 3) == []


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, -1.0, 7.0]))
def test_order_and_length_of_rows_do_not_matter(seed: int, scale: float) -> None:
    world = World(clients=8, m=60, own=10, seed=seed)
    table = world.neighbour_sum(torch.arange(8))[:60]
    order = torch.randperm(60, generator=generator(seed))
    lengths = scale * (0.5 + torch.rand(60, 1, generator=generator(seed)))
    items = torch.arange(60) + 5
    for attack in (sums.collinear, lambda rows, items: sums.same_subspace(rows, items, 2)):
        assert plain(attack((table * lengths)[order], items[order])) == plain(attack(table, items))


def test_rows_of_many_contributors_show_nothing() -> None:
    """All 40 clients have most of the 50 items, so that each row has at least 5 contributors."""
    chance = torch.rand(40, 50, generator=generator(4)) < 0.6
    weights = chance * (0.5 + torch.rand(40, 50, generator=generator(5), dtype=torch.float64))
    assert int(chance.sum(0).min()) >= 5
    table, items = (weights.T @ normal(40, WIDTH)).float(), torch.arange(50)
    assert sums.collinear(table, items) == []
    assert sums.same_subspace(table, items, 3) == []
    assert sums.same_subspace(table, items, 3, fewest=1) == []


# --- rows of one subspace ---


@pytest.mark.parametrize(("minor", "tolerance"), [(1.0, 1e-4), (0.1, 1e-4), (0.01, 1e-5), (0.001, 1e-6)])
def test_owners_of_training_rows_are_found_by_their_subspace(world: World, minor: float, tolerance: float) -> None:
    """Also if the rows of a client nearly point the same way."""
    cohort = torch.arange(0, 60, 4)
    table = world.training_sum(cohort, 3, minor)
    truth = world.alone(cohort, 5)
    assert len(truth) >= 5
    assert plain(sums.same_subspace(table, EVERY, 3, tolerance)) == truth
    assert sums.collinear(table, EVERY, tolerance=1e-8) == []
    assert sums.same_subspace(sums.shuffled(table, generator()), EVERY, 3, tolerance) == []


def test_a_subspace_needs_rows_and_room() -> None:
    rows = normal(5, 3) @ normal(3, WIDTH, seed=1)
    assert plain(sums.same_subspace(rows, torch.arange(5), 3)) == [[0, 1, 2, 3, 4]]
    assert sums.same_subspace(rows[:4], torch.arange(4), 3) == []
    assert plain(sums.same_subspace(rows[:4], torch.arange(4), 3, fewest=4)) == [[0, 1, 2, 3]]
    assert sums.same_subspace(rows, torch.arange(5), 2) == []
    assert sums.same_subspace(normal(20, 3), torch.arange(20), 3) == []
    assert sums.same_subspace(normal(1, 9), torch.arange(1), 3, fewest=1) == []
    assert sums.same_subspace(torch.zeros(9, 9), torch.arange(9), 3) == []


def test_a_row_does_not_represent_itself() -> None:
    """Once the other rows are used up, too."""
    row, other = torch.nn.functional.normalize(normal(2, WIDTH), dim=1)
    _, sizes = sums._represent(torch.stack([row, other, other, other]), torch.arange(4), 3, 1e-4)
    assert sizes.tolist() == [0, 1, 1, 1]


def test_a_shared_row_links_neither_of_its_clients() -> None:
    a, b = (normal(6, 2, seed=seed) @ normal(2, WIDTH, seed=seed + 5) for seed in (1, 2))
    shared = a[:3] + b[:3]
    table, items = torch.cat([a, b, shared]), torch.arange(15)
    assert plain(sums.same_subspace(table, items, 2)) == [list(range(6)), list(range(6, 12))]
    one_way = torch.cat([torch.rand(5, 1) * a[:1], torch.rand(5, 1) * b[:1], a[:1] + torch.rand(3, 1) * b[:1]])
    assert plain(sums.same_subspace(one_way, torch.arange(13), 3)) == [list(range(5)), list(range(5, 10))]


def test_negatives_form_a_group_of_fewer_dimensions() -> None:
    """The rows of negatives are multiples of the user's vector; those of own items have a part of another direction."""
    vector, other = normal(2, WIDTH)
    negatives = -torch.rand(6, 1, generator=generator(), dtype=torch.float64) * vector
    own = torch.linspace(1, 2, 7)[:, None] * vector + torch.linspace(1, 0.1, 7)[:, None] * other
    table, items = torch.cat([negatives, own]), torch.arange(13)
    assert plain(sums.same_subspace(table, items, 2)) == [list(range(6)), list(range(6, 13))]
    assert plain(sums.same_subspace(table, items, 2, smallest=2)) == [list(range(6, 13))]


def test_rank_one_is_collinearity(world: World) -> None:
    table = world.neighbour_sum(torch.arange(0, 60, 3))
    assert plain(sums.same_subspace(table, EVERY, 1)) == plain(sums.collinear(table, EVERY))


# --- rows of few contributors ---


def test_rows_of_few_known_clients_are_attributed_by_hand() -> None:
    a, b, c, stranger = normal(4, WIDTH)
    table = torch.stack([a, 2 * a, b, b / 3, c, 5 * c, a + b, a + 2 * b + 3 * c, a + stranger, a - b, 3 * a]).float()
    groups = [torch.tensor(each) for each in ([0, 1], [2, 3], [4, 5])]
    items = torch.arange(11)
    assert plain(sums.few_contributors(table, items, groups)) == [[0, 1, 6, 7], [2, 3, 6, 7], [4, 5, 7]]
    assert plain(sums.few_contributors(table, items, groups, most=2)) == [[0, 1, 6], [2, 3, 6], [4, 5]]
    both_ways = table * torch.tensor([[-1.0], *[[1.0]] * 10])
    both_ways[2] *= -1  # now the rows of A and of B point both ways, so that a - b may be theirs
    assert plain(sums.few_contributors(both_ways, items, groups))[:2] == [[0, 1, 6, 7, 9], [2, 3, 6, 7, 9]]


def test_items_that_few_clients_share_are_added_to_each() -> None:
    """The group of both is a combination of their groups; B's is not one of A's and that of both."""
    a, b, c = normal(3, WIDTH)
    table = torch.stack([a, 2 * a, b, 3 * b, a + b, (a + b) / 2, c, 2 * c, a + b + c, a + c])
    groups = [torch.tensor([at, at + 1]) for at in (0, 2, 4, 6)]
    expected = [[0, 1, 4, 5, 8, 9], [2, 3, 4, 5, 8], [4, 5], [6, 7, 8, 9]]
    assert plain(sums.few_contributors(table, torch.arange(10), groups)) == expected


def test_a_wrong_first_choice_gets_no_weight() -> None:
    """A stranger's direction is nearer to a row of two clients than either of theirs."""
    a, b, noise = torch.nn.functional.normalize(normal(3, WIDTH), dim=1)
    near = a + b + 0.3 * noise
    table, items = torch.stack([a, 2 * a, b, 2 * b, near, 2 * near, a + b]), torch.arange(7)
    groups = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])]
    assert plain(sums.few_contributors(table, items, groups, most=2)) == [[0, 1, 6], [2, 3, 6], [4, 5]]


def test_contributors_of_shared_rows_of_a_planted_world(world: World) -> None:
    """Each shared row is attributed to exactly the clients that have it, if all of them are known and they are few."""
    cohort = torch.arange(0, 60, 4)
    groups = [torch.tensor(each) for each in world.alone(cohort, 4)]
    users = sums.owners(groups, world.offsets, world.items, cohort).users.tolist()
    counts = torch.bincount(torch.cat([world.lists[user] for user in cohort.tolist()]), minlength=world.m)
    strangers = torch.cat([world.lists[user] for user in cohort.tolist() if user not in users])
    clear = (counts >= 2) & (counts <= 5) & ~torch.isin(EVERY, strangers)
    assert int(clear.sum()) > 5
    for table, share in ((world.neighbour_sum(cohort), 1.0), (world.training_sum(cohort, 3), 0.9)):
        reached = []
        for before, after, user in zip(groups, sums.few_contributors(table, EVERY, groups), users, strict=True):
            more = set(after.tolist()) - set(before.tolist())
            truth = {item for item in world.lists[user].tolist() if clear[item]}
            assert more <= truth
            reached.append(len(more) / len(truth) if truth else 1.0)
        assert sum(reached) / len(reached) >= share
    assert plain(sums.few_contributors(sums.shuffled(table, generator()), EVERY, [])) == []


def test_groups_that_tell_no_direction_stay_as_they_are() -> None:
    wide, (a, b) = normal(20, WIDTH), normal(2, WIDTH, seed=1)
    table = torch.cat([wide, torch.stack([a, a, b, b, a + wide[0], a + b])])
    groups = [torch.arange(20), torch.tensor([20, 21]), torch.tensor([22, 23]), torch.tensor([77])]
    found = plain(sums.few_contributors(table, torch.arange(26), groups))
    assert found == [list(range(20)), [20, 21, 25], [22, 23, 25], [77]]
    assert sums.few_contributors(table, torch.arange(26), []) == []


# --- the control ---


def test_shuffling_keeps_columns_and_empty_rows() -> None:
    rows = torch.cat([normal(30, 4), torch.zeros(10, 4, dtype=torch.float64)])[
        torch.randperm(40, generator=generator())
    ]
    before = rows.clone()
    mixed = sums.shuffled(rows, generator(2))
    assert torch.equal(rows, before)
    assert torch.equal(mixed.sort(0).values, rows.sort(0).values)
    assert torch.equal(mixed.any(1), rows.any(1))
    assert not torch.equal(mixed, rows)
    assert not torch.equal(mixed.sort(0).indices[:, 0], rows.sort(0).indices[:, 0])
    assert torch.equal(mixed, sums.shuffled(rows, generator(2)))


# --- exposure ---


def test_exposure_by_hand() -> None:
    """User 0 has items 0 to 9, user 1 has 0 to 4, user 2 has 10 to 13; user 3 has everything but stays away."""
    lists = [torch.arange(10), torch.arange(5), torch.arange(10, 14), torch.arange(20)]
    offsets, items = torch.tensor([0, 10, 15, 19, 39]), torch.cat(lists)
    groups = [torch.tensor(each) for each in ([5, 6, 7], [7, 8, 9], [0, 1, 2], [10, 11, 12, 3], [13, 10])]
    degrees = torch.tensor([9.0, 8.0, 7.0, 0, 0, 0, 0, 0, 0, 0, 6.0, *[0.0] * 9])
    cohort = torch.tensor([2, 0, 1])
    found = sums.owners(groups, offsets, items, cohort)
    assert found.users.tolist() == [0, 0, 1, 2, 2]  # of users 0 and 1, who both have items 0 to 2, the shorter list
    assert found.precision.tolist() == [1.0, 1.0, 1.0, 0.75, 1.0]
    assert found.share.tolist() == [0.3, 0.3, 0.6, 0.75, 0.5]
    assert found.exposing.tolist() == [True, True, True, False, False]
    exposure = sums.exposed(groups, offsets, items, cohort, degrees)
    assert (exposure.cohort, exposure.groups, exposure.users) == (3, 5, (0, 1))
    assert exposure.precision == pytest.approx(0.95)
    assert exposure.share == pytest.approx((0.5 + 0.6) / 2)
    assert exposure.largest_share == pytest.approx(0.6)
    # popular groups of 3 are {0, 1, 2}, that of 4 also has 10, that of 2 is {0, 1}: users 0 and 1 have all but 10
    assert exposure.popularity == pytest.approx((3 * 1.0 + 0.75 + 1.0) / 5)
    assert exposure.popular_users == 1
    assert exposure.popularity_of_anyone == pytest.approx((3 * 2 / 3 + (0.75 + 0.75 + 0.25) / 3 + 2 / 3) / 5)
    assert sums.exposed(groups, offsets, items, cohort[[1, 2, 0]], degrees) == exposure


def test_nothing_exposes_nobody() -> None:
    offsets, items = torch.tensor([0, 3]), torch.arange(3)
    empty = sums.exposed([], offsets, items, torch.tensor([0]), torch.ones(3))
    assert empty == sums.Exposure(1, 0, (), 0.0, 0.0, 0.0, 0.0, 0, 0.0)
    absent = sums.exposed([torch.arange(3)], offsets, items, torch.arange(0), torch.ones(3))
    assert (absent.users, absent.precision, absent.popular_users) == ((), 0.0, 0)


def test_neighbour_sums_of_a_planted_world_expose_its_users(world: World) -> None:
    cohort = torch.arange(0, 60, 3)
    table = world.neighbour_sum(cohort)
    args = world.offsets, world.items, cohort, world.degrees
    groups = sums.collinear(table, EVERY)
    found = sums.exposed(groups, *args)
    more = sums.exposed(sums.few_contributors(table, EVERY, groups), *args)
    assert found.precision == more.precision == 1.0
    assert len(found.users) >= len(world.alone(cohort, 3))
    assert 0.2 < found.share < 0.7
    assert more.share > 0.95
    assert found.popularity_of_anyone < found.popularity < 0.9
    assert found.popular_users <= 2


# --- over rounds ---


def test_a_chain_ends_in_the_user_who_was_always_there() -> None:
    follower = sums.Follower()
    follower.see([torch.tensor([1, 2, 3, 4]), torch.tensor([7, 8, 9])], torch.tensor([0, 1, 2, 3]))
    assert (follower.chains, follower.named()) == (2, {})
    follower.see([torch.tensor([2, 3, 4, 5])], torch.tensor([1, 2, 5]))  # 3 of 5 items are common
    assert (follower.chains, follower.named()) == (2, {})
    follower.see([torch.tensor([1, 5]), torch.tensor([7, 30, 31])], torch.tensor([2, 3, 9]))  # 7 alone is too little
    assert follower.chains == 3
    named = follower.named()
    assert list(named) == [2]
    assert named[2].tolist() == [1, 2, 3, 4, 5]


def test_a_chain_is_not_continued_by_a_round_without_its_users() -> None:
    follower, group = sums.Follower(), torch.tensor([1, 2, 3])
    follower.see([group], torch.tensor([0, 1]))
    follower.see([group], torch.tensor([2, 3]))
    assert follower.chains == 2
    follower.see([group], torch.tensor([1, 4]))
    assert (follower.chains, list(follower.named())) == (2, [1])


def test_overlaps_at_the_limits() -> None:
    for group, chains in (
        ([0, 1, 2, 3, 10], 1),
        ([0, 1, 2, 10, 11], 2),
        (list(range(5)), 1),
        ([0, 1, 2, 3, 4, 5, 40], 1),
    ):
        follower = sums.Follower()
        follower.see([torch.arange(10)], torch.tensor([0, 1]))
        follower.see([torch.tensor(group)], torch.tensor([0, 1]))
        assert follower.chains == chains, group


def test_of_several_chains_the_most_alike_is_continued() -> None:
    for order in ((0, 1), (1, 0)):
        follower, groups = sums.Follower(), (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 5, 6]))
        for at in order:
            follower.see([groups[at]], torch.tensor([10 + at, 20 + at]))
        assert follower.chains == 2
        follower.see([torch.tensor([2, 3, 4, 5, 6])], torch.tensor([10, 11]))
        assert list(follower.named()) == [11]


def test_groups_of_one_round_start_chains_of_their_own() -> None:
    follower = sums.Follower()
    follower.see([torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 4])], torch.tensor([5]))
    assert follower.chains == 2
    assert follower.named()[5].tolist() == [1, 2, 3, 4]  # the only member of a cohort needs no other round


def test_the_follower_names_planted_users_and_nobody_from_random_groups(world: World) -> None:
    follower, control = sums.Follower(), sums.Follower()
    for number in range(30):
        cohort = torch.randperm(60, generator=generator(number))[:15].sort().values
        groups = sums.collinear(world.neighbour_sum(cohort), EVERY)
        follower.see(groups, cohort)
        control.see(
            [torch.randperm(400, generator=generator(99 * number + at))[:5] for at in range(len(groups))], cohort
        )
    named = follower.named()
    assert len(named) >= 50
    for user, items in named.items():
        assert bool(torch.isin(items, world.lists[user]).all())
    assert follower.chains < 120  # of more than 400 groups
    assert control.named() == {}
    assert control.chains > 250
    found = sums.naming_findings("followed", named, control.named(), world.offsets, world.items)
    assert found == [
        Finding("followed", "users named", len(named), 0, None, len(named)),
        Finding("followed", "item precision", 1.0, 0.0, None, len(named)),
    ]


def test_wrong_names_do_not_count() -> None:
    offsets, items = torch.tensor([0, 3, 6]), torch.tensor([0, 1, 2, 3, 4, 5])
    named = {0: torch.tensor([0, 1]), 1: torch.tensor([3, 0])}
    users, precision = sums.naming_findings("followed", named, {1: torch.tensor([5])}, offsets, items)
    assert (users.value, users.guessing, users.cases) == (1, 1, 2)
    assert (precision.value, precision.guessing) == (0.75, 1.0)


# --- differences between rounds ---


@pytest.fixture(scope="module")
def rounds(world: World) -> tuple[Tensor, Tensor]:
    took_part = torch.rand(40, 60, generator=generator(3)) < 0.25
    tables = torch.stack([world.neighbour_sum(each.nonzero().squeeze(1)) for each in took_part])
    return tables.double(), took_part


def test_scores_are_those_of_the_regression_on_users(rounds: tuple[Tensor, Tensor]) -> None:
    """Against the primal form, (A^T A + ridge) W = A^T Y, of size n x n, with centred A and Y."""
    tables, took_part = rounds
    part = took_part.double() - took_part.double().mean(0)
    centred = (tables - tables.mean(0)).flatten(1)
    added = torch.linalg.solve(part.T @ part + 3.0 * torch.eye(60), part.T @ centred).view(60, 400, WIDTH)
    users = torch.tensor([4, 50, 17])
    expected = added[users].norm(dim=2) / (centred.view(40, 400, WIDTH).square().mean(0).sum(1).sqrt() + 1e-6)
    torch.testing.assert_close(sums.by_cohorts(tables, took_part, None, users, ridge=3.0), expected)
    lift = normal(500, 400, seed=6)
    lift[7] = 0.0
    lifted = (lift @ added[users]).norm(dim=2) / (lift.norm(dim=1) + 1e-6)
    scores = sums.by_cohorts(tables, took_part, lift, users, ridge=3.0)
    torch.testing.assert_close(scores, lifted)
    assert scores[:, 7].tolist() == [0.0, 0.0, 0.0]


def test_differences_between_rounds_show_items(world: World, rounds: tuple[Tensor, Tensor]) -> None:
    tables, took_part = rounds
    users, basis = torch.arange(60), torch.linalg.qr(normal(400, 100, seed=8))[0]
    for sums_, lift, least in ((tables, None, 0.7), (basis.T @ tables, basis, 0.3)):
        scores = sums.by_cohorts(sums_, took_part, lift, users)
        found = sums.infer_by_cohorts(scores, world.lists, world.degrees, "rounds")
        assert found.value > least
        assert found.popularity is not None
        assert found.value > 2 * found.popularity
        assert found.guessing == pytest.approx(12 / 400)
        assert (found.attack, found.metric, found.cases) == ("differences between rounds", "precision at |I_u|", 60)
        others = torch.stack([each[torch.randperm(60, generator=generator(9))] for each in took_part])
        control = sums.by_cohorts(sums_, others, lift, users)
        assert sums.infer_by_cohorts(control, world.lists, world.degrees, "rounds").value < 0.5 * found.value


def test_precision_of_scores_by_hand() -> None:
    scores = torch.tensor([[5.0, 4.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    own = [torch.tensor([0, 2]), torch.tensor([3])]
    found = sums.infer_by_cohorts(scores, own, torch.tensor([9.0, 1.0, 8.0, 0.0]), "x")
    assert found == Finding("differences between x", "precision at |I_u|", 0.75, (0.5 + 0.25) / 2, 0.5, 2)


def test_findings_of_an_exposure() -> None:
    found = sums.Exposure(20, 7, (3, 5, 8), 0.9, 0.4, 0.6, 0.3, 1, 0.1)
    control = replace(found, groups=2, users=(3,), precision=0.2, share=0.1, popularity=0.9)
    assert sums.exposure_findings("collinear rows of a sum", found, control, 4) == [
        Finding("collinear rows of a sum", "users exposed", 3, 1, 1, 20, 4),
        Finding("collinear rows of a sum", "item precision", 0.9, 0.2, 0.3, 7, 4),
        Finding("collinear rows of a sum", "share of list", 0.4, 0.1, None, 3, 4),
    ]


def test_a_direction_of_a_sum_shows_who_stands_out_in_it() -> None:
    """One upload is ten times as long as the others: the first direction ranks its items first."""
    generator = torch.Generator().manual_seed(3)
    lists = [torch.randperm(300, generator=generator)[:10] for _ in range(30)]
    table = torch.zeros(300, 8)
    for user, own in enumerate(lists):
        table[own] += (10 if user == 4 else 1) * torch.randn(8, generator=generator)
    absent = [torch.randperm(300, generator=generator)[:10] for _ in range(30)]
    found, others = sums.by_directions(table, None, lists), sums.by_directions(table, None, absent)
    assert found[4] == 1
    assert float(others.max()) < 0.6
    turned, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator))
    lifted = sums.by_directions(turned.T @ table, turned, lists)
    assert lifted[4] == 1
    assert sums.by_directions(table, None, [torch.zeros(0, dtype=torch.int64)]).tolist() == [0]
