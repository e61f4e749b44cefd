"""The neighbourhood service of a deployment may be restarted and asked again; without it no vector leaves a node."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from tests.parity.deployment import Deployment
from tests.parity.federation import N_ITEMS, N_USERS, PROTECTED, SERVICE, settings
from tests.parity.test_roles import SECURE, SUMS

from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.records import copied, flatten
from perfedrec.federation.bundles import BUNDLE, KEYS, deal, read_bundle, read_keys
from perfedrec.federation.service import StateStore
from perfedrec.methods.federated import neighbourhood
from perfedrec.nn.propagation import Bipartite
from perfedrec.runtimes.flower import NodeApp, ServiceClient, public_of
from perfedrec.runtimes.flower.node_loop import answer
from perfedrec.runtimes.flower.sealing import unseal

PARTS: dict[str, Any] = {"privacy": PROTECTED, "pretraining": {"kind": "contrastive"}}
ROUNDS = 6


def client_of(deployment: Deployment) -> ServiceClient:
    client = deployment.coordinator.service_client
    assert client is not None
    return client


def tables(state: Any) -> dict[str, torch.Tensor]:
    return flatten(state)[0]


def test_restarted_and_asked_again_the_model_is_the_same(tmp_path: Path) -> None:
    """The service is restarted after each round. After some rounds the coordinator is restarted as well, and plays the
    round again."""
    deal(tmp_path / "steady", map(str, range(100, 104)), tmp_path / "steady" / "service")
    shutil.copytree(tmp_path / "steady", tmp_path / "shaken")  # the same secret, hence the same graph
    steady, shaken = (Deployment(settings(**PARTS), tmp_path / name) for name in ("steady", "shaken"))
    for number in range(ROUNDS):
        steady.play()
        if shaken.flower is None:
            shaken.begin()
        before, held = copied(shaken.flower), dict(client_of(shaken).tensors())
        shaken.play()
        shaken.serve()
        if number in (0, 2, 5):
            shaken.flower, coordinator = before, shaken.coordinator
            coordinator.federation = replace(coordinator.federation, service_client=ServiceClient.of(SERVICE, held))
            shaken.play()
            shaken.serve()
        expected, found = tables(steady.flower), tables(shaken.flower)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), number
    assert shaken.flower.clusters.labels is not None
    kept = [path.name for path in sorted((tmp_path / "shaken" / "service").glob("run-*/*"))]
    assert kept == ["round-000005", "round-000006"]


def test_a_service_without_its_state_is_named_and_the_round_can_be_played_later(tmp_path: Path) -> None:
    deployment = Deployment(settings(**PARTS), tmp_path)
    deployment.play()
    before = deployment.flower
    aside = [(path, path.rename(tmp_path / path.name)) for path in (tmp_path / "service").glob("run-*")]
    deployment.serve()
    with pytest.raises(PerfedrecError, match=r"round 1 \(train\): .* does not answer: .* or has lost its state"):
        deployment.play()
    assert deployment.flower is before
    for path, moved in aside:
        moved.rename(path)
    deployment.play()
    assert deployment.flower.round == 2


def test_the_service_is_asked_twice(tmp_path: Path) -> None:
    lost: list[str] = []

    def once(reply: Message) -> Message | None:
        if reply.metadata.message_type == "train.serve" and not lost:
            lost.append("a reply")
            return None
        return reply

    deployment = Deployment(settings(**PARTS), tmp_path, once)
    deployment.play()
    assert lost == ["a reply"]
    assert deployment.flower.round == 1
    assert torch.equal(deployment.service._joined[1].state.reports != 0, torch.ones(N_USERS, 2, 8, dtype=torch.bool))


def test_the_coordinator_waits_for_the_service_and_names_it(tmp_path: Path) -> None:
    deployment, lines = Deployment(settings(), tmp_path), list[str]()
    del deployment.apps[SERVICE]
    with pytest.raises(PerfedrecError, match=r"gave up waiting: 4 nodes .* and the neighbourhood service is not"):
        deployment.coordinator.assemble(4, N_USERS, 0.0, lines.append)
    deployment.serve(version="another")
    with pytest.raises(PerfedrecError, match="the neighbourhood service is not"):
        deployment.coordinator.assemble(4, N_USERS, 0.0, lines.append)
    assert any("node 999 is refused: " in line and "version another, the coordinator 1" in line for line in lines)


def test_where_users_contribute_only_to_sums_the_service_is_asked_nothing(tmp_path: Path) -> None:
    deployment = Deployment(settings(privacy=SECURE, pretraining=SUMS), tmp_path)
    deployment.play()
    assert deployment.coordinator.service_client is None
    assert all(sent.node != SERVICE for sent in deployment.grid.sent)


def test_a_node_without_a_bundle_hands_nothing_over(tmp_path: Path) -> None:
    deployment, lines = Deployment(settings(), tmp_path), list[str]()
    bare = NodeApp(deployment.nodes[101], lambda _: deployment.algorithm, "1").app()
    deployment.apps[101] = lambda message, context: answer(bare, message, context)
    with pytest.raises(PerfedrecError, match="gave up waiting: 3 nodes"):
        deployment.coordinator.assemble(4, N_USERS, 0.0, lines.append)
    assert any(line.startswith("node 101 is refused: it failed") or "has no bundle" in line for line in lines)
    assert [each.reason for each in deployment.coordinator.rejected] == ["bundle"]


def test_nodes_recommend_with_the_sums_that_the_coordinator_does_not_have(tmp_path: Path) -> None:
    deployment = Deployment(settings(), tmp_path)
    for _ in range(3):
        deployment.play()
    assert deployment.coordinator.hand_out(deployment.flower) == sorted(deployment.nodes)
    views = [
        store.broadcast(deployment.algorithm.broadcast_type, store.everyone()[:1])
        for store in deployment.nodes.values()
    ]
    assert all(broadcast.neighbours.shape == (2, N_ITEMS, 8) and broadcast.tokens is None for broadcast in views)
    assert all(torch.equal(broadcast.neighbours, views[0].neighbours) for broadcast in views)
    degrees = torch.bincount(deployment.population.items, minlength=N_ITEMS)
    assert torch.equal(views[0].neighbours[1].any(dim=1), degrees > 0)
    assert deployment.flower.neighbours is None


def test_each_node_gets_the_lists_of_its_own_users_alone(tmp_path: Path) -> None:
    """The lists are those of diffusion on the graph of all users, and the coordinator can read none."""
    deployment = Deployment(settings(personal={"neighbourhood": 0.5}), tmp_path)
    for _ in range(2):
        deployment.play()
    deployment.coordinator.hand_out(deployment.flower)
    users, items = deployment.population.rows(deployment.population.everyone())[0].segments, deployment.population.items
    graph = Bipartite.of(users, items, N_USERS, N_ITEMS)
    near, nearness = neighbourhood.diffused(graph, 0.5, 0.5, 300)
    expected = torch.zeros(N_USERS, N_ITEMS).scatter_add_(1, near.clamp(min=0).long(), nearness)
    seen = 0
    for name, store in deployment.nodes.items():
        broadcast = store.broadcast(deployment.algorithm.broadcast_type, store.everyone())
        found = torch.zeros(store.everyone().numel(), N_ITEMS)
        found.scatter_add_(1, broadcast.near.clamp(min=0).long(), broadcast.nearness)
        torch.testing.assert_close(found, expected[deployment.hosts[name]], rtol=1e-5, atol=1e-6)
        assert broadcast.low_rank.shape[0] == N_ITEMS
        seen += found.shape[0]
    assert seen == N_USERS
    assert deployment.flower.low_rank.factor is None
    assert deployment.flower.service.near is None
    sealed = client_of(deployment).held
    other = read_bundle(tmp_path / "101" / BUNDLE)
    with pytest.raises(PerfedrecError, match="sealed"):
        unseal(sealed["near 100"], other.own, "near")


# --- files ---


def test_new_nodes_get_the_secret_of_the_others(tmp_path: Path) -> None:
    deal(tmp_path, ["a", "b"], tmp_path / "service")
    deal(tmp_path, ["c"], tmp_path / "service")
    a, b, c = (read_bundle(tmp_path / name / BUNDLE) for name in "abc")
    keys = read_keys(tmp_path / "service" / KEYS)
    assert a.secret == b.secret == c.secret
    assert {a.service, b.service, c.service} == {public_of(keys.private)}
    assert keys.nodes == public_of(c.common)
    assert len({a.own, b.own, c.own, a.secret, keys.private}) == 5
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*") if path.is_file()} == {0o600}
    for names, message in ((["d", "a"], "a is taken already"), (["service"], "service is taken already")):
        with pytest.raises(ConfigError, match=message):
            deal(tmp_path, names, tmp_path / "service")
    assert not (tmp_path / "d").exists()
    (tmp_path / "service" / KEYS).unlink()  # only the service has it now
    deal(tmp_path, ["d"], tmp_path / "service")
    assert read_bundle(tmp_path / "d" / BUNDLE).secret == a.secret
    assert not (tmp_path / "service" / KEYS).exists()
    (tmp_path / "other" / "service").mkdir(parents=True)
    (tmp_path / "other" / "service" / KEYS).touch()
    with pytest.raises(ConfigError, match="from which those of new nodes could be made"):
        deal(tmp_path / "other", ["d"], tmp_path / "other" / "service")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"secret": "00", "service": "00", "own": "00"}', '{"secret": 1}'])
def test_a_damaged_bundle_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / BUNDLE
    with pytest.raises(ConfigError, match=r"cannot be read .*; expected a node's bundle"):
        read_bundle(path)
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not a node's bundle"):
        read_bundle(path)


def test_states_of_another_run_are_deleted(tmp_path: Path) -> None:
    state_store, deployment = StateStore(tmp_path), Deployment(settings(), tmp_path / "federation")
    state = deployment.algorithm.open_service(3)
    for number in range(1, 4):
        state_store.put("one", number, state)
    assert state_store.get("one", 1, state) is None
    assert torch.equal(state_store.get("one", 2, state).reports, state.reports)
    state_store.put("two", 1, state)
    assert state_store.get("one", 3, state) is None
    assert state_store.get("two", 1, state) is not None
