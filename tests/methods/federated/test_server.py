"""What the server computes from the sums: the global table, cluster models, neighbour sums."""

import itertools
from typing import Any

import pytest
import torch
from tests.methods.federated.toys import SEED, World, cluster_table, world

from perfedrec.core.aggregate import Aggregate, reduce
from perfedrec.core.keys import Key
from perfedrec.core.records import copied
from perfedrec.core.types import Update

PLAIN: dict[str, Any] = {
    "server__optimizer": "fedavg",
    "server__learning_rate": 0.5,
    "model__neighbours": False,
    "clusters__start": 1,
    "clusters__every": 1,
    "clusters__learning_rate": 0.2,
}


def clustered(**changes: Any) -> World:
    """A world that has just been clustered, in which each cluster has members."""
    here = world(**PLAIN | changes)
    here.play(1)
    here.state = copied(here.state)
    assert here.state.clusters.labels is not None
    assert here.state.clusters.labels.unique().numel() == 3
    return here


def learn(here: World, update: Update) -> None:
    aggregate = reduce(update, here.population.n_items, here.algorithm.n_groups(here.state))
    here.state = here.algorithm.server(copied(here.state), "train", aggregate, Key(0))


def test_global_and_cluster_tables_by_hand() -> None:
    here = clustered()
    before = copied(here.state)
    update = Update(
        users=torch.tensor([0, 1, 2]),
        groups=torch.tensor([2, 2, 0]),
        weights=torch.tensor([1.0, 3.0, 4.0]),
        segments=torch.tensor([0, 1, 1, 2]),
        items=torch.tensor([5, 5, 7, 7]),
        deltas=torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(4, 6),
    )
    learn(here, update)
    change = (here.state.items - before.items)[:, 0]
    expected = torch.zeros(24)
    expected[5], expected[7] = 0.5 * (1 + 3 * 2) / 8, 0.5 * (3 * 3 + 4 * 4) / 8
    torch.testing.assert_close(change, expected)
    offsets = (here.state.offsets - before.offsets).view(3, 24, 6)[:, :, 0]
    expected = torch.zeros(3, 24)
    expected[2, 5], expected[2, 7] = 0.1 * (1 + 3 * 2) / 4, 0.1 * 3 * 3 / 4  # 0.5 of the server x 0.2 of the clusters
    expected[0, 7] = 0.1 * 4
    torch.testing.assert_close(offsets, expected)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_a_cluster_without_members_in_a_round_keeps_its_model(optimizer: str) -> None:
    here = clustered(server__optimizer=optimizer)
    here.play(2)
    before = copied(here.state)
    members = (here.state.clusters.labels != 1).nonzero().squeeze(1)
    broadcast, rows, client_state = here.block(members)
    update, _ = here.algorithm.client("train", broadcast, rows, client_state, Key(SEED))
    learn(here, update)
    old, new = before.offsets.view(3, 24, 6), here.state.offsets.view(3, 24, 6)
    assert torch.equal(new[1], old[1])
    for group in (0, 2):
        touched = update.items[update.groups[update.segments] == group].unique()
        moved = (new[group] != old[group]).any(1).nonzero().squeeze(1)
        assert moved.tolist() == touched.tolist()
    touched = update.items.unique()
    assert (here.state.items != before.items).any(1).nonzero().squeeze(1).tolist() == touched.tolist()


def test_a_clients_model_is_that_of_its_cluster() -> None:
    here = clustered()
    here.play(3)
    broadcast, rows, client_state = here.block([3, 8, 20])
    for place, group in enumerate(broadcast.groups.tolist()):
        assert group == int(here.state.clusters.labels[rows.users[place]])
        table = here.state.items + here.state.offsets[group * 24 : (group + 1) * 24]
        assert torch.equal(cluster_table(broadcast, group), table)
    other = copied(here.state)
    other.offsets.view(3, 24, 6)[[group for group in range(3) if group != broadcast.groups[0]]] += 1
    changed = here.algorithm.scores(here.algorithm.broadcast(other, rows.users), rows, client_state)
    assert torch.equal(changed[0], here.algorithm.scores(broadcast, rows, client_state)[0])


def test_every_user_has_a_cluster_that_depends_only_on_its_taste() -> None:
    """Users who have not been in a cohort are clustered by what they reported in the phase "join"."""
    here = world(
        clusters__n_clusters=2, clusters__start=1, selection__n_clients_per_round=2, pretraining__kind="spectral"
    )
    here.play(4 + 1)  # three passes, the phase "join", one round
    assert here.state.clusters.labels.shape == (30,)
    assert bool((here.state.service.reports.abs().sum((1, 2)) > 0).all())


def test_a_round_without_answers() -> None:
    here = clustered()
    before = copied(here.state)
    here.state = here.algorithm.server(here.state, "train", Aggregate.empty(24, 3), Key(0))
    assert torch.equal(here.state.items, before.items)
    assert torch.equal(here.state.offsets, before.offsets)
    assert here.state.round == before.round + 1


def test_neighbour_sums_are_in_the_order_of_items() -> None:
    """Without protection the published sums are those of the users' own data, item by item."""
    here = world(clusters__n_clusters=0, model__refresh_every=1, model__n_layers=2)
    here.play(1)
    rows, _ = here.population.rows(here.population.everyone())
    degrees = torch.bincount(rows.items, minlength=24).float()
    matrix = torch.zeros(30, 24)
    matrix[rows.segments, rows.items] = (rows.counts[rows.segments] * degrees[rows.items]).rsqrt()
    vectors = here.population.client_state.private
    first, second = matrix.T @ vectors, matrix.T @ (matrix @ here.state.items)
    expected = torch.stack([first, first + second]) / 3
    torch.testing.assert_close(here.state.neighbours, expected, rtol=1e-5, atol=1e-6)


def test_neighbour_sums_are_refreshed_when_they_are_due() -> None:
    here = world(model__refresh_every=3, clusters__n_clusters=0)
    seen = []
    for _ in range(8):
        here.play(1)
        seen.append(here.state.neighbours.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    # after joining (round 0), then after the 3rd and the 6th round of training
    assert changed == [False, False, True, False, False, True, False]


def test_clusters_are_made_when_they_are_due() -> None:
    here = world(clusters__start=2, clusters__stop=6, clusters__every=2, model__neighbours=False)
    made = []
    for _ in range(9):
        before = here.state.clusters.centroids
        here.play(1)
        made.append(here.state.clusters.centroids is not before)
    assert made == [False, True, False, True, False, True, False, False, False]


def test_the_served_table_is_the_average_of_all_rounds() -> None:
    here = world(server__averaging=0.7, clusters__n_clusters=0, model__neighbours=False)
    naive = here.state.items.clone()
    for _ in range(5):
        here.play(1)
        naive = 0.7 * naive + 0.3 * here.state.items
    torch.testing.assert_close(here.algorithm.serving(here.state).items, naive, rtol=1e-5, atol=1e-6)
    assert float((naive - here.state.items).abs().max()) > 1e-3
    plain = world(clusters__n_clusters=0, model__neighbours=False)
    assert torch.equal(plain.algorithm.serving(plain.state).items, plain.state.items)


@pytest.mark.parametrize("weighting", ["uniform", "interactions"])
def test_fedavg_of_everybody_is_one_step_on_the_mean_loss(weighting: str) -> None:
    """Server rate 1 and one local step: gradient descent on the weighted mean of the clients' losses."""
    here = world(
        **PLAIN
        | {"server__learning_rate": 1.0, "clusters__n_clusters": 0, "client__learning_rate": 0.3}
        | {"server__weighting": weighting, "selection__n_clients_per_round": 30}
    )
    before, everyone = here.state.items.clone(), here.population.everyone()
    broadcast, rows, client_state = here.block(everyone)
    key = Key(SEED).fold("round", 0).fold("client")
    sent, _ = here.algorithm.client("train", broadcast, rows, client_state, key)
    items = before.double().requires_grad_()
    degrees, losses, weights = here.state.degrees, [], []
    for user in range(30):
        own = rows.items[rows.segments == user]
        mine = sent.items[sent.segments == user]
        negatives = [item for item in mine.tolist() if item not in own.tolist()]
        vector = client_state.private[user].double() / 2
        for item in own.tolist():
            vector = vector + items[item] / (own.numel() * float(degrees[item])) ** 0.5 / 2
        losses.append(
            sum(
                -torch.log(torch.sigmoid((vector * (items[i] - items[j])).sum()))
                for i, j in zip(own.tolist(), [j for j in mine.tolist() if j in negatives], strict=True)
            )
        )
        weights.append(own.numel() if weighting == "interactions" else 1)
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    (gradient,) = torch.autograd.grad(mean, items)
    here.play(1)
    torch.testing.assert_close(here.state.items.double(), before.double() - 0.3 * gradient, rtol=1e-5, atol=1e-6)
    assert float(gradient.abs().max()) > 1e-2
