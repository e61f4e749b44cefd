"""What each attack sends, against what its equation says, and its effect."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from perfedrec import load
from perfedrec.audit.poisoning import ATTACKS, Scenario
from perfedrec.audit.poisoning.adversary import Known, Lying, Sight, lengths, stretched, with_changes
from perfedrec.audit.poisoning.aims import Mined, fitted_users, mean_direction, popularity_direction
from perfedrec.audit.poisoning.boosting import ExplicitBoosting, FedRecAttack, PipAttack
from perfedrec.audit.poisoning.collusion import Collusion
from perfedrec.audit.poisoning.mining import HidAttack, HidAttackOptions, PieckIPE, PieckUEA, PoisonFRS
from perfedrec.audit.poisoning.play import known_of
from perfedrec.audit.poisoning.untargeted import ClusterAttack, SignFlipping, Spattack, SpattackO
from perfedrec.core.aggregate import BASIS_GRID
from perfedrec.core.keys import Key, normal
from perfedrec.core.types import Rows, Update

N_ITEMS, DIM, TARGETS = 12, 4, torch.tensor([5, 9])


def numbers(name: str, *shape: int) -> Tensor:
    """Random numbers by name."""
    size = int(torch.tensor(shape).prod())
    return normal(Key(3).fold(name).spread(torch.zeros(1, dtype=torch.int64)), size).reshape(shape)


def known(**more: Any) -> Known:
    return Known(N_ITEMS, 5, TARGETS, Key(2), popular=torch.arange(N_ITEMS), **more)


def sight(phase: str = "train", items: Tensor | None = None, **more: Any) -> Sight:
    """Two malicious clients, each with the items 0 and 5."""
    rows = Rows(torch.tensor([20, 21]), torch.tensor([0, 2, 4]), torch.tensor([0, 5, 0, 5]), torch.tensor([0, 0, 1, 1]))
    work = Update(
        users=rows.users,
        groups=torch.zeros(2, dtype=torch.int64),
        weights=torch.ones(2),
        segments=rows.segments,
        items=rows.items,
        deltas=numbers("work", 4, DIM),
    )
    table = numbers("items", N_ITEMS, DIM) if items is None else items
    broadcast: Any = SimpleNamespace(items=table, **more.pop("sent", {}))
    own = numbers("vectors", 2, DIM)
    return replace(Sight(phase, broadcast, rows, work, lambda: own, 10.0, 7.0), **more)


def changed(update: Update, place: int = 0) -> Tensor:
    """[m, d] what one client changes, by item."""
    own = update.of_user(place)
    assert own.items is not None
    assert own.deltas is not None
    return torch.zeros(N_ITEMS, own.deltas.shape[1]).index_add_(0, own.items, own.deltas)


@pytest.mark.parametrize("name", [name for name, kind in ATTACKS.items() if issubclass(kind, Lying)])
def test_forged_training_is_as_long_as_the_scenario_says(name: str) -> None:
    public = [torch.tensor([0, 1, 2]), torch.tensor([3, 5])]
    adversary, seen = ATTACKS[name](known(public=public)), sight()
    for step in range(4):  # until popular items are mined
        items = seen.broadcast.items + numbers(f"step {step}", N_ITEMS, DIM)
        seen = replace(seen, broadcast=cast(Any, SimpleNamespace(items=items)))
        sent = adversary.forge(seen)
    mean = float(lengths(seen.work).mean())
    assert lengths(sent).tolist() == pytest.approx([10 * mean] * 2, rel=1e-4)
    if ATTACKS[name].promotes and name != "fedrecattack":
        assert sorted(set(cast(Tensor, sent.items).tolist())) == TARGETS.tolist()


def test_boosting_moves_targets_along_the_own_vectors() -> None:
    seen = sight()
    found = changed(ExplicitBoosting(known()).forge(seen))
    own = cast(Tensor, seen.vectors()).mean(0)
    for target in TARGETS.tolist():
        assert float(functional.cosine_similarity(found[target], own, dim=0)) == pytest.approx(1, abs=1e-5)
    assert not bool(found[[0, 1, 2]].any())


def test_boosting_without_vectors_sends_the_honest_change_of_targets() -> None:
    seen = replace(sight(), vectors=lambda: None)
    found = changed(ExplicitBoosting(known()).forge(seen))
    work = cast(Tensor, seen.work.deltas)
    assert float(functional.cosine_similarity(found[5], work[1] + work[3], dim=0)) == pytest.approx(1, abs=1e-5)
    assert not bool(found[9].any())  # nobody of them has it


def test_pipattack_moves_targets_to_where_popular_items_are() -> None:
    """Popular items have a positive first number, the others a negative one; the classifier finds it."""
    items = numbers("table", N_ITEMS, DIM) * 0.1
    items[:, 0] = torch.where(torch.arange(N_ITEMS) < 4, 1.0, -1.0)
    direction = popularity_direction(items, torch.arange(4))
    assert float(direction[0]) > 0.95
    options = PipAttack.Options(popular=1 / 3, boosting=0.0)
    found = changed(PipAttack(known(), options).forge(sight(items=items)))
    assert float(functional.cosine_similarity(found[5], direction, dim=0)) == pytest.approx(1, abs=1e-5)


def test_fedrecattack_raises_targets_and_lowers_the_last_of_the_lists() -> None:
    """One public user, whose vector is its two items' mean direction: a step along the change raises its score for the
    targets above the item that was pushed out."""
    items = functional.normalize(numbers("rows", N_ITEMS, DIM), dim=1)
    public = [torch.tensor([0, 1])]
    adversary = FedRecAttack(known(public=public), FedRecAttack.Options(top=3, steps=40))
    seen = sight(items=items)
    which, table = adversary.changes(seen)
    user = cast(Tensor, adversary._users)[0]
    assert float(items[[0, 1]].mean(0) @ user) > float(items.mean(0) @ user)
    assert set(TARGETS.tolist()) <= set(which.tolist())
    gains = dict(zip(which.tolist(), (table @ user).tolist(), strict=True))
    assert all(gains[each] > 0 for each in TARGETS.tolist())
    (pushed,) = set(which.tolist()) - set(TARGETS.tolist())
    scores = items @ user
    ranked = [each for each in scores.argsort(descending=True).tolist() if each not in (0, 1, 5, 9)]
    assert pushed == ranked[2]
    assert gains[pushed] < 0


def test_fedrecattack_keeps_the_longest_rows_and_the_targets() -> None:
    public = [torch.tensor([each]) for each in (0, 1, 2, 3, 4, 6)]
    adversary = FedRecAttack(known(public=public), FedRecAttack.Options(rows=3, top=2))
    which, _ = adversary.changes(sight())
    assert which.numel() <= 3
    assert set(TARGETS.tolist()) <= set(which.tolist())


def test_users_are_fitted_to_their_lists() -> None:
    items = functional.normalize(numbers("rows", N_ITEMS, DIM), dim=1)
    lists = [torch.tensor([0, 1]), torch.tensor([7])]
    users = fitted_users(items, lists, Key(0), steps=60)
    scores = users @ items.T
    for own, row in zip(lists, scores, strict=True):
        assert float(row[own].mean()) > float(row.mean()) + float(row.std())


def test_popular_items_are_mined_by_how_far_rows_move() -> None:
    mined, table = Mined(2, rounds=2), numbers("items", N_ITEMS, DIM)
    mined.see(table)
    mined.see(table)  # the same table in another block
    assert mined.popular(TARGETS) is None
    for _ in range(2):
        table = table.clone()
        table[3] += 1.0
        table[7] += 0.5
        table[9] += 3.0  # a target moves because of the attack itself
        mined.see(table)
    assert cast(Tensor, mined.popular(TARGETS)).tolist() == [3, 7]


def test_pieck_and_poisonfrs_aim_as_their_equations_say() -> None:
    targets, popular = numbers("targets", 2, DIM), numbers("popular", 3, DIM)
    ipe = PieckIPE(known()).aim(targets, popular)
    assert torch.allclose(ipe, (3 * popular[0] + 2 * popular[1] + popular[2]) / 6 - targets, atol=1e-6)
    moved = targets.clone().requires_grad_()
    (-functional.softplus(-(moved @ popular.T)).sum()).backward()
    assert torch.allclose(PieckUEA(known()).aim(targets, popular), cast(Tensor, moved.grad), atol=1e-5)
    wanted = PoisonFRS(known()).aim(targets, popular) + targets
    assert torch.allclose(functional.normalize(wanted, dim=1), mean_direction(popular).expand(2, -1), atol=1e-5)
    assert wanted.norm(dim=1).tolist() == pytest.approx([10 * float(popular.norm(dim=1).mean())] * 2, rel=1e-4)


def test_hidattack_comes_to_the_arm_that_works() -> None:
    """Targets rise where PieckUEA was chosen and nowhere else."""
    adversary = HidAttack(known(), HidAttackOptions(exploration=0.0))
    popular, items = numbers("popular", 3, DIM), numbers("items", N_ITEMS, DIM)
    chosen = []
    for _ in range(8):
        arm = adversary.choose(items, popular)
        chosen.append(type(adversary.arms[arm]).__name__)
        items = items.clone()
        items[TARGETS] += mean_direction(popular) * (1.0 if chosen[-1] == "PieckUEA" else -0.5)
    assert set(chosen[:3]) == {"PieckIPE", "PieckUEA", "PoisonFRS"}
    assert chosen[3:] == ["PieckUEA"] * 5


def test_parts_of_hidattack_differ_and_have_one_aim() -> None:
    adversary, seen = HidAttack(known()), sight()
    for step in range(4):
        seen = replace(seen, broadcast=cast(Any, SimpleNamespace(items=numbers(f"table {step}", N_ITEMS, DIM))))
        sent = adversary.forge(seen)
    first, second = changed(sent, 0)[5], changed(sent, 1)[5]
    assert not torch.allclose(first, second)
    assert float(functional.cosine_similarity(first, second, dim=0)) > 0.5


def test_untargeted_attacks_send_what_they_say() -> None:
    seen = sight()
    flipped = changed(SignFlipping(known()).forge(seen))
    assert float(functional.cosine_similarity(flipped[5], -cast(Tensor, seen.work.deltas)[1], dim=0)) > 0.999
    first, second = (changed(Spattack(known()).forge(seen), place) for place in (0, 1))
    assert torch.equal(first, second)
    assert bool(first.any(1).all())
    honest = replace(seen.work, users=torch.tensor([0, 1]))
    opposed = changed(SpattackO(known()).forge(replace(seen, honest=honest)))
    total = changed(seen.work, 0) + changed(seen.work, 1)
    assert float(functional.cosine_similarity(opposed.flatten(), -total.flatten(), dim=0)) == pytest.approx(1, abs=1e-5)
    items = seen.broadcast.items
    sent = changed(ClusterAttack(known(), ClusterAttack.Options(n_clusters=1)).forge(seen))
    assert float(functional.cosine_similarity(sent.flatten(), (items.mean(0) - items).flatten(), dim=0)) > 0.999


def test_collusion_raises_the_target_most_in_the_basis() -> None:
    """Of changes with equal length it raises the target more than a change of the target's row, after the sum came back
    from the basis, and raises popular items hardly."""
    basis = torch.linalg.qr(numbers("basis", N_ITEMS, 3).double())[0]
    adversary = Collusion(
        Known(N_ITEMS, 5, TARGETS[:1], Key(2), popular=torch.arange(N_ITEMS)), Collusion.Options(popular=1)
    )
    seen = sight(sent={"basis": (basis * BASIS_GRID).to(torch.int16)})
    aim = mean_direction(seen.broadcast.items[:1]).double()

    def after(change: Tensor) -> Tensor:
        whole = change.double() / change.double().norm()
        return (basis @ (basis.T @ whole)) @ aim

    found = after(changed(adversary.forge(seen)))
    alone = torch.zeros(N_ITEMS, DIM, dtype=torch.float64)
    alone[5] = aim
    assert float(found[5]) > float(after(alone)[5])
    assert abs(float(found[0])) < 0.5 * float(found[5])


def test_collusion_lies_in_each_phase_before_training() -> None:
    adversary, degrees = Collusion(known()), torch.arange(1.0, N_ITEMS + 1)
    counted = sight("degrees", sent={"degrees": degrees})
    counted = replace(counted, work=replace(counted.work, deltas=torch.ones(4, 1)))
    assert cast(Tensor, adversary.forge(counted).deltas).squeeze(1).tolist() == [1, 7, 1, 7]
    crowd = degrees.sqrt()
    crowd[TARGETS] = 0
    sent = adversary.forge(sight("spectral", sent={"degrees": degrees}))
    found, wanted = changed(sent), crowd @ sight().broadcast.items
    assert sorted(set(cast(Tensor, sent.items).tolist())) == TARGETS.tolist()
    assert float(functional.cosine_similarity(found[5], wanted, dim=0)) == pytest.approx(1, abs=1e-5)
    assert float(lengths(sent)[0]) == pytest.approx(
        7 * float(cast(Tensor, sight().work.deltas).norm()) / 2**0.5, rel=1e-4
    )


def test_collusion_sends_edges_to_targets_often_and_votes() -> None:
    adversary = Collusion(known())
    edges = torch.tensor([[0, 0, 3], [0, 0, 8], [0, 1, 3]])
    tokens = torch.tensor([0, 1, 2, 4, 5, 8, 6, 7, 3, 9, 10, 11])  # item 5 has token 8
    joining = sight("join", sent={"tokens": tokens})
    work = replace(joining.work, deltas=None, segments=None, items=None, edges=edges, reports=torch.ones(2, 1, DIM))
    sent = adversary.forge(replace(joining, work=work))
    assert cast(Tensor, sent.edges).tolist().count([0, 0, 8]) == 7
    assert cast(Tensor, sent.edges).shape[0] == 9
    lists, held = adversary.lists(4), adversary.held_out(4)
    assert [each.tolist() for each in held] == [[], [5, 9], [], [5, 9]]
    assert all(not set(own.tolist()) & set(out.tolist()) for own, out in zip(lists, held, strict=True))
    assert not any(each.size for each in Collusion(known(), Collusion.Options(votes=False)).held_out(4))


def test_colluding_clients_claim_one_list_or_a_list_each() -> None:
    many = Known(400, 5, TARGETS, Key(2), popular=torch.arange(400))
    same, own = (
        {tuple(each.tolist()) for each in Collusion(many, Collusion.Options(votes=False, varied=varied)).lists(5)}
        for varied in (False, True)
    )
    assert len(same) == 1
    assert len(own) > 1
    assert all(set(TARGETS.tolist()) < set(each) for each in same | own)


def test_reports_stay_as_long_as_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports follow from what the lies have changed: a factor on them in each round would grow without end."""
    adversary, seen = ExplicitBoosting(known()), sight()
    sizes = []
    for scale in (1.0, 50.0):
        work = replace(seen.work, reports=torch.full((2, 1, DIM), scale))
        sent = adversary.forge(replace(seen, work=work))
        sizes.append(float(cast(Tensor, sent.reports)[0].norm()))
    assert sizes[0] == pytest.approx(7 * 2.0)
    assert sizes[1] == pytest.approx(sizes[0])


def test_tables_that_are_not_the_model_s_stay() -> None:
    work = sight().work
    work = replace(work, tables=torch.tensor([0, 1, 0, 1]))
    sent = with_changes(work, torch.tensor([7]), torch.ones(1, DIM))
    assert cast(Tensor, sent.tables).tolist() == [0, 0, 1, 1]
    assert cast(Tensor, sent.items).tolist() == [7, 7, 5, 5]
    longer = stretched(sent, work, 3.0)
    assert lengths(longer).tolist() == pytest.approx([3 * float(lengths(work).mean())] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("pipattack", "popular", 0.5),
        ("pipattack", "boosting", 0.9),
        ("fedrecattack", "steps", 1),
        ("fedrecattack", "top", 2),
        ("fedrecattack", "rows", 2),
        ("pieck-uea", "mined", 2),
        ("pieck-uea", "rounds", 4),
        ("poisonfrs", "factor", 0.1),
        ("hidattack", "spread", 0.0),
        ("hidattack", "exploration", 1.0),
        ("collusion", "popular", 3),
        ("clusterattack", "n_clusters", 2),
    ],
)
def test_every_option_changes_what_is_sent(name: str, option: str, value: float) -> None:
    def sent(**options: Any) -> list[Tensor]:
        kind, public = ATTACKS[name], [torch.tensor([0, 1, 2]), torch.tensor([3, 5])]
        adversary, items, found = (
            kind(known(public=public), kind.Options(**options)),
            numbers("items", N_ITEMS, DIM),
            [],
        )
        for step in range(9):
            items = items + numbers(f"step {step}", N_ITEMS, DIM) * 0.3
            update = adversary.forge(replace(sight(), broadcast=cast(Any, SimpleNamespace(items=items))))
            found.append(changed(update))
        return found

    usual, other = sent(), sent(**{option: value})
    assert any(not torch.allclose(mine, theirs) for mine, theirs in zip(usual, other, strict=True))


def test_the_length_of_lists_is_that_of_the_scenario() -> None:
    dataset = load("synthetic:users=40,items=60,interactions_per_user=5")
    usual, short = (
        known_of(dataset, "popular", torch.tensor([1]), Scenario(list_length=n), seed=0).list_length for n in (0, 3)
    )
    assert (usual, short) == (round(dataset.train.n_interactions / dataset.n_users), 3)
    known_short = known_of(dataset, "random", torch.tensor([1]), Scenario(list_length=3), seed=0)
    assert all(each.size in (2, 3) for each in ATTACKS["random"](known_short).lists(5))  # a filler may be the target
