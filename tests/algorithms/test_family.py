"""The federated baselines: pairs against whole rankings, blocks, bounds, and what they are special cases of."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from perfedrec import configure, load
from perfedrec.algorithms.federated import Federated
from perfedrec.algorithms.perfedrec import PerFedRec
from perfedrec.core.keys import Key
from perfedrec.core.records import copied
from perfedrec.core.types import block_rows, reduce
from perfedrec.runtimes.simulator import Simulator

DATA = "synthetic:users=80,items=100,clusters=2,interactions_per_user=10,seed=4"
FAMILY = ("pfedrec", "fedncf", "fedrap", "gpfedrec")


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
    view = algorithm.view(here.state, users)
    rows, positions = here.population.rows(users)
    memory = here.population.recall(users, positions)
    every = algorithm.scores(view, rows, memory)
    table = algorithm.table_rows(view, rows.items, rows.segments)
    dense = None if view.dense is None else view.dense.repeat(80, 1)
    pairs = algorithm.logits(memory.private, table, rows.segments, dense)
    torch.testing.assert_close(pairs, every[rows.segments, rows.items], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("block_size", [1, 7])
def test_blocks_change_nothing(name: str, block_size: int) -> None:
    whole, parts = simulator(name, 11), simulator(name, 11, block_size=block_size)
    for (key, one), other in zip(tensors(whole.state).items(), tensors(parts.state).values(), strict=True):
        # A network is multiplied in batches, whose kernels round by shape; all else is exact.
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4 if name == "fedncf" else 0, msg=key)


@pytest.mark.parametrize("name", [*FAMILY, "fedmf", "fedgnn"])
def test_the_bound_holds_for_every_number_that_leaves(name: str) -> None:
    here = simulator(name, 0, "privacy.clip=0.001")
    algorithm, users = here.algorithm, torch.arange(40)
    rows, positions = here.population.rows(users)
    sent, _ = algorithm.client(
        "train", algorithm.view(here.state, users), rows, here.population.recall(users, positions), Key(1)
    )
    for each in (sent.deltas, sent.dense, sent.reports):
        assert each is None or 0 < float(each.abs().max()) <= float(torch.tensor(0.001))
    assert reduce(sent, 100, algorithm.n_groups(here.state)).clients == 40


@pytest.mark.parametrize("name", FAMILY)
def test_a_client_depends_on_nobody_else(name: str) -> None:
    """Alone, and with others, a client hands over the same and keeps the same."""
    here = simulator(name, 11)
    algorithm, together = here.algorithm, torch.tensor([3, 5, 9])
    memory = copied(here.population.memory)
    work = []
    for users in (together, torch.tensor([5])):
        rows, positions = block_rows(here.population.offsets, here.population.items, users)
        kept = type(memory)(
            **{
                each.name: getattr(memory, each.name)[positions if each.metadata.get("per") == "row" else users]
                for each in fields(memory)
            }
        )
        work.append(algorithm.client("train", algorithm.view(here.state, users), rows, kept, Key(2)))
    (sent, _), (alone, _) = work
    mine = sent.segments == 1
    torch.testing.assert_close(sent.items[mine], alone.items)
    torch.testing.assert_close(sent.deltas[mine], alone.deltas, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["pfedrec", "fedncf", "fedrap"])
def test_secure_sums_give_the_same_tables(name: str) -> None:
    plain, summed = (simulator(name, 3, f"privacy.aggregation={how}") for how in ("sparse", "secure"))
    torch.testing.assert_close(plain.state.items, summed.state.items, rtol=0, atol=1e-5)


def test_users_of_a_taste_share_a_landmark() -> None:
    here = simulator("gpfedrec", 60, "selection.n_clients_per_round=80", "graph.n_landmarks=2")
    nearest = here.algorithm.view(here.state, torch.arange(80)).nearest
    assert 10 < int((nearest == 0).sum()) < 70
    assert float(here.state.offsets.abs().max()) > 0


def test_fedmf_is_perfedrec_with_everything_off() -> None:
    plain = configure(
        "perfedrec",
        overrides=["selection.n_clients_per_round=40", "server.averaging=0.98"],
        without=["clusters", "propagation", "neighbours", "personal"],
    )
    other = Simulator(PerFedRec(plain.settings), load(DATA), seed=3, device="cpu")  # type: ignore[arg-type]
    here = simulator("fedmf", 5)
    for _ in range(5):
        other.play()
    assert torch.equal(here.state.items, other.state.items)


def test_fedgnn_needs_its_neighbours() -> None:
    assert simulator("fedgnn").algorithm.prelude == ["join"]
    with pytest.raises(Exception, match="neighbours"):
        configure("fedgnn", overrides=["model.neighbours=false"])
    assert isinstance(simulator("fedncf").algorithm, Federated)
