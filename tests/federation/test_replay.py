"""A coordinator that has kept what nodes sent makes its run again without a user or a node: over a grid in memory, with
nodes' real files, and compared with the simulator."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.grid import MemoryGrid
from tests.ports import reserved_port
from torch import Tensor
from typer.testing import CliRunner

from perfedrec import Node, __version__
from perfedrec.cli import app
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.data import Catalogue, read_catalogue
from perfedrec.federation import local
from perfedrec.federation.agreement import build
from perfedrec.federation.certificates import make_key
from perfedrec.federation.coordinator import Deployment, Terms, serve
from perfedrec.federation.hosts import Hosts
from perfedrec.federation.parts import Part, Parts
from perfedrec.federation.replay import Replay, going_on
from perfedrec.federation.requests import accept, forget_node, make
from perfedrec.federation.run import FederatedRun
from perfedrec.forgetting.resum import resum
from perfedrec.runs import config
from perfedrec.runs.config import open_data
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.forget_log import Limits, Log
from perfedrec.runs.progress import Quiet
from perfedrec.runs.summary import Summary
from perfedrec.runs.training import train
from perfedrec.runtimes.flower import Coordinator, Federation, NodeApp
from perfedrec.runtimes.flower.node_loop import answer
from perfedrec.runtimes.node import Store

SIZES, NAME, SECRET = (1, 4, 7), "a run", bytes(range(32))
SMALL = ["model.embedding_dim=4", "selection.n_clients_per_round=6", "evaluation.hold_out=none"]
DATA = f"data.path=synthetic:users={sum(SIZES)},items=40,interactions_per_user=8,clusters=2"
ALL = Limits(share=1.0)


class World:
    """Nodes with users, and coordinators for them; user 0 is alone on the node n0."""

    def __init__(self, folder: Path, method: str = "fedmf", *options: str) -> None:
        self.folder = folder
        given = config.load(method, None, [DATA, *SMALL, *options], run__rounds=5, run__evaluate_every=5)
        self.dataset = open_data(given.data)
        self.catalogue = Catalogue.of(self.dataset, False)
        local.deal_out(folder, self.dataset, self.catalogue, local.parted(self.dataset.train, SIZES), SECRET)
        self.stores = {place: Store.open(folder / f"n{place}" / "store.db") for place in range(len(SIZES))}
        seed = self.stores[0].join_run(given.build(), NAME)
        self.config = given.model_copy(update={"run": given.run.model_copy(update={"seed": seed})})
        for place in self.stores:
            make_key(folder / "keys" / f"n{place}")

    def play(self, output: Path, rounds: int = 5, resume: bool = False) -> FederatedRun:
        """Be the coordinator of a run until it has played a number of rounds."""
        run = self.config.run.model_copy(update={"rounds": rounds})
        chosen = self.config.model_copy(update={"run": run})
        federated = FederatedRun(chosen, chosen.build(), self.catalogue, RunFolder(output), NAME, resume)
        apps = {
            place: partial(answer, NodeApp(store, build, __version__).app()) for place, store in self.stores.items()
        }
        names = {place: f"n{place}" for place in apps}
        federation = Federation(
            federated.algorithm,
            self.dataset.n_items,
            run.seed,
            federated.setup,
            deadline=0.0,
            keeper=federated.keeper(names),
        )
        coordinator = Coordinator(MemoryGrid(apps), federation, names, federated.users)
        least = sum(store.n_users for store in self.stores.values())
        directory = coordinator.assemble(len(apps), least, 0.0, lambda line: None)
        federated.begin(coordinator, directory.identities)
        while not federated.progress.over:
            federated.play(coordinator, names, pytest.fail)
        federated.finish([names[each] for each in coordinator.hand_out(federated.best)])
        return federated

    @cached_property
    def run(self) -> Path:
        """The folder of a run of five rounds with kept parts."""
        self.play(self.folder / "run")
        return self.folder / "run"


KEEP = "run.keep_uploads=true"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, "fedmf", KEEP)


def trained(folder: Path) -> dict[str, Tensor]:
    """What training has made of the state after the last round."""
    loaded = RunFolder(folder).newest_checkpoint({})
    assert loaded is not None
    found: dict[str, Tensor] = loaded.records["state"][0]
    return found


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in mine.items())


def test_the_run_without_a_user_is_that_of_the_simulator_and_goes_on_with_the_nodes(
    world: World, tmp_path: Path
) -> None:
    node = Node.open(tmp_path / "n0" / "store.db")
    run, sim = world.run, tmp_path / "simulated"
    result = train(world.config, world.dataset, output=sim)
    recommender: Any = result.recommender
    assert torch.equal(recommender.state.items, world.play(run, resume=True).best.items)
    user = node.users()[0]
    make(node, user, tmp_path / "keys" / "n0").write(tmp_path / "ask")
    node.forget(user)
    world.stores.pop(0)
    found = accept(run, tmp_path / "ask", tmp_path / "keys", ALL, replay=tmp_path / "new")
    left = world.dataset.without_users([user])
    expected = resum(world.config.build(), left, world.config.run, sim, recommender, 5, 0).recommender
    assert torch.equal(expected.state.items, world.play(tmp_path / "new", resume=True).best.items)
    assert not torch.equal(expected.state.items, recommender.state.items)
    took_part = int(recommender.records()["memory"]["participations"][0])
    assert 0 < took_part < 5
    assert f"{took_part} of {took_part + 10} were left out" in found.done[2]
    assert "other users" not in found.done[2]
    assert [line["event"] for line in Log(tmp_path / "new").lines()] == ["accepted", "replayed"]
    make_key(tmp_path / "operator")
    with pytest.raises(ConfigError, match="this run was made without user 0; expected the run that it was made of"):
        accept(tmp_path / "new", tmp_path / "ask", tmp_path / "keys", ALL, signer=tmp_path / "operator")
    new = tmp_path / "new"
    options = {"output": new, "catalogue": new / "items.txt", "min-nodes": 2, "rounds": 6}
    assert going_on(new, 0.05) == options
    assert read_catalogue(new / "items.txt").fingerprint == world.catalogue.fingerprint
    again = world.play(tmp_path / "new", rounds=7, resume=True)
    assert len(again.folder.history()) == 7
    assert again.selection.best_round == 7
    # The run that went on is made of its parts as well, and so the next user can leave it.
    assert Replay(tmp_path / "new", tmp_path / "next").without(lambda part: False, torch.tensor([0])).left_out == 0
    assert same(trained(tmp_path / "next"), trained(tmp_path / "new"))


@pytest.mark.parametrize("method", ["fedncf", "gpfedrec"])
def test_methods_with_networks_and_with_reports_of_users_are_summed_again(method: str, tmp_path: Path) -> None:
    world = World(tmp_path, method, KEEP)
    found = Replay(world.run, tmp_path / "new").without(lambda part: part.node == "n0", torch.tensor([0]))
    assert 0 < found.left_out < found.parts
    world.stores.pop(0)
    assert len(world.play(tmp_path / "new", rounds=6, resume=True).folder.history()) == 6
    assert not same(trained(tmp_path / "new"), trained(world.run))


def test_a_node_sends_one_part_for_all_its_users(world: World, tmp_path: Path) -> None:
    run, store = world.run, tmp_path / "n1" / "store.db"
    node = Node.open(store)
    user = node.users()[0]
    make(node, user, tmp_path / "keys" / "n1").write(tmp_path / "ask")
    with_user = [part for number in range(5) for part in Parts(run).round(number) if bool((part.users == 1).any())]
    assert {part.node for part in with_user} == {"n1"}
    others = sum(part.users.numel() - 1 for part in with_user)
    make(node, user, tmp_path / "keys" / "n2").write(tmp_path / "forged")
    with pytest.raises(ConfigError, match=r"node n2 has signed the request, and user 1 of run .* is on node n1"):
        accept(run, tmp_path / "forged", tmp_path / "keys", ALL, replay=tmp_path / "user")
    assert not (tmp_path / "user").exists()
    found = accept(run, tmp_path / "ask", tmp_path / "keys", ALL, replay=tmp_path / "user")
    assert f"{len(with_user)} of " in found.done[2]
    assert f"other users of the same nodes were in these {others} times" in found.done[2]
    kept = [part for number in range(5) for part in Parts(tmp_path / "user").round(number)]
    assert not any(bool((part.users == 1).any()) for part in kept)
    # The user is left out of later runs of the log as well, here with the whole of another node.
    whole = forget_node(run, "n2", tmp_path / "node", ALL)
    assert whole.users == [str(each) for each in range(5, 12)]
    left = [part for number in range(5) for part in Parts(tmp_path / "node").round(number)]
    assert {part.node for part in left} <= {"n0", "n1"}
    assert not any(bool((part.users == 1).any()) for part in left)
    assert (run / "forgotten-node-n2.json").exists()
    words = ["federation", "forget", run, "--node", "n2", "--replay", tmp_path / "cli", "--max-share", "1"]
    given = CliRunner().invoke(app, [str(each) for each in words])
    assert given.exit_code == 0, given.output
    goes_on = f"--catalogue {tmp_path / 'cli' / 'items.txt'} --min-nodes 2 --rounds 6 --nodes KEYS"
    assert goes_on in given.stderr + given.stdout
    used = CliRunner().invoke(app, [str(each) for each in words])
    assert "is not empty; expected a new folder\n" in used.stderr
    Hosts(run).add({"n0": torch.tensor([0]), "n1": torch.arange(1, 5)})
    assert Hosts(run).nodes() == ["n0", "n1"]
    assert Hosts(run).nodes({0, 1}) == ["n1"]
    with pytest.raises(ConfigError, match="has no part of node n7; expected one of n0, n1, n2"):
        forget_node(run, "n7", tmp_path / "other", ALL)
    with pytest.raises(ConfigError, match="would be forgotten; expected at most 1"):
        forget_node(run, "n2", tmp_path / "other", Limits(share=0.1))
    assert not (tmp_path / "other").exists()


def test_parts_that_are_not_those_of_the_run_are_refused(world: World, tmp_path: Path) -> None:
    run, new = world.run, tmp_path / "new"
    path = next(iter((run / "uploads").iterdir()))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match="summed again it is another model"):
        Replay(run, new).without(lambda part: False, torch.tensor([0]))
    path.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="damaged record of a node's part"):
        Replay(run, new).without(lambda part: False, torch.tensor([0]))
    assert not new.exists()
    path.write_bytes(content)
    new.mkdir()
    (new / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        Replay(run, new)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("fedmf", [], "no parts of nodes were kept"),
        ("fedmf", ["privacy.aggregation=secure", "privacy.clip=0.5", "privacy.min_clients=2"], "nobody has parts"),
        ("recommended", [KEEP], "neighbourhood service"),
    ],
)
def test_runs_that_cannot_be_summed_again_are_refused(
    method: str, options: list[str], said: str, tmp_path: Path
) -> None:
    given = config.load(method, None, [*SMALL, *options])
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.write_settings(given)
    folder.write_name(NAME)
    with pytest.raises((ConfigError, CheckpointError), match=said):
        Replay(folder.path, tmp_path / "new")
    (folder.path / "name").unlink()
    with pytest.raises(CheckpointError, match="not a coordinator's run"):
        Replay(folder.path, tmp_path / "new")


def test_what_is_kept_of_a_round_that_is_played_again_is_replaced(world: World, tmp_path: Path) -> None:
    (first, *rest) = Parts(world.run).round(0)
    parts = Parts(tmp_path / "other")
    (tmp_path / "other").mkdir()
    for part in (first, *rest):
        parts.keep(0, part)
    parts.keep(1, first)
    Parts(tmp_path / "other").keep(0, Part("late", first.users, first.total))
    (again,) = parts.round(0)
    assert again.node == "late"
    assert torch.equal(again.total.sums, first.total.sums)
    assert len(parts.round(1)) == 1
    parts.forget_after(1)
    assert (len(parts.round(0)), len(parts.round(1))) == (1, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_go_on_with_a_run_that_was_made_without_a_user(tmp_path: Path) -> None:
    """The coordinator, its SuperLink and the nodes are processes, under TLS and with keys."""
    options = [DATA, KEEP, *SMALL[:2], "evaluation.hold_out=ratio"]
    given = config.load("fedmf", None, options, run__rounds=2)
    dataset, home, port, lines = open_data(given.data), tmp_path / "home", reserved_port(), list[str]()
    local.lay_out(home, dataset, (1, 2), held_out=True)
    catalogue = read_catalogue(home / local.CATALOGUE)

    def serve_to(output: Path, users: int, rounds: int, resume: bool) -> Summary:
        chosen = given.model_copy(update={"run": given.run.model_copy(update={"rounds": rounds})})
        terms = Terms("127.0.0.1", port, min_nodes=2, min_users=users, wait=900, deadline=900)
        places = (output, home / "certificates", home / "keys")
        return serve(Deployment(chosen, catalogue, *places, terms, resume, name=NAME), Quiet(), lines.append)

    with local.nodes(home, port):
        first = serve_to(tmp_path / "run", 3, 2, False)
        assert (first.users, len(first.nodes_with_model or ())) == (3, 2)
        found = {part.node for number in range(2) for part in Parts(tmp_path / "run").round(number)}
        assert found == {"n0", "n1"}
        node = Node.open(home / "nodes" / "n1" / "store.db")
        make(node, node.users()[0], home / "keys" / "n1").write(tmp_path / "ask")
        node.forget(node.users()[0])
        accept(tmp_path / "run", tmp_path / "ask", home / "keys", ALL, replay=tmp_path / "new")
        second = serve_to(tmp_path / "new", 2, 4, True)
    assert (second.best_round, len(second.nodes_with_model or ())) == (4, 2)
    assert second.valid["users"] == first.valid["users"] - 1
    assert [entry.report.clients for entry in RunFolder(tmp_path / "new").history()] == [3, 3, 2, 2]
    assert not any("went on without" in line for line in lines)
    assert not same(trained(tmp_path / "new"), trained(tmp_path / "run"))
