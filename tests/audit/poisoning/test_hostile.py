"""Malicious clients among honest ones: what is replaced, what stays, and the bound on it."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec import ConfigError, Dataset, configure, load
from perfedrec.audit.poisoning import ATTACKS, Scenario, poisoned
from perfedrec.audit.poisoning.adversary import Adversary, Known, Lying, Sight
from perfedrec.audit.poisoning.clients import draw_targets, n_malicious, named_targets, with_clients
from perfedrec.audit.poisoning.hostile import Bound, Hostile, joined
from perfedrec.audit.poisoning.play import known_of, make, targets_of
from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.keys import Key
from perfedrec.core.types import Update
from perfedrec.methods.federated.perfedrec_pp import LEAST_ENERGY
from perfedrec.privacy.protection import joint_norms
from perfedrec.runtimes.simulator import Simulator

SMALL = ("selection.n_clients_per_round=40", "model.embedding_dim=8", "run.rounds=2", "run.threads=1")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("synthetic:users=120,items=90,interactions_per_user=8")


class Constant(Lying):
    """Sends 1 in each number of the targets' rows."""

    name = "constant"

    def changes(self, sight: Sight) -> tuple[Tensor, Tensor]:
        return self.known.targets, torch.ones(self.known.targets.numel(), sight.broadcast.items.shape[1])


class Watched(Hostile):
    """Keeps what blocks of training send."""

    seen: list[Update]

    def sent(self, phase: str, update: Update, honest: Update) -> Update:
        found = super().sent(phase, update, honest)
        if phase == "train":
            self.seen = [*getattr(self, "seen", []), found]
        return found


def played(
    dataset: Dataset,
    adversary: Any,
    preset: str = "fedmf",
    bound: Bound = "kept",
    block_size: int = 1024,
    **options: Any,
) -> tuple[Watched, Simulator[Any, Any, Any]]:
    """A method with an adversary after all phases and two rounds of training, with 12 malicious clients."""
    config = configure(preset, overrides=SMALL, **options)
    algorithm = cast(AnyAlgorithm, config.build())
    known = Known(dataset.n_items, 10, torch.tensor([3, 50]), Key(1), torch.arange(dataset.n_items))
    mind: Adversary = adversary(known)
    hostile = Watched(algorithm, mind, dataset.n_users, bound, length=5.0)
    data = with_clients(dataset, mind.lists(12))
    simulator: Simulator[Any, Any, Any] = Simulator(
        cast(AnyAlgorithm, hostile), data, device="cpu", block_size=block_size
    )
    for _ in range(simulator.n_phases + 2):
        simulator.play()
    return hostile, simulator


def test_malicious_clients_are_added_and_hold_nothing_out(dataset: Dataset) -> None:
    lists = [np.array([1, 4]), np.array([0])]
    data = with_clients(dataset, lists)
    assert (data.n_users, data.n_items) == (dataset.n_users + 2, dataset.n_items)
    assert data.train.items[-3:].tolist() == [1, 4, 0]
    assert data.train.degrees[-2:].tolist() == [2, 1]
    for name in ("train", "valid", "test"):
        assert np.array_equal(
            getattr(data, name).items[: getattr(dataset, name).items.size], getattr(dataset, name).items
        )
    assert data.valid.degrees[-2:].tolist() == data.test.degrees[-2:].tolist() == [0, 0]
    assert len(set(data.train.user_ids.tolist())) == data.n_users
    assert with_clients(dataset, []) is dataset


def test_names_of_malicious_clients_are_new_where_ids_are_texts() -> None:
    taken = load({"user": ["a", "malicious-0", "a", "malicious-0"] * 2, "item": [1, 1, 2, 2, 3, 3, 4, 4]})
    data = with_clients(taken, [np.array([0])] * 3)
    assert len(set(data.train.user_ids.tolist())) == data.n_users == taken.n_users + 3


def test_targets_have_few_users_and_follow_from_the_seed(dataset: Dataset) -> None:
    degrees = dataset.train.item_degrees
    targets = draw_targets(dataset, 5, seed=4)
    assert targets.tolist() == sorted(set(targets.tolist())) == draw_targets(dataset, 5, seed=4).tolist()
    assert targets.tolist() != draw_targets(dataset, 5, seed=5).tolist()
    assert all(1 <= degrees[each] <= np.median(degrees[degrees > 0]) for each in targets.tolist())
    with pytest.raises(ConfigError, match="fewer targets"):
        draw_targets(dataset, 80, seed=0)
    name = dataset.train.item_ids[7]
    assert (
        targets_of(dataset, Scenario(targets=(str(name),)), 0).tolist()
        == named_targets(dataset, [name]).tolist()
        == [7]
    )


def test_a_share_of_clients_is_at_least_one() -> None:
    assert [n_malicious(943, share) for share in (0.0001, 0.001, 0.01, 0.05)] == [1, 1, 9, 47]


@pytest.mark.parametrize("preset", ["fedmf", "recommended"])
def test_honest_clients_send_what_they_would_and_malicious_ones_their_own(dataset: Dataset, preset: str) -> None:
    """The same blocks with and without lies: the first round of training differs in malicious users alone."""
    honest, _ = played(dataset, lambda known: Adversary(known), preset)
    lying, _ = played(dataset, Constant, preset)
    before, after = honest.seen[0], lying.seen[0]
    place = {user: number for number, user in enumerate(before.users.tolist())}
    assert sorted(place) == sorted(after.users.tolist())
    malicious = [number for number, user in enumerate(after.users.tolist()) if user >= dataset.n_users]
    assert malicious
    for number in malicious:
        own = after.of_user(number)
        assert own.items is not None
        assert own.deltas is not None
        assert own.items.tolist() == [3, 50]
        assert torch.equal(own.deltas, own.deltas[:1, :1].expand_as(own.deltas))
        assert float(own.deltas[0, 0]) > 0
    if preset == "fedmf":  # nothing of another client has reached them yet
        for number, user in enumerate(after.users.tolist()):
            if user < dataset.n_users:
                mine, same = after.of_user(number), before.of_user(place[user])
                assert mine.items is not None
                assert same.items is not None
                assert mine.deltas is not None
                assert same.deltas is not None
                assert torch.equal(mine.items, same.items)
                assert torch.equal(mine.deltas, same.deltas)


def test_forged_parts_are_as_long_as_they_may_be(dataset: Dataset) -> None:
    """Without a bound: 5 times the mean of honest work. With one: the bound if it is kept, 5 times the bound if not."""

    def longest(**options: Any) -> tuple[float, float]:
        seen = played(dataset, Constant, **options)[0].seen[0]
        norms, malicious = joint_norms(seen, "l2"), seen.users >= dataset.n_users
        return float(norms[malicious].max()), float(norms[~malicious].max())

    sums: dict[str, Any] = {
        "privacy__aggregation": "dense",
        "privacy__norm": "l2",
        "privacy__clip": 0.001,
    }
    lies, honest = longest(**sums)
    assert lies == pytest.approx(0.001, rel=1e-4)
    assert honest <= 0.001
    assert longest(bound="ignored", **sums)[0] == pytest.approx(0.005, rel=1e-4)
    assert longest(privacy__norm="coordinate", privacy__clip=1e-4)[0] == pytest.approx(1e-4 * 16**0.5, rel=1e-3)


def test_blocks_do_not_change_what_malicious_clients_do(dataset: Dataset) -> None:
    """One adversary whose clients are in several blocks gives the same model, if it needs no mean over a block."""
    whole, parts = (
        played(dataset, Adversary, "recommended", block_size=size, privacy="secure", privacy__min_clients=8)[1]
        for size in (1024, 7)
    )
    assert torch.equal(whole.state.items, parts.state.items)


def test_forged_passes_cannot_make_users_first_vectors_grow_without_limit(dataset: Dataset) -> None:
    """Forged parts of passes make the sum of squared singular values negative, which honest ones never do."""
    flipping = partial(make, "sign-flipping", options={})
    _, simulator = played(dataset, flipping, "recommended", privacy="secure", privacy__min_clients=8)
    n_items, dim = simulator.state.items.shape
    most = (simulator.state.n_users * dim / (LEAST_ENERGY * n_items)) ** 0.5
    assert simulator.state.pretrained.user_init_scale == pytest.approx(most)
    assert bool(simulator.state.items.isfinite().all())


def test_a_part_of_an_update_and_the_rest_are_the_whole() -> None:
    update = Update(
        users=torch.tensor([4, 7, 9]),
        groups=torch.tensor([0, 1, 0]),
        weights=torch.tensor([1.0, 2.0, 3.0]),
        segments=torch.tensor([0, 1, 1, 2]),
        items=torch.tensor([5, 6, 7, 8]),
        deltas=torch.arange(8.0).view(4, 2),
        reports=torch.arange(3.0).view(3, 1, 1),
        edges=torch.tensor([[0, 0, 11], [0, 2, 12], [1, 1, 13]]),
    )
    chosen = torch.tensor([True, False, True])
    mine, rest = update.part(chosen), update.part(~chosen)
    assert mine.users.tolist() == [4, 9]
    assert mine.segments is not None
    assert mine.items is not None
    assert mine.edges is not None
    assert (mine.segments.tolist(), mine.items.tolist()) == ([0, 1], [5, 8])
    assert mine.edges.tolist() == [[0, 0, 11], [0, 1, 12]]
    both = joined(mine, rest)
    assert both.users.tolist() == [4, 9, 7]
    for place, user in enumerate(both.users.tolist()):
        one, same = both.of_user(place), update.of_user(update.users.tolist().index(user))
        for name in ("items", "deltas", "reports", "edges", "weights", "groups"):
            assert torch.equal(getattr(one, name), getattr(same, name)), name


def test_an_adversary_knows_what_its_attack_says_and_nothing_else(dataset: Dataset) -> None:
    for name, kind in ATTACKS.items():
        known = known_of(dataset, name, torch.tensor([1]), Scenario(public=0.1), seed=0)
        assert (known.popular is not None) == ("popularity" in kind.knows)
        assert (known.public is not None) == ("public" in kind.knows)
        if known.public is not None:
            assert len(known.public) == 12


def test_unknown_attacks_options_and_methods_are_refused(dataset: Dataset) -> None:
    config = configure("fedmf", overrides=SMALL)
    with pytest.raises(ConfigError, match=r"no attack 'populr'; expected one of random, .*; did you mean popular\?"):
        poisoned(config, dataset, "populr")
    with pytest.raises(ConfigError, match=r"attack random \(options: none\): there is no option loudness"):
        poisoned(config, dataset, "random", options={"loudness": 3})
    with pytest.raises(ConfigError, match="no clients that could lie"):
        poisoned(configure("mf"), dataset, "random")


@pytest.mark.parametrize("name", ["random", "popular"])
def test_lists_of_fillers_have_the_targets(dataset: Dataset, name: str) -> None:
    known = known_of(dataset, name, torch.tensor([1, 2]), Scenario(), seed=0)
    lists = make(name, known, {}).lists(6)
    assert all(
        {1, 2} <= set(each.tolist()) and known.list_length - 2 <= each.size <= known.list_length for each in lists
    )
    assert len({tuple(each.tolist()) for each in lists}) == 6
    if name == "popular":
        assert known.popular is not None
        most = set(known.popular[: max(known.n_items // 10, known.list_length)].tolist()) | {1, 2}
        assert all(set(each.tolist()) <= most for each in lists)
