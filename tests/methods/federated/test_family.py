"""The federated baselines: pairs against whole rankings, blocks, bounds, and special cases of each other."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.methods.federated.toys import protected
from torch import Tensor

from perfedrec import configure, load
from perfedrec.core.aggregate import FIXED_POINT, Aggregate, from_fixed, reduce
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.records import copied
from perfedrec.core.types import block_rows
from perfedrec.methods.federated.base import Federated
from perfedrec.methods.federated.fastpfrec import averaged
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.phases import JOIN
from perfedrec.methods.federated.settings import FederatedSettings
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.runtimes.simulator import Simulator

DATA = "synthetic:users=80,items=100,clusters=2,interactions_per_user=10,seed=4"
FAMILY = ("pfedrec", "fedncf", "fedrap", "gpfedrec", "fedca", "cofedrec", "colr", "pfedclr")
MATRIX_PRODUCTS = ("fedncf", "fedca", "cofedrec", "fedcia", "colr", "ptf_fedrec")
"""Methods with products whose kernels round depending on the shape; all else is exact."""


def simulator(name: str, rounds: int = 0, *overrides: str, block_size: int = 1024) -> Simulator:
    config = configure(name, overrides=["selection.n_clients_per_round=40", *overrides])
    here = Simulator(config.build(), load(DATA), seed=3, device="cpu", block_size=block_size)
    for _ in range(rounds):
        here.play()
    return here


def tensors(record: Any) -> dict[str, Tensor]:
    return {
        each.name: getattr(record, each.name)
        for each in fields(record)
        if isinstance(getattr(record, each.name), Tensor)
    }


@pytest.mark.parametrize("name", FAMILY)
def test_pairs_are_scored_as_in_the_ranking(name: str) -> None:
    here = simulator(name, 12)
    algorithm, users = here.algorithm, torch.arange(80)
    broadcast = algorithm.broadcast(here.state, users)
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    every = algorithm.scores(broadcast, rows, client_state)
    table = algorithm.table_rows(broadcast, rows.items, rows.segments)
    dense = None if broadcast.dense is None else broadcast.dense.repeat(80, 1)
    pairs = algorithm.logits(client_state.private, table, rows.segments, dense)
    torch.testing.assert_close(pairs, every[rows.segments, rows.items], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILY, "fastpfrec", "fedcia", "ptf_fedrec"])
@pytest.mark.parametrize("block_size", [1, 7])
def test_block_size_changes_nothing(name: str, block_size: int) -> None:
    whole, parts = simulator(name, 11), simulator(name, 11, block_size=block_size)
    for (key, one), other in zip(tensors(whole.state).items(), tensors(parts.state).values(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4 if name in MATRIX_PRODUCTS else 0, msg=key)


@pytest.mark.parametrize("name", [*FAMILY, "fedmf", "fedgnn", "fastpfrec", "fedcia", "ptf_fedrec"])
def test_the_bound_holds_for_every_number_that_is_sent(name: str) -> None:
    here = simulator(name, 0, "privacy.clip=0.001")
    algorithm, users = here.algorithm, torch.arange(40)
    for _ in range(len(algorithm.phases) + 1):
        here.play()
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    sent, _ = protected(algorithm, "train", algorithm.broadcast(here.state, users), rows, client_state, Key(1))
    for each in (sent.deltas, sent.dense, sent.reports):
        assert each is None or 0 < float(each.abs().max()) <= float(torch.tensor(0.001))
    assert reduce(sent, 100, algorithm.n_groups(here.state)).clients == 40


@pytest.mark.parametrize("name", [*FAMILY, "ptf_fedrec"])
def test_a_client_does_not_depend_on_other_clients(name: str) -> None:
    """Alone and together with others, a client sends the same update and has the same client state."""
    here = simulator(name, 11)
    algorithm, together = here.algorithm, torch.tensor([3, 5, 9])
    client_state = copied(here.population.client_state)
    work = []
    for users in (together, torch.tensor([5])):
        rows, positions = block_rows(here.population.offsets, here.population.items, users)
        kept = type(client_state)(
            **{
                each.name: getattr(client_state, each.name)[positions if each.metadata.get("per") == "row" else users]
                for each in fields(client_state)
            }
        )
        work.append(algorithm.client("train", algorithm.broadcast(here.state, users), rows, kept, Key(2)))
    (sent, _), (alone, _) = work
    mine = sent.segments == 1
    torch.testing.assert_close(sent.items[mine], alone.items)
    torch.testing.assert_close(sent.deltas[mine], alone.deltas, rtol=0, atol=1e-4)


def test_fedrap_keeps_shared_and_personal_vectors_apart() -> None:
    """One local step of one client against autograd with shared and personal vectors as separate leaves."""
    weights = {"apart": 0.5, "sparsity": 0.1, "learning_rate": 0.1, "warm_up": 2.0}
    given = [f"additive.{name}={value}" for name, value in weights.items()]
    here = simulator("fedrap", 0, "client.local_steps=1", "client.learning_rate=0.5", "model.embedding_dim=6", *given)
    users = here.population.offsets.diff().argmax()[None]
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    personal = torch.randn(client_state.rows.shape, generator=torch.Generator().manual_seed(1))
    personal[::2] *= 0.1  # less than 1 from the shared ones, and more
    client_state = replace(client_state, rows=personal, participations=torch.tensor([3]))
    sent, after = here.algorithm.client(
        "train", here.algorithm.broadcast(here.state, users), rows, client_state, Key(1)
    )

    own = sent.items[: rows.items.numel()].tolist()
    assert own == rows.items.tolist()
    shared = here.state.items[sent.items].clone().requires_grad_()
    apart = torch.cat([personal, torch.zeros(sent.items.numel() - len(own), 6)]).requires_grad_()
    scores = (shared + apart) @ client_state.private[0]
    signs = torch.tensor([-1.0] * len(own) + [1.0] * (sent.items.numel() - len(own)))
    ranked = torch.nn.functional.softplus(signs * scores).sum()
    squares = (apart - shared).square().sum(1)
    far = squares >= 1
    assert 0 < int(far[: len(own)].sum()) < len(own)
    kept = weights["sparsity"] * shared.abs().sum() - weights["apart"] * squares[~far].sum()
    kept = kept * torch.tanh(torch.tensor(1.5))
    of_shared, of_personal = torch.autograd.grad(kept, [shared, apart])
    (pairs,) = torch.autograd.grad(ranked, shared)
    step = -0.5 * (pairs + of_shared + 0.1 * of_personal)
    torch.testing.assert_close(sent.deltas, step, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.rows, personal + 0.1 * step[: len(own)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_the_served_table_is_the_average_of_the_rounds(name: str) -> None:
    """The initial vectors are in the average from the start, and each round has a share of ``1 - averaging``."""
    here, tables = simulator(name, 0, "server.averaging=0.75"), []
    expected = here.state.items.clone()
    for _ in range(4):
        here.play()
        expected = 0.75 * expected + 0.25 * here.state.items
        tables.append(here.algorithm.serving(here.state).items)
        torch.testing.assert_close(tables[-1], expected, rtol=0, atol=1e-5)
    plain = simulator(name, 4, "server.averaging=0")
    assert torch.equal(plain.algorithm.serving(plain.state).items, plain.state.items)
    torch.testing.assert_close(plain.state.items, here.state.items, rtol=0, atol=0)  # what is trained does not change


@pytest.mark.parametrize("name", FAMILY)
def test_clients_can_be_weighted_by_their_interactions(name: str) -> None:
    here = simulator(name, 0, "server.weighting=interactions")
    rows, positions = here.population.rows(torch.arange(80))
    client_state, broadcast = (
        here.population.load_client_states(torch.arange(80), positions),
        here.algorithm.broadcast(here.state, rows.users),
    )
    sent, _ = here.algorithm.client("train", broadcast, rows, client_state, Key(1))
    assert torch.equal(sent.weights, rows.counts.to(torch.float32))
    with pytest.raises(Exception, match=r"server\.weighting = uniform"):
        configure(name, overrides=["server.weighting=interactions", "privacy.aggregation=secure"])


@pytest.mark.parametrize("name", ["pfedrec", "fedncf", "fedrap", "colr", "pfedclr"])
def test_secure_sums_give_the_same_tables(name: str) -> None:
    plain, summed = (simulator(name, 3, f"privacy.aggregation={how}", "privacy.rank=0") for how in ("sparse", "secure"))
    torch.testing.assert_close(plain.state.items, summed.state.items, rtol=0, atol=1e-5)


def test_users_of_the_same_taste_share_a_landmark() -> None:
    here = simulator("gpfedrec", 60, "selection.n_clients_per_round=80", "graph.n_landmarks=2")
    nearest = here.algorithm.broadcast(here.state, torch.arange(80)).weights.argmax(1)
    assert 10 < int((nearest == 0).sum()) < 70
    assert float(here.state.offsets.abs().max()) > 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("fedca", each) for each in ("n_landmarks=3", "every=4", "similarity=2", "complementarity=2")),
        *(("fedca", each) for each in ("n_directions=1", "learning_rate=0.9", "own=0")),
        *(("cofedrec", each) for each in ("n_categories=2", "every=2", "learning_rate=0.9", "contrast=0")),
        *(("cofedrec", each) for each in ("temperature=1", "n_contrasted=4")),
        ("fedcia", "weight=0.5"),
    ],
)
def test_each_option_changes_the_scores(name: str, change: str) -> None:
    section = {"fedca": "composite", "cofedrec": "cocluster", "fedcia": "collaborative"}[name]
    base = ("model.embedding_dim=8", *(("composite.every=2",) if name == "fedca" else ()))
    scores = [
        simulator(name, 6, *given).recommender().raw_scores(torch.arange(80))
        for given in (base, (*base, f"{section}.{change}"))
    ]
    assert not torch.allclose(*scores, rtol=1e-3, atol=1e-6)


def test_several_tables_under_sums_are_refused() -> None:
    class Two(Federated):
        logits = all_scores = None  # type: ignore[assignment]  # nothing is played

        def n_tables(self) -> int:
            return 2

    assert Two().n_groups(None) == 2
    with pytest.raises(ConfigError, match="sparse"):
        Two(FederatedSettings(privacy=PrivacySettings(aggregation="secure")))


def test_fedmf_is_perfedrec_with_everything_off() -> None:
    theirs = configure("fedmf")
    options = {"model": ("init_scale",), "client": ("user_learning_rate",), "server": ("learning_rate", "averaging")}
    same = [f"{part}.{name}={getattr(getattr(theirs, part), name)}" for part in options for name in options[part]]
    plain = configure(
        "perfedrec",
        overrides=["selection.n_clients_per_round=40", *same],
        without=["clusters", "propagation", "neighbours", "personal"],
    )
    other = Simulator(PerFedRec(plain.settings), load(DATA), seed=3, device="cpu")  # type: ignore[arg-type]
    here = simulator("fedmf", 5)
    for _ in range(5):
        other.play()
    assert torch.equal(here.state.items, other.state.items)


def test_fedgnn_needs_its_neighbours() -> None:
    assert simulator("fedgnn").algorithm.phases == (JOIN,)
    with pytest.raises(Exception, match="neighbours"):
        configure("fedgnn", overrides=["model.neighbours=false"])
    assert isinstance(simulator("fedncf").algorithm, Federated)


def nodes(changes: list[tuple[int, int, list[float]]], clients: list[int]) -> Aggregate:
    """Sums by (node, item) for tables of 10 items; ``clients`` is the number of clients of each node."""
    empty = Aggregate.empty(10, len(clients), 2)
    keys = torch.tensor([node * 10 + item for node, item, _ in changes])
    sums = torch.tensor([values for *_, values in changes], dtype=torch.float64) * FIXED_POINT
    weights = torch.tensor(clients, dtype=torch.float64) * FIXED_POINT
    return replace(empty, clients=sum(clients), keys=keys, sums=sums, weights=weights)


def test_nodes_have_equal_weight_and_outliers_are_left_out() -> None:
    """Node means are (2, 0), (0, 2), (2, 2) over sqrt(2) in length and (40, 0); a fifth node received no update."""
    honest = [(0, 3, [8.0, 0.0]), (1, 4, [0.0, 2.0]), (2, 3, [3.0, 3.0])]
    result = averaged(nodes([*honest, (3, 7, [40.0, 0.0])], [4, 1, 2, 1, 0]), 3.5)
    assert result.keys.tolist() == [3, 4]
    torch.testing.assert_close(from_fixed(result.sums), torch.tensor([[3.5 / 3, 0.5], [0.0, 2 / 3]]))
    assert from_fixed(result.weights).tolist() == [1.0]
    everybody = averaged(nodes([*honest, (3, 7, [40.0, 0.0])], [4, 1, 2, 1, 0]), 1e6)
    assert everybody.keys.tolist() == [3, 4, 7]


def test_a_poisoned_node_has_no_effect() -> None:
    """Clients of one node send changes a hundred times as large: the tables are those without the node."""
    small = ("client.learning_rate=10", "client.local_steps=2")  # so that no other node is an outlier
    given = ("nodes.n_nodes=8", "selection.n_clients_per_round=80", "pretraining.kind=none", *small)
    here = simulator("fastpfrec", 0, *given)
    here.play()
    algorithm, users = here.algorithm, torch.arange(80)
    broadcast = algorithm.broadcast(here.state, users)
    rows, positions = here.population.rows(users)
    sent, _ = algorithm.client("train", broadcast, rows, here.population.load_client_states(users, positions), Key(1))
    bad = users[sent.segments] % 8 == 5
    poisoned = replace(sent, deltas=torch.where(bad[:, None], 100 * sent.deltas, sent.deltas))
    without = replace(
        sent, segments=sent.segments[~bad], items=sent.items[~bad], deltas=sent.deltas[~bad],
        weights=torch.where(users % 8 == 5, 0.0, sent.weights),
    )  # fmt: skip
    before, tables = copied(here.state), []
    for each in (poisoned, without, sent):
        total = algorithm.aggregator.combine("train", [reduce(each, 100, 8)], reduce(each, 100, 8))
        state = algorithm.server(copied(before), "train", total, Key(2))
        tables.append(state.items)
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-6)
    assert not torch.allclose(tables[1], tables[2], atol=1e-3)
