"""Client states that are made when their users first change them: a run with them is the run without, bit for bit."""

from __future__ import annotations

import gc
import resource
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs.test_run import run, small

from perfedrec import configure
from perfedrec.core import mapped
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.records import flatten
from perfedrec.data import load
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.runs import checkpoint
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.result import open_run
from perfedrec.runtimes import population
from perfedrec.runtimes.simulator import Simulator

METHODS = ["recommended", "paper", "fedmf", "fedrap", "gpfedrec"]


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client states and data as with many users: made late, in files."""
    monkeypatch.setattr(population, "LAZY_FROM", 0)
    monkeypatch.setattr(mapped, "IN_MEMORY", 0)
    monkeypatch.setattr(mapped, "SET_ASIDE", 0)


def played(preset: str, rounds: int) -> Simulator[Any, Any, Any]:
    chosen = configure(preset, overrides=["selection.n_clients_per_round=7", "model.embedding_dim=8"])
    dataset = load("synthetic:users=90,items=120,clusters=3,interactions_per_user=8")
    simulator: Simulator[Any, Any, Any] = Simulator(chosen.build(), dataset, seed=3, device="cpu")
    for _ in range(simulator.n_phases + rounds):
        simulator.play()
    return simulator


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("preset", METHODS)
def test_states_made_late_are_those_made_at_the_start(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late = played(preset, 4)
    users = torch.tensor([3, 80, 7, 0])
    some = late.recommender().raw_scores(users)
    stored = late.population.stored()
    monkeypatch.setattr(population, "LAZY_FROM", 1 << 40)
    early = played(preset, 4)
    for here, there in ((late.state, early.state), (late.population.client_state, early.population.client_state)):
        found, wanted = flatten(here)[0], flatten(there)[0]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert torch.equal(some, early.recommender().raw_scores(users))
    taken = early.population.client_state.participations.nonzero().squeeze(1)
    assert 0 < taken.numel() < 90
    assert torch.equal(stored[population.USERS_OF + "participations"], taken)
    assert torch.equal(stored["participations"], early.population.client_state.participations[taken])


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_a_resumed_run_equals_a_run_without_an_interruption(preset: str, tmp_path: Path) -> None:
    whole, broken, more = tmp_path / "whole", tmp_path / "broken", "selection.n_clients_per_round=9"
    run(small(preset, "run.rounds=8", more), output=whole)
    run(small(preset, "run.rounds=4", more), output=broken)
    run(small(preset, "run.rounds=8", more), output=broken, resume=RunFolder(broken).latest_checkpoint())
    for name in ("state", "memory"):
        file = f"model/{name}.safetensors"
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert (whole / "result.json").read_text() == (broken / "result.json").read_text()
    result, _ = open_run(whole)
    assert result.evaluate("test") == RunFolder(whole).summary().test


class InPlace(FedMF[Any, Any, Any]):
    """Counts its clients' rounds in a tensor that it has received."""

    def client(self, phase: str, broadcast: Any, rows: Any, client_state: Any, key: Any) -> Any:
        update, _ = super().client(phase, broadcast, rows, client_state, key)
        client_state.participations.add_(1)
        return update, client_state


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_states_changed_in_place_are_stored(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "LAZY_FROM", limit)
    dataset = load("synthetic:users=30,items=60,clusters=3,interactions_per_user=5")
    simulator: Simulator[Any, Any, Any] = Simulator(InPlace(), dataset, seed=0, device="cpu")
    for _ in range(3):
        simulator.play()
    assert simulator.population.client_state.participations.tolist() == [3] * 30


@pytest.mark.usefixtures("lazy")
def test_a_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    simulator = played("fedmf", 2)
    checkpoint.save(tmp_path / "round-000002", simulator.records(), {}, {})
    (segment,) = checkpoint.load(tmp_path / "round-000002").records["memory"][0]
    stored = segment.tensors
    assert stored["private"].shape[0] <= 14
    assert "secret" not in stored  # follows from the user's key
    again = played("fedmf", 0)
    again.population.restore(stored)
    for name, tensor in flatten(simulator.population.client_state)[0].items():
        assert torch.equal(tensor, flatten(again.population.client_state)[0][name])


def test_states_of_all_users_as_earlier_versions_stored_them_are_read() -> None:
    simulator = played("fedmf", 2)
    dense = dict(flatten(simulator.population.client_state)[0])
    dense["vectors"], dense["taken"] = dense.pop("private"), dense.pop("participations")
    again = played("fedmf", 0)
    again.population.restore(dense)
    assert torch.equal(again.population.client_state.private, dense["vectors"])
    assert torch.equal(again.population.client_state.participations, dense["taken"])
    with pytest.raises(CheckpointError, match=r"stored client states have private of \[3, 8\]"):
        again.population.restore({"private": torch.zeros(3, 8)})


def test_states_of_many_users_take_memory_where_they_are_written() -> None:
    """Two million users whose states would take 5 GB."""
    n = 2_000_000
    offsets = torch.arange(0, 2 * n + 1, 2)
    people: population.Population[Any] = population.Population(offsets, torch.zeros(2 * n, dtype=torch.int32), 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    people.init_clients(configure("fedmf").build(), seed=1)
    users = torch.tensor([5, 1_999_999])
    positions = people.rows(users)[1]
    state = people.load_client_states(users, positions)
    people.save_client_states(users, positions, state)
    assert people.stored()["rows"].shape == (4, 64)
    assert torch.equal(people.load_client_states(users.flip(0), positions).private, state.private.flip(0))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1 << 29


def test_room_that_the_system_does_not_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: Any, **more: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(population, "LAZY_FROM", 0)
    monkeypatch.setattr(mapped, "IN_MEMORY", 0)
    with monkeypatch.context() as patch:
        patch.setattr(mapped.mmap, "mmap", refused)
        with pytest.raises(ConfigError, match=r"no room for client states of 0 GB.*TMPDIR"):
            mapped.sparse(100, "client states")
        with pytest.raises(ConfigError, match=r"no room for data of 0\.0 GB"):
            played("fedmf", 0)
    disk = type("Disk", (), {"free": 100})
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(ConfigError, match="client states need 0 MB, and 0 MB are free there"):
        played("fedmf", 1)


def new_files(folder: Path) -> list[str]:
    """The files with client states of a checkpoint that no other checkpoint has."""
    return sorted(each.name for each in folder.glob("memory-*") if each.stat().st_nlink == 1)


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_a_checkpoint_writes_what_changed_since_the_last_one(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "LAZY_FROM", limit)
    simulator, folders = played("fedmf", 2), [tmp_path / name for name in ("one", "two", "three")]
    checkpoint.save(folders[0], simulator.records(), {}, {})
    assert new_files(folders[0]) == ["memory-0000.safetensors"]
    before = simulator.recommender().frozen()
    wanted = before.raw_scores(torch.arange(90))
    simulator.play()
    checkpoint.save(folders[1], simulator.records() | {"best": before.kept()["memory"]}, {}, {})
    assert new_files(folders[1]) == ["memory-0001.safetensors"]
    assert [each.name for each in folders[1].glob("best-*")] == ["best-0000.safetensors"]
    changed = checkpoint.load(folders[1]).records["memory"][0][1].tensors
    assert changed["private"].shape[0] == changed["users of private"].numel() == 7  # one cohort

    again = played("fedmf", 0)
    again.restore(checkpoint.load(folders[1]).records, 3)
    everyone, rows = torch.arange(90), torch.arange(again.population.items.numel())
    found, expected = (flatten(each.population.load_client_states(everyone, rows))[0] for each in (again, simulator))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(before.raw_scores(torch.arange(90)), wanted)  # the past has not changed
    folders[0].rename(tmp_path / "moved")
    checkpoint.save(folders[2], simulator.records(), {}, {})
    assert new_files(folders[2]) == []
    (folders[2] / "memory-0001.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"three/memory-0001\.safetensors: damaged checkpoint"):
        checkpoint.load(folders[2])


@pytest.mark.usefixtures("lazy")
def test_segments_that_are_mostly_overwritten_become_one() -> None:
    simulator = played("fedmf", 1)
    users = torch.arange(30)
    positions = simulator.population.rows(users)[1]
    numbers = []
    for number in range(1, 7):
        state = simulator.population.load_client_states(users, positions)
        changed = replace(state, loss=torch.full((30,), float(number)), rows=state.rows + 1)
        simulator.population.save_client_states(users, positions, changed)
        numbers.append(len(simulator.population.segments()))
    assert max(numbers) <= 4
    assert 1 in numbers[1:]
    again = played("fedmf", 0).population
    again.restore(simulator.population.segments())
    assert again.load_client_states(users, positions).loss.tolist() == [6.0] * 30


def test_where_nothing_changed_there_is_no_further_segment() -> None:
    people = played("fedmf", 1).population
    assert people.segments() == people.segments()
    assert len(people.segments()) == 1


def test_a_simulator_lets_go_of_what_only_rounds_need() -> None:
    simulator = played("recommended", 2)
    users, recommender = simulator.population.everyone(), simulator.recommender().frozen()
    scores = recommender.raw_scores(users)
    kept = (simulator.state.optimizer.items.first, simulator.population.client_state.rows)
    gone = [weakref.ref(each) for each in kept]
    del kept
    simulator.let_go()
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert torch.equal(recommender.raw_scores(users), scores)
    simulator.close()
