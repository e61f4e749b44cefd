"""PTF-FedRec: one client and the hidden model against autograd, and who is sent which scores, by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.federated.test_family import simulator
from torch import Tensor

from perfedrec import configure
from perfedrec.core.aggregate import reduce
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER, Update
from perfedrec.methods.federated.ptf_fedrec import PTFState, swapped

SMALL = ("model.embedding_dim=6", "exchange.n_received=4")
ALL = ("exchange.least_share=1", "exchange.swapped=0")


def client(here: Any, users: Tensor, **changes: Tensor) -> tuple[Update, Any, Any]:
    rows, positions = here.population.rows(users)
    state = replace(here.population.load_client_states(users, positions), **changes)
    broadcast = here.algorithm.broadcast(here.state, users)
    return *here.algorithm.client("train", broadcast, rows, state, Key(1)), broadcast


def test_a_client_against_autograd() -> None:
    """Two local steps on hard labels and on the server's scores as soft labels; then all scores are sent."""
    here = simulator("ptf_fedrec", 6, *SMALL, *ALL, "client.local_steps=2", "client.user_learning_rate=0.05")
    rate = here.algorithm.settings.client.learning_rate
    users = here.population.offsets.diff().argmax()[None]
    rows, _ = here.population.rows(users)
    vector = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    kept = torch.randn(rows.items.numel(), 6, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(1, 6)
    given = {"private": vector, "rows": kept, "first": zero, "second": zero, "steps": torch.tensor([0])}
    sent, after, broadcast = client(here, users, **given)

    first = here.algorithm.table_rows(broadcast, torch.arange(here.population.n_items), users[:0])
    apart = first[sent.items].clone()
    assert sent.items[: kept.shape[0]].tolist() == rows.items.tolist()
    apart[: kept.shape[0]] += kept
    apart.requires_grad_()
    own = vector[0].clone().requires_grad_()
    targets = (torch.arange(sent.items.numel()) < kept.shape[0]).float()
    soft, scores = broadcast.sent[0], broadcast.scores[0]
    others = ~torch.isin(soft, rows.items)
    assert soft.numel() == 4
    assert bool(others.any())
    private, public = torch.optim.Adam([own], lr=0.05), torch.optim.SGD([apart], lr=rate)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    for _ in range(2):
        loss = entropy(apart @ own, targets, reduction="sum")
        loss = loss + entropy(first[soft[others]] @ own, scores[others], reduction="sum")
        private.zero_grad()
        public.zero_grad()
        loss.backward()
        private.step()
        public.step()
    torch.testing.assert_close(after.private[0], own.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(after.rows, (apart - first[sent.items])[: kept.shape[0]].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sent.deltas[:, 0], (apart @ own).sigmoid().detach() - 0.5, rtol=0, atol=1e-5)


def dense_lightgcn(edges: Tensor, users: Tensor, items: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """``edges`` [n, m] are weights; a node's degree is the sum of its weights."""
    degrees = edges.sum(1, keepdim=True) * edges.sum(0)
    graph = torch.where(edges > 0, edges / degrees.clamp(min=1e-9).sqrt(), 0.0)
    layers = [(users, items)]
    for _ in range(n_layers):
        layers.append((graph @ layers[-1][1], graph.T @ layers[-1][0]))
    return sum(each[0] for each in layers) / (n_layers + 1), sum(each[1] for each in layers) / (n_layers + 1)


def test_the_hidden_model_against_autograd() -> None:
    """Two rounds, in which one user sends twice: its new scores replace the old ones in the graph."""
    options = ("server.steps=2", "server.learning_rate=0.05", "server.n_layers=2")
    algorithm, state = (here := simulator("ptf_fedrec", 0, *SMALL, *options)).algorithm, here.state
    m = here.population.n_items
    uploads = [{0: {3: 0.9, 5: 0.2}, 1: {3: 0.7, 4: 0.8}}, {1: {6: 0.6, 3: 0.1}, 2: {5: 1.0}}]
    users, items = (each.clone().requires_grad_() for each in (state.users, state.items))
    adam, known = torch.optim.Adam([users, items], lr=0.05), torch.zeros(80, m)
    for number, round_ in enumerate(uploads):
        cohort = torch.tensor(list(round_))
        pairs = [(place, item, score) for place, scores in enumerate(round_.values()) for item, score in scores.items()]
        places, those, scores = (torch.tensor(each) for each in zip(*pairs, strict=True))
        groups = torch.arange(cohort.numel())
        update = Update(cohort, groups, torch.ones(cohort.numel()), places, those, scores[:, None] - 0.5)
        state = replace(state, cohort=cohort)
        state = algorithm.server(state, "train", reduce(update, m, cohort.numel()), Key(number))
        known[cohort] = 0
        known[cohort[places], those] = scores
        for _ in range(2):
            final = dense_lightgcn(known * (known > 0.5), users, items, 2)
            logits = (final[0] @ final[1].T)[cohort[places], those]
            adam.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(logits, scores).backward()
            adam.step()
    assert state.uploads.tolist() == [3, 5, m + 3, m + 6, 2 * m + 5]
    torch.testing.assert_close(state.scores, torch.tensor([0.9, 0.2, 0.1, 0.6, 1.0]), rtol=0, atol=1e-6)
    assert state.counts[:8].tolist() == [0, 0, 0, 3, 1, 2, 1, 0]
    torch.testing.assert_close(state.users, users.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(state.items, items.detach(), rtol=0, atol=1e-4)
    final = dense_lightgcn(known * (known > 0.5), users.detach(), items.detach(), 2)
    expected = (final[0] @ final[1].T).sigmoid()
    served = algorithm.broadcast(algorithm.serving(state), torch.tensor([2, 7, NEWCOMER]))
    torch.testing.assert_close(served.scores[:2], expected[[2, 7]], rtol=0, atol=1e-4)
    torch.testing.assert_close(served.scores[2], (final[0].mean(0) @ final[1].T).sigmoid(), rtol=0, atol=1e-4)


def test_half_of_what_a_client_receives_is_frequent_and_half_scores_high() -> None:
    """Six items. User 0 has sent item 5, which is the most frequent and the best; user 1 all items but item 2."""
    algorithm = simulator("ptf_fedrec", 0, *SMALL).algorithm
    uploads = torch.tensor([5, 6, 7, 9, 10, 11])
    state = PTFState(
        **dict.fromkeys(("users", "first", "second", "final", "scores", "cohort", "items")),
        round=1, n_users=3, steps=2, uploads=uploads, counts=torch.tensor([0, 7, 2, 7, 1, 9]),
    )  # fmt: skip
    scores = torch.tensor([[0.8, 0.1, 0.6, 0.9, 0.7, 0.99]]).repeat(3, 1)
    sent = algorithm.sent(state, torch.tensor([0, 1, 2]), scores)
    assert sent.tolist() == [[1, 3, 0, 4], [2, -1, -1, -1], [5, 1, 3, 0]]
    assert algorithm.sent(replace(state, steps=0), torch.tensor([0, 1, 2]), scores).shape == (3, 0)


def test_the_highest_scores_are_swapped() -> None:
    """Client 0 sends four items and swaps two; client 1 sends one item and two negatives and swaps one; client 2 has no
    negative to swap with."""
    segments = torch.tensor([0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 1])
    positive = torch.arange(11) < 6
    scores = torch.tensor([0.9, 0.7, 0.8, 0.6, 0.95, 0.85, 0.1, 0.3, 0.2, 0.05, 0.15])
    expected = [0.3, 0.7, 0.2, 0.6, 0.15, 0.85, 0.1, 0.9, 0.8, 0.05, 0.95]
    assert swapped(scores, segments, positive, 0.5, 3).tolist() == torch.tensor(expected).tolist()
    assert torch.equal(swapped(scores, segments, positive, 0.0, 3), scores)


def test_a_client_sends_a_share_of_its_items_and_as_many_negatives() -> None:
    here = simulator("ptf_fedrec", 0, *SMALL, "exchange.least_share=0.25", "exchange.swapped=0")
    users = torch.arange(80)
    rows, _ = here.population.rows(users)
    sent, *_ = client(here, users)
    own = torch.isin(sent.segments * 1000 + sent.items, rows.segments * 1000 + rows.items)
    items, negatives = (torch.bincount(sent.segments[which], minlength=80) for which in (own, ~own))
    assert torch.equal(items, negatives)
    assert bool((items >= (rows.counts * 0.25).floor().clamp(min=1)).all())
    assert bool((items <= rows.counts).all())
    assert 0.55 < float((items / rows.counts).mean()) < 0.7  # uniform on 0.25 to 1
    every, *_ = client(simulator("ptf_fedrec", 0, *SMALL, *ALL), users)
    assert torch.equal(torch.bincount(every.segments), 2 * rows.counts)


def test_no_parameter_is_sent_and_scores_are_few() -> None:
    here = simulator("ptf_fedrec", 3, *SMALL, *ALL)
    broadcast = here.algorithm.broadcast(here.state, here.state.cohort)
    assert broadcast.items.shape == (here.population.n_items, 0)
    rows, _ = here.population.rows(here.state.cohort)
    report = here.play()
    assert report.bytes_down == 40 * 4 * (4 + 4)
    assert report.bytes_up == 40 * 8 + 2 * rows.items.numel() * (4 + 4)


def test_a_client_beyond_its_participations_sends_nothing() -> None:
    here = simulator("ptf_fedrec", 0, *SMALL, "selection.max_participations=2")
    sent, *_ = client(here, torch.tensor([0, 1]), participations=torch.tensor([1, 2]))
    assert sent.segments.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("profile", "why"), [("secure", "trains its server on the scores of single users"), ("private", "does not fit")]
)
def test_sums_are_refused(profile: str, why: str) -> None:
    with pytest.raises(Exception, match=rf"ptf_fedrec.* {why}|{why} ptf_fedrec"):
        configure("ptf_fedrec", privacy=profile)
    assert configure("ptf_fedrec", privacy="paper").build().settings.privacy.noise_scale == 0.1
