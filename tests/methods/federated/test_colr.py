"""CoLR: the client that trains ``A``, the server's ``(sum A) B``, bytes, and the case without a restriction."""

from dataclasses import replace
from math import prod

import pytest
import torch
from tests.methods.federated.test_family import DATA, simulator
from torch import Tensor

from perfedrec import Federated, configure, load
from perfedrec.core.aggregate import reduce
from perfedrec.core.keys import Key
from perfedrec.methods.federated.colr import CoLR
from perfedrec.nn.segments import dot
from perfedrec.runtimes.simulator import Simulator

SMALL = ("model.embedding_dim=6", "update.rank=2")


class Plain(Federated):
    """``p_u . q_i`` without any restriction."""

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(private[segments], rows)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return private @ items.T


def test_a_client_trains_and_sends_the_left_factor() -> None:
    """Three local steps against autograd with ``A`` [m, r] as a parameter of its own."""
    rates = ("client.local_steps=3", "client.learning_rate=0.7", "client.user_learning_rate=0.05")
    here = simulator("colr", 2, *SMALL, *rates)
    users = here.population.offsets.diff().argmax()[None]
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    client_state = replace(client_state, first=torch.zeros(1, 6), second=torch.zeros(1, 6), steps=torch.tensor([0]))
    broadcast = here.algorithm.broadcast(here.state, users)
    sent, after = here.algorithm.client("train", broadcast, rows, client_state, Key(1))

    left, directions = torch.zeros(99, 2, requires_grad=True), broadcast.directions
    vector = client_state.private[0].clone().requires_grad_()
    signs = torch.where(torch.arange(sent.items.numel()) < rows.items.numel(), -1.0, 1.0)
    private, shared = torch.optim.Adam([vector], lr=0.05), torch.optim.SGD([left], lr=0.7)
    for _ in range(3):
        table = here.state.items + left @ directions
        loss = torch.nn.functional.softplus(signs * (table[sent.items] @ vector)).sum()
        private.zero_grad()
        shared.zero_grad()
        loss.backward()
        private.step()
        shared.step()
    assert sent.deltas.shape == (sent.items.numel(), 2)
    torch.testing.assert_close(sent.deltas, left.detach()[sent.items], rtol=0, atol=1e-5)
    torch.testing.assert_close(after.private[0], vector.detach(), rtol=0, atol=1e-5)


def test_the_server_adds_the_mean_of_the_left_factors_times_the_directions() -> None:
    here = simulator("colr", 1, *SMALL, "server.optimizer=fedavg", "server.learning_rate=1", "server.averaging=0")
    algorithm, state, users = here.algorithm, here.state, torch.arange(40)
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    sent, _ = algorithm.client("train", algorithm.broadcast(state, users), rows, client_state, Key(1))
    left = torch.zeros(99, 2).index_add_(0, sent.items, sent.deltas)
    expected = state.items + left / 40 @ state.directions
    directions = state.directions.clone()
    after = algorithm.server(state, "train", reduce(sent, 99, 1), Key(2))
    torch.testing.assert_close(after.items, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(after.directions, directions, atol=0.1)  # each round has its own
    torch.testing.assert_close(after.directions @ after.directions.T, torch.eye(2), rtol=0, atol=1e-6)


def test_as_many_directions_as_dimensions_restrict_nothing() -> None:
    full = simulator("colr", 3, "model.embedding_dim=6", "update.rank=6")
    settings = {name: getattr(full.algorithm.settings, name) for name in ("model", "client", "server", "selection")}
    plain = Simulator(Plain(Plain.Options(**settings)), load(DATA), seed=3, device="cpu")
    for _ in range(3):
        plain.play()
    torch.testing.assert_close(full.state.items, plain.state.items, rtol=0, atol=1e-4)
    assert not torch.allclose(simulator("colr", 3, *SMALL).state.items, plain.state.items, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ((), None),
        (("privacy.aggregation=secure", "privacy.rank=0"), (99, 2, 8)),
        (("privacy.aggregation=secure", "privacy.rank=3"), (3, 2, 8)),
    ],
    ids=["rows", "secure", "secure in a basis"],
)
def test_uploads_have_the_numbers_of_the_left_factor(
    options: tuple[str, ...], numbers: tuple[int, int, int] | None
) -> None:
    here = simulator("colr", 0, *SMALL, "selection.n_clients_per_round=80", *options)
    for _ in here.algorithm.phases:
        here.play()
    report = here.play()
    if numbers is None:  # a positive and a negative for each interaction: an index and two numbers each
        assert report.bytes_up == 80 * 8 + 2 * here.population.items.numel() * (4 + 2 * 4)
    else:
        assert report.bytes_up == 80 * (8 + prod(numbers))
    assert bool(here.state.items.isfinite().all())


def test_a_rank_above_the_dimension_is_refused() -> None:
    with pytest.raises(Exception, match=r"expected update\.rank of at most model\.embedding_dim"):
        configure("colr", overrides=["model.embedding_dim=8", "update.rank=9"])
    assert CoLR().settings.update.rank == 16
