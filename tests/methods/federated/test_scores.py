"""The personal model: its parts, its weights, and what serves users who never took part."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.federated.toys import SEED, World, cluster_table, world

from perfedrec.core.keys import Key
from perfedrec.core.sampling import draw_outside
from perfedrec.core.types import Rows


def played(rounds: int = 5, **changes: Any) -> World:
    here = world(**changes)
    here.play(rounds + len(here.algorithm.phases))
    return here


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client__similarity": "cosine"},
        {"model__encoder": "spectral", "pretraining__kind": "spectral", "pretraining__cluster_passes": 1},
        {"attributes": True, "personal__learned": True},
        {"clusters__n_clusters": 0},
        {"model__n_layers": 0},
        {"pretraining__kind": "spectral", "personal__pretrained": 0.5},
        {"pretraining__kind": "spectral", "personal__pretrained": 0.5, "clusters__n_clusters": 0},
    ],
    ids=str,
)
def test_parts_sum_to_the_scores(changes: dict[str, Any]) -> None:
    here = played(**changes)
    block = here.block([5, 0, 22, 13])
    parts = here.algorithm.explain(*block)
    assert set(parts) - {"pretrained"} == {"local", "cluster", "global"}
    assert ("pretrained" in parts) == ("personal__pretrained" in changes)
    scores = here.algorithm.scores(*block)
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), scores, rtol=1e-5, atol=1e-6)
    assert scores.shape == (4, 24)


def test_scores_by_hand() -> None:
    """Weights 0.5, 0.3 and 0.2 on the local, the cluster's and the global model, each with its own tables."""
    here = played(
        personal__local=0.5, personal__cluster=0.3, personal__global=0.2, model__neighbours=False, clusters__start=0
    )
    broadcast, rows, client_state = here.block([5, 0, 22, 13])
    found = here.algorithm.scores(broadcast, rows, client_state)
    assert float(client_state.rows.abs().max()) > 1e-3
    for place in range(4):
        own = rows.items[rows.segments == place]
        weights = (own.numel() * broadcast.degrees[own]).rsqrt()
        group = int(broadcast.groups[place])
        cluster = here.state.items + here.state.offsets.view(3, 24, 6)[group]

        def user(table: torch.Tensor, place: int = place, weights: torch.Tensor = weights) -> torch.Tensor:
            return (client_state.private[place] + weights @ table) / 2

        local = user(cluster[own] + client_state.rows[rows.segments == place])
        expected = (
            0.5 * cluster @ local
            + 0.3 * cluster @ user(cluster[own])
            + 0.2 * here.state.items @ user(here.state.items[own])
        )
        torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"model__encoder": "spectral"}, {"client__similarity": "cosine"}], ids=str)
def test_training_and_recommending_use_the_same_propagation(changes: dict[str, Any]) -> None:
    """The training loss of a user who is served by one model alone equals the loss of the served scores."""
    here = played(
        clusters__n_clusters=0, personal__local=0.0, personal__cluster=0.0, personal__global=1.0,
        client__loss="softmax", client__temperature=1.0, **changes,
    )  # fmt: skip
    users = [5, 0, 22]
    broadcast, rows, client_state = here.block(users)
    scores = here.algorithm.scores(broadcast, rows, client_state)
    sent, after = here.train(users)
    for place in range(3):
        own = rows.items[rows.segments == place]
        mine = sent.items[sent.segments == place]
        negatives = [item for item in mine.tolist() if item not in own.tolist()]
        others = scores[place, negatives].exp().sum()
        loss = -(scores[place, own].exp() / (scores[place, own].exp() + others)).log().mean()
        assert float(after.loss[place]) == pytest.approx(float(loss), rel=1e-4)


def test_scores_of_one_user_do_not_depend_on_the_block() -> None:
    here = played()
    whole = here.scores()
    for user in (0, 7, 29):
        torch.testing.assert_close(here.algorithm.scores(*here.block([user]))[0], whole[user], rtol=1e-5, atol=1e-6)
    backwards = here.population.everyone().flip(0)
    torch.testing.assert_close(here.algorithm.scores(*here.block(backwards)).flip(0), whole, rtol=1e-5, atol=1e-6)


def test_users_who_never_took_part_have_a_personal_model() -> None:
    here = played(selection__n_clients_per_round=3)
    resting = (here.population.client_state.steps == 0).nonzero().squeeze(1)
    assert resting.numel() > 10
    scores = here.scores()[resting]
    assert bool(scores.isfinite().all())
    assert scores.unique(dim=0).shape[0] == resting.numel()
    parts = here.algorithm.explain(*here.block(resting))
    assert float((parts["cluster"] - parts["global"]).abs().max()) > 1e-4  # they have a cluster


def naive_mix(here: World, users: list[int], client_state: Any, rows: Rows, start: torch.Tensor) -> torch.Tensor:
    """One gradient step on BPR of the mixed scores; an own item is left out of the user vectors that it is scored
    against."""
    broadcast = here.algorithm.broadcast(here.state, torch.tensor(users))
    keys = Key(SEED).fold("mix").spread(rows.users)
    negatives, owners = draw_outside(rows, 24, rows.counts, keys)
    result = []
    for place in range(len(users)):
        own = rows.items[rows.segments == place].tolist()
        weights = {item: (len(own) * float(broadcast.degrees[item])) ** -0.5 / 2 for item in own}
        cluster = cluster_table(broadcast, int(broadcast.groups[place]))
        mine = dict(zip(own, client_state.rows[rows.segments == place], strict=True))
        mix = start[place].clone().requires_grad_()
        shares, loss = mix.softmax(0), torch.zeros(())
        for item, other in zip(own, negatives[owners == place].tolist(), strict=True):
            margin = torch.zeros(())
            for share, table, shift in (
                (shares[0], cluster, mine),
                (shares[1], cluster, {}),
                (shares[2], broadcast.items, {}),
            ):
                vector = client_state.private[place] / 2
                for each in own:
                    if each != item:
                        vector = vector + weights[each] * (table[each] + shift.get(each, 0))
                margin = margin + share * (vector @ (table[item] - table[other]))
            loss = loss - torch.nn.functional.logsigmoid(margin) / len(own)
        result.append(start[place] - torch.autograd.grad(loss, mix)[0])
    return torch.stack(result)


def test_learned_weights_take_a_step_on_the_clients_own_data() -> None:
    here = played(personal__learned=True, model__neighbours=False, model__init_scale=0.7)
    users = [5, 0, 22, 13]
    broadcast, rows, client_state = here.block(users)
    client_state = replace(client_state, mix=torch.tensor([[0.3, -0.2, 0.1, -20.0]]).repeat(4, 1))
    _, after = here.algorithm.client("train", broadcast, rows, client_state, Key(SEED))
    expected = naive_mix(here, users, after, rows, client_state.mix)
    torch.testing.assert_close(after.mix, expected, rtol=1e-4, atol=1e-6)
    assert float((after.mix - client_state.mix).abs().max()) > 1e-3


def test_without_learning_the_weights_do_not_change() -> None:
    here = played(personal__local=0.2, personal__cluster=0.3, personal__global=0.5)
    shares = here.population.client_state.mix.softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[0.2, 0.3, 0.5, 0.0]]).expand(30, 4))


@pytest.mark.parametrize("encoder", ["lightgcn", "spectral"])
def test_the_pretrained_model_recommends_alone_until_the_first_training_round(encoder: str) -> None:
    here = world(model__encoder=encoder, pretraining__kind="spectral", personal__pretrained=0.25)
    here.play(1)
    basis = here.state.pretrained.table
    broadcast, rows, client_state = here.block([5, 0, 22])
    degrees = broadcast.degrees
    alone = []
    for place in range(3):
        own = rows.items[rows.segments == place]
        vector = (own.numel() * degrees[own]).rsqrt() @ basis[own]
        alone.append((degrees.sqrt()[:, None] * basis) @ vector)
    torch.testing.assert_close(
        here.algorithm.scores(broadcast, rows, client_state), torch.stack(alone), rtol=1e-5, atol=1e-6
    )
    here.play(len(here.algorithm.phases) - 1 + 3)
    torch.testing.assert_close(here.state.pretrained.table, basis, rtol=0, atol=0)
    parts = here.algorithm.explain(*here.block([5, 0, 22]))
    shares = here.population.client_state.mix.softmax(1)[0]
    wide = parts["global"].std(dim=1, correction=0) * shares[3] / shares[2]
    for place in range(3):  # the same ranking, with a weight's share of the spread of the global model's scores
        assert float(parts["pretrained"][place].std(correction=0)) == pytest.approx(float(wide[place]), rel=1e-4)
        assert torch.corrcoef(torch.stack([parts["pretrained"][place], alone[place]]))[0, 1] > 0.9999
