"""A user who is forgotten during a run drops out, and nobody else does; a user who is added breaks nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from tests.parity.deployment import Deployment
from tests.parity.federation import N_USERS, UNEQUAL, Twins, settings
from tests.parity.test_roles import PROFILES
from tests.parity.test_rounds import SUMS

from perfedrec.core.records import flatten
from perfedrec.runtimes.flower import Directory
from perfedrec.runtimes.flower.secagg import AbortedError

SECURE: dict[str, Any] = {
    "pretraining": SUMS,
    "privacy": {"aggregation": "secure", "norm": "l2", "clip": 0.5, "min_clients": 4, "min_contributors": 1},
}


def tables(state: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in flatten(state)[0].items()}


def host_of(deployment: Deployment, user: int) -> int:
    return next(node for node, users in deployment.hosts.items() if bool((users == user).any()))


def without(deployment: Deployment, user: int) -> Directory:
    """Who hosts whom, if nobody hosted the user."""
    directory = deployment.coordinator.directory
    assert directory is not None
    return Directory(directory.identities, {node: users[users != user] for node, users in directory.hosts.items()})


@pytest.mark.parametrize("alone", [False, True], ids=["one of many", "the only one of its node"])
@pytest.mark.parametrize("parts", [SECURE, PROFILES["paper"]], ids=["secure", "paper"])
def test_only_the_user_drops_out_and_the_tables_are_those_of_the_others(
    parts: dict[str, Any], alone: bool, tmp_path: Path
) -> None:
    hosted = Twins(settings(), UNEQUAL).hosts.values()
    user = next(int(users[-1]) for users in hosted if (users.numel() == 1) == alone)
    one, other = (Deployment(settings(**parts), tmp_path / name) for name in ("forgets", "never asks"))
    for deployment in (one, other):
        deployment.begin()
        for _ in range(2):
            deployment.play()
    one.nodes[host_of(one, user)].forget(f"u{user}")
    other.coordinator.directory = without(other, user)
    clients = []
    for _ in range(4):
        clients.append([deployment.play().clients for deployment in (one, other)])
        assert tables(one.flower).keys() == tables(other.flower).keys()
        for name, tensor in tables(other.flower).items():
            assert torch.equal(tables(one.flower)[name], tensor), name
    assert all(here == there for here, there in clients)
    assert min(here for here, _ in clients) < N_USERS
    assert user not in one.nodes[host_of(one, user)].everyone().tolist()
    assert one.coordinator.hand_out(one.flower) == sorted(one.hosts)


def test_a_user_who_is_added_during_a_run_takes_part_in_the_next_one(tmp_path: Path) -> None:
    one, other = (Deployment(settings(**SECURE), tmp_path / name) for name in ("adds", "does not"))
    for deployment in (one, other):
        deployment.begin()
        deployment.play()
    one.nodes[101].add_interactions("somebody new", "3", "5", "8")
    for _ in range(6):
        assert one.play().clients == other.play().clients
    assert all(torch.equal(tables(one.flower)[name], tensor) for name, tensor in tables(other.flower).items())
    assert one.nodes[101].unregistered() == ["somebody new"]
    # A coordinator that continues the run does not invite the user; that of another run does.
    for known, count in ((torch.arange(N_USERS), N_USERS), (None, N_USERS + 1)):
        one.coordinator.known = known
        directory = one.coordinator.assemble(len(one.nodes), count, 60.0, lambda line: None)
        assert sum(users.numel() for users in directory.hosts.values()) == count
    assert one.nodes[101].unregistered() == []


@pytest.mark.parametrize("count", [-1, N_USERS, 2.0, None], ids=str)
def test_a_node_cannot_count_more_clients_than_it_was_asked_for(count: Any, tmp_path: Path) -> None:
    def miscount(message: Message) -> Message:
        training = message.metadata.group_id == str(len(deployment.algorithm.phases))
        if training and message.metadata.message_type == "train.masked" and message.metadata.src_node_id == 101:
            message.content["secagg"] = ConfigRecord({} if count is None else {"clients": count})
        return message

    deployment = Deployment(settings(**SECURE), tmp_path, miscount)
    for _ in deployment.algorithm.phases:
        deployment.play()
    deployment.flower, report = deployment.coordinator.play(deployment.flower)
    (rejection,) = deployment.coordinator.rejected
    assert 0 < report.clients == report.cohort - rejection.users
    expected = f"stage masked: expected the number of its clients, at most {rejection.users}"
    assert (rejection.node, rejection.detail) == (101, expected)


def test_a_sum_that_has_become_too_small_is_not_opened(tmp_path: Path) -> None:
    """The number of clients is checked after users have left, before the masks are taken off."""
    everybody = {"privacy": SECURE["privacy"] | {"min_clients": N_USERS}}
    parts = SECURE | everybody | {"selection": {"n_clients_per_round": N_USERS}}
    deployment = Deployment(settings(**parts), tmp_path)
    deployment.begin()
    deployment.nodes[101].forget(f"u{int(deployment.hosts[101][0])}")
    with pytest.raises(AbortedError, match="22 clients are too few for a sum; expected at least 23"):
        deployment.play()
