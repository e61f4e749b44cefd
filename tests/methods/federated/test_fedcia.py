"""FedCIA: the mean of the clients' item similarity matrices, dense and client by client, and what is sent of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.federated.test_family import simulator
from tests.methods.federated.toys import population
from torch import Tensor

from perfedrec.core.aggregate import reduce
from perfedrec.core.keys import Key
from perfedrec.core.records import copied
from perfedrec.core.types import Spec
from perfedrec.methods.federated.fedcia import FedCIA, FedCIASettings, factor
from perfedrec.methods.federated.fedmf import FedMF


def one_round(weight: float, n_users: int = 7, dim: int = 8) -> tuple[list[Tensor], Tensor]:
    """Each client's whole table in a round, and the table after it. Every item is trained by
    somebody, and the changes of seven clients, who take one step, span fewer than eight directions."""
    users = population(n_users)
    algorithm = FedCIA(
        FedCIASettings(
            model={"embedding_dim": dim, "init_scale": 0.5},
            client={"learning_rate": 0.4, "loss": "softmax", "n_negatives": 12},
            server={"optimizer": "fedavg", "learning_rate": 1.0},
            collaborative={"weight": weight},
            selection={"n_clients_per_round": n_users},
        )
    )
    state = algorithm.init(Spec(n_users, 24, torch.ones(24)), Key(0))
    rows, _ = users.rows(torch.arange(n_users))
    clients = algorithm.init_clients(rows, Key(1))
    sent, _ = algorithm.client("train", algorithm.broadcast(state, rows.users), rows, clients, Key(2))
    before, tables = state.items.clone(), []
    for user in range(n_users):
        mine = (sent.segments == user) & (sent.tables == 0)
        tables.append(before.index_add(0, sent.items[mine], sent.deltas[mine]))
    total = reduce(sent, 24, algorithm.n_groups(state))
    assert total.keys.numel() == 48
    return tables, algorithm.server(copied(state), "train", total, Key(3)).items


def nearest(matrix: Tensor, rank: int) -> Tensor:
    """The matrix of this rank that is nearest to a symmetric one."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T


def test_the_table_is_the_factor_of_the_mean_similarity_matrix() -> None:
    tables, after = one_round(1.0)
    mean = torch.stack([each.double() @ each.T.double() for each in tables]).mean(0)
    torch.testing.assert_close((after @ after.T).double(), nearest(mean, 8), rtol=0, atol=1e-3)
    vectors = torch.stack(tables).mean(0)
    assert (vectors @ vectors.T - mean).norm() > 0.05 * mean.norm()  # the mean of the vectors is something else


def test_the_factor_is_turned_to_the_mean_of_the_vectors() -> None:
    """No rotation of the table is nearer to it."""
    tables, after = one_round(1.0)
    target, generator = torch.stack(tables).mean(0), torch.Generator().manual_seed(0)
    for _ in range(20):
        turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        small = torch.linalg.matrix_exp(0.05 * (turn - turn.T))
        assert (after @ small - target).norm() > (after - target).norm()


def test_without_weight_it_is_the_mean_of_the_vectors() -> None:
    tables, after = one_round(0.0)
    torch.testing.assert_close(after, torch.stack(tables).mean(0), rtol=0, atol=1e-5)
    here = simulator("fedcia", 4, "collaborative.weight=0")
    options = ("model.init_scale", "client.learning_rate", "client.user_learning_rate", "client.local_steps")
    options += ("server.learning_rate", "server.averaging", "client.loss")
    same = [f"{each}={_option(here.algorithm.settings, each)}" for each in options]
    there = simulator("fedmf", 4, *same)
    assert isinstance(there.algorithm, FedMF)
    torch.testing.assert_close(here.state.items, there.state.items, rtol=0, atol=1e-4)


def _option(settings: object, name: str) -> object:
    section, _, option = name.partition(".")
    return getattr(getattr(settings, section), option)


def test_the_factor_of_two_orthogonal_parts_by_hand() -> None:
    """Of three directions with lengths 3, 2 and 1 the two longest are kept, and (0, 2) and (3, 0) stay where they
    were."""
    vectors = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = factor(vectors, torch.tensor([[0.0], [0.0], [2.0]]))
    torch.testing.assert_close(found @ found.T, torch.diag(torch.tensor([9.0, 0.0, 4.0])), rtol=0, atol=1e-5)
    assert float(found[0, 0]) == pytest.approx(3, abs=1e-5)


def test_what_is_sent_follows_from_the_changes() -> None:
    """The second half of an upload is a function of the first half and of the table that everybody knows."""
    here = simulator("fedcia", 2)
    users = torch.tensor([3, 8])
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    sent, _ = here.algorithm.client("train", here.algorithm.broadcast(here.state, users), rows, client_state, Key(1))
    half = sent.items.numel() // 2
    assert torch.equal(sent.items[:half], sent.items[half:])
    for place in range(2):
        mine = sent.segments[:half] == place
        deltas, columns = sent.deltas[:half][mine], here.state.items[sent.items[:half][mine]]
        torch.testing.assert_close(sent.deltas[half:][mine], deltas @ (deltas.T @ columns), rtol=1e-4, atol=1e-6)
    sizes = replace(sent, tables=None).upload_bytes()
    assert sizes.sum() == 2 * 8 + 2 * half * (4 + 4 * 64)


def test_secure_sums_give_the_same_table() -> None:
    plain, summed = (
        simulator("fedcia", 3, f"privacy.aggregation={how}", "privacy.rank=0") for how in ("sparse", "secure")
    )
    torch.testing.assert_close(plain.state.items, summed.state.items, rtol=0, atol=1e-3)


def test_it_trains_in_a_basis_of_few_columns() -> None:
    """Where sums are opened in a basis, the similarities are those of items' parts in it: the matrix of which a factor
    is taken stays symmetric and has no negative values."""
    given = ("privacy.aggregation=secure", "selection.n_clients_per_round=80", "privacy.min_contributors=2")
    here, averaged = (simulator("fedcia", 20, *given, f"collaborative.weight={weight}") for weight in (1, 0))
    assert bool(here.state.items.isfinite().all())
    assert not torch.allclose(here.state.items, averaged.state.items, atol=1e-3)
