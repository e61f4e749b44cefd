"""Rounds on workers are those of one process, bit for bit, whoever dies; here with a stand-in for Ray."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tests.runtimes.eager_ray import Actor, EagerRay
from torch import Tensor

from perfedrec import configure
from perfedrec.core.aggregate import Aggregate
from perfedrec.core.errors import ConfigError, DivergedError, PerfedrecError
from perfedrec.core.extras import MissingExtraError
from perfedrec.core.records import flatten
from perfedrec.core.types import RoundReport
from perfedrec.data import Dataset, load
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.runtimes import cluster, log, population
from perfedrec.runtimes.cluster import Machines
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.remote import shards
from perfedrec.runtimes.simulator import Simulator

ROUNDS = 3
OPTIONS = ["selection.n_clients_per_round=23", "model.embedding_dim=6"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("synthetic:users=90,items=120,clusters=3,interactions_per_user=8")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> EagerRay:
    made = EagerRay()
    monkeypatch.setattr(cluster, "loaded", lambda: made)
    monkeypatch.setattr(cluster, "connect", lambda ray, machines: True)
    return made


Outcome = tuple[list[RoundReport], dict[str, Tensor]]


def simulator(method: Any, data: Dataset, workers: int, **options: Any) -> Simulator[Any, Any, Any]:
    if isinstance(method, str):
        method = configure(method, overrides=OPTIONS).build()
    made: Simulator[Any, Any, Any] = Simulator(method, data, seed=3, device="cpu", **options)
    if workers:
        made.spread(Machines(workers, block_size=options.get("block_size", 1024)))
    return made


def tensors(made: Simulator[Any, Any, Any]) -> dict[str, Tensor]:
    states = flatten(made.population.client_state)[0]
    return flatten(made.state)[0] | {f"client {name}": each for name, each in states.items()}


def played(made: Simulator[Any, Any, Any], rounds: int = ROUNDS) -> Outcome:
    reports = [made.play() for _ in range(made.n_phases + rounds)]
    return reports, tensors(made)


def assert_same(found: Outcome, wanted: Outcome) -> None:
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    assert [name for name, each in wanted[1].items() if not torch.equal(found[1][name], each)] == []


class InOrder:
    """Compares clients, by their order: the change of a client counts half of that of the next one."""

    separate = True

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        total = empty
        for part in parts:
            total = Aggregate(**{**vars(total), "sums": (total.sums / 2).round()}) + part
        return total


class Ordered(FedMF[Any, Any, Any]):
    aggregator = InOrder()


class InPlace(FedMF[Any, Any, Any]):
    """Counts its clients' rounds in a tensor that it has received."""

    def client(self, phase: str, broadcast: Any, rows: Any, client_state: Any, key: Any) -> Any:
        update, _ = super().client(phase, broadcast, rows, client_state, key)
        client_state.participations.add_(1)
        return update, client_state


@pytest.mark.parametrize("method", ["recommended", "paper", "gpfedrec", "fastpfrec", Ordered, InPlace])
def test_workers_play_the_rounds_of_one_process(method: Any, data: Dataset, eager: EagerRay) -> None:
    def made(workers: int, **options: Any) -> Simulator[Any, Any, Any]:
        return simulator(method if isinstance(method, str) else method(), data, workers, **options)

    wanted = played(made(0))
    assert wanted[0][-1].loss is not None
    for workers in (1, 2, 4):
        assert_same(played(made(workers, block_size=7 if workers == 2 else 1024)), wanted)


@pytest.mark.parametrize("users_per_node", [1, 7])
def test_bytes_of_a_secure_round_with_drop_outs_are_counted_alike(
    users_per_node: int, data: Dataset, eager: EagerRay
) -> None:
    method = configure("fedmf", privacy="secure", overrides=[*OPTIONS, "privacy.min_clients=2"]).build()
    options = {"users_per_node": users_per_node, "dropout_rate": 0.2}
    wanted = played(simulator(method, data, 0, **options))
    assert wanted[0][-1].bytes_up > 0
    assert_same(played(simulator(method, data, 3, **options)), wanted)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", ["play", "add", "load", "written", "replay", "write"])
def test_what_a_dead_worker_did_is_done_again(
    call: str, moment: str, workers: int, data: Dataset, eager: EagerRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of all calls kills the worker that gets it; of those that only new workers get, the first one, after a
    worker died in the fourth round. The states are copied before the third round."""
    if (call, workers) == ("add", 1):
        pytest.skip("one sum is not added up")
    monkeypatch.setattr(cluster, "PIECE", 7)
    method = configure("fedmf", overrides=OPTIONS).build()
    wanted, made = played(simulator(method, data, 0), 5), simulator(method, data, workers)
    deaths = [["play", 4 * workers], [call, 1]] if call in ("replay", "write") else [[call, 3]]
    n = len(deaths)

    def kills(actor: Actor, name: str) -> str:
        if not deaths or name != deaths[0][0]:
            return ""
        deaths[0][1] -= 1
        return moment if not deaths[0][1] and deaths.pop(0) else ""

    eager.kills, reports = kills, list[RoundReport]()
    for number in range(made.n_phases + 5):
        made.recommender().raw_scores(torch.tensor([3, 80, 7, 0, 45]))
        if number == 2:
            made.records()
        reports.append(made.play())
    assert_same((reports, tensors(made)), wanted)
    assert deaths == []
    assert len(eager.actors) == workers + n


IN_GROUPS = [
    *("privacy.aggregation=secure", "privacy.norm=l2", "privacy.clip=0.5", "privacy.rank=4", "privacy.min_clients=4"),
    *("defence.rule=trimmed-mean", "defence.groups=5", "defence.row_clip=0.3"),
]


@pytest.mark.parametrize("kind", ["clients", "groups"])
def test_rules_compare_the_same_parts_where_workers_die(kind: str, data: Dataset, eager: EagerRay) -> None:
    """A rule over groups has five requests in a round; a worker dies in the third one of the last round."""
    method = Ordered() if kind == "clients" else configure("fedmf", overrides=[*OPTIONS, *IN_GROUPS]).build()
    wanted, made, calls = played(simulator(method, data, 0)), simulator(method, data, 2), 0

    def kills(actor: Actor, name: str) -> str:
        nonlocal calls
        mine = name == "play" and actor is eager.actors[1]
        calls += mine
        return "after" if mine and calls == due else ""

    reports = [made.play() for _ in range(made.n_phases + ROUNDS - 1)]
    eager.kills, due = kills, 3 if kind == "groups" else 1
    reports.append(made.play())
    assert_same((reports, tensors(made)), wanted)
    assert len(eager.actors) == 3


def test_workers_that_die_again_and_again_end_the_run(data: Dataset, eager: EagerRay) -> None:
    made = simulator("fedmf", data, 4)
    made.play()
    dying = eager.actors[2]
    eager.kills = lambda actor, name: "before" if name == "play" and actor in (dying, *eager.actors[4:]) else ""
    with pytest.raises(PerfedrecError, match=r"round 2: a worker has died 3 times \(.*\); expected workers that stay"):
        made.play()


def test_all_workers_may_die_at_once(data: Dataset, eager: EagerRay) -> None:
    wanted, made = played(simulator("fedmf", data, 0)), simulator("fedmf", data, 4)
    reports = []
    for _ in range(ROUNDS):
        reports.append(made.play())
        for each in eager.actors:
            each.dead = True
    assert_same((reports, tensors(made)), wanted)
    assert len(eager.actors) == 4 * (1 + ROUNDS)


@pytest.mark.parametrize("lazy_from", [0, 1 << 40])
def test_states_are_copied_where_the_log_is_long_and_each_changed_one_once(
    lazy_from: int, data: Dataset, eager: EagerRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "LAZY_FROM", lazy_from)
    monkeypatch.setattr(log, "LOG_REQUESTS", 3)
    asked = list[str]()
    eager.kills = lambda actor, name: asked.append(name) or ""
    wanted, made = played(simulator("fedmf", data, 0), 9), simulator("fedmf", data, 2)
    reports = [made.play() for _ in range(3)]
    assert asked.count("written") == 0
    reports.append(made.play())
    assert asked.count("written") == 2  # before the fourth request, one of each worker
    reports += [made.play() for _ in range(4)]
    assert asked.count("written") == 4
    first = made.records()["memory"]
    assert asked.count("written") == 6
    assert made.records()["memory"] == first
    assert asked.count("written") == 6  # nothing has changed
    reports.append(made.play())
    *before, last = made.records()["memory"]
    assert tuple(before) == first
    assert last.tensors["loss"].numel() == 23  # those of the cohort alone
    assert_same((reports, tensors(made)), wanted)
    assert asked.count("play") == 2 * 9


def test_a_log_is_as_long_as_its_broadcasts_are_small(
    data: Dataset, eager: EagerRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = simulator("fedmf", data, 2)
    made.play()
    size = made.clients._log.requests[0].size  # type: ignore[attr-defined]
    assert size >= made.state.items.nbytes
    monkeypatch.setattr(log, "LOG_BYTES", 2 * size)
    made.play()
    assert len(made.clients._log.requests) == 2  # type: ignore[attr-defined]
    made.play()
    assert len(made.clients._log.requests) == 1  # type: ignore[attr-defined]


class Diverging(FedMF[Any, Any, Any]):
    def client(self, phase: str, broadcast: Any, rows: Any, client_state: Any, key: Any) -> Any:
        update, after = super().client(phase, broadcast, rows, client_state, key)
        update.deltas.fill_(torch.nan)
        return update, after


def test_an_error_of_a_worker_is_that_of_one_process(data: Dataset, eager: EagerRay) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        simulator(Diverging(), data, 2).play()
    assert len(eager.actors) == 2  # nobody was replaced


@pytest.mark.parametrize("lazy_from", [0, 1 << 40])
def test_a_checkpoint_is_resumed_with_another_number_of_workers(
    lazy_from: int, data: Dataset, eager: EagerRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "LAZY_FROM", lazy_from)
    whole = simulator("fedmf", data, 0)
    for _ in range(whole.n_phases + ROUNDS):
        whole.play()
    stored, wanted = whole.population.stored(), tensors(whole)
    for before, after in ((0, 2), (2, 4), (4, 1), (2, 0)):
        first = simulator("fedmf", data, before)
        first.play()
        records = {
            name: (flatten(each)[0], flatten(each)[1]) if name == "state" else (each, {})
            for name, each in first.records().items()
        }
        second = simulator("fedmf", data, after)
        second.restore(records, 1)
        second.play()
        second.play()
        again = second.population.stored()
        assert_same(([], tensors(second)), ([], wanted))
        assert again.keys() == stored.keys()
        assert all(torch.equal(again[name], each) for name, each in stored.items())


def test_the_model_ranks_alike(data: Dataset, eager: EagerRay) -> None:
    one, many = simulator("recommended", data, 0), simulator("recommended", data, 3)
    played(one, 1)
    played(many, 1)
    users = torch.tensor([88, 3, 45, 4])
    wanted = one.recommender().raw_scores(users)
    assert torch.equal(many.recommender().raw_scores(users), wanted)
    nobody = users[:0]
    assert many.population.load_client_states(nobody, nobody).private.shape[0] == 0
    kept = many.recommender().frozen()
    copy = weakref.ref(many.clients.copy.client_state.rows)
    many.let_go()
    gc.collect()
    assert copy() is None
    assert torch.equal(kept.raw_scores(users), wanted)
    many.close()
    assert torch.equal(kept.raw_scores(users), wanted)


def people(counts: list[int]) -> Population[Any]:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Population(offsets, torch.zeros(int(offsets[-1]), dtype=torch.int64), 1)


def test_shards_have_about_the_same_number_of_interactions() -> None:
    cut = [each.tolist() for each in shards(people([1, 1, 1, 1, 4, 4]), 3)]
    assert cut == [[0, 1, 2, 3], [4], [5]]
    assert [each.tolist() for each in shards(people([9, 1, 1]), 3)] == [[0], [1], [2]]
    assert [each.tolist() for each in shards(people([1, 1, 9]), 3)] == [[0], [1], [2]]


def test_a_node_is_not_parted() -> None:
    nodes = torch.tensor([0, 0, 0, 1, 1, 2])
    assert [each.tolist() for each in shards(people([1] * 6), 2, nodes)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match=r"run\.workers is 4, and the data have 3 nodes"):
        shards(people([1] * 6), 4, nodes)
    with pytest.raises(ConfigError, match=r"run\.workers is 7, and the data have 6 users"):
        shards(people([1] * 6), 7)


def test_ray_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"run\.workers needs the extra simulation"):
        configure("fedmf", overrides=["run.workers=2"]).check_here()


def test_a_cluster_that_cannot_be_reached_is_named(data: Dataset) -> None:
    made = simulator("fedmf", data, 0)
    with pytest.raises(ConfigError, match=r"run\.cluster 127\.0\.0\.1:1: cannot be reached"):
        made.spread(Machines(2, "127.0.0.1:1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.cluster=here"], r"HOST:PORT, as in 10\.0\.0\.1:6379"),
        (["run.cluster=10.0.0.1:6379"], r"run\.cluster has use for workers; expected run\.workers"),
        (["algorithm=mf", "run.workers=2"], "mf is centralised: it has no clients"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("mf" if "algorithm=mf" in options else "fedmf", overrides=options)
