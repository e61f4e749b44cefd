"""Coordinator, neighbourhood service and nodes apart: the same model, and what each role receives in all messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from safetensors import SafetensorError
from safetensors.torch import load, save
from tests.parity.deployment import Deployment
from tests.parity.federation import (
    DIM,
    N_ITEMS,
    N_USERS,
    PROTECTED,
    SERVICE,
    SINGLE,
    UNEQUAL,
    Twins,
    pair,
    settings,
)
from tests.parity.test_rounds import WORLDS
from torch import Tensor

from perfedrec.core.aggregate import FIXED_POINT, reduce
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.records import copied, flatten, unflatten
from perfedrec.core.types import Update
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import PerFedRecSettings
from perfedrec.privacy.aggregation import to_words
from perfedrec.runtimes.flower import Rejection, ServiceClient, secagg
from perfedrec.runtimes.flower.codec import pack, unpack
from perfedrec.runtimes.flower.rounds import Round
from perfedrec.runtimes.flower.sealing import Bundle, public_of, seal, unseal

SECURE = {"aggregation": "secure", "norm": "l2", "clip": 0.5}
NOISE = {"degrees": 0.5, "spectral": 0.5, "join": 0.5, "training": 0.5}
SUMS = {"kind": "spectral", "cluster_passes": 0}
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "none, spectral": {"pretraining": {"kind": "spectral"}},
    "paper": {"privacy": PROTECTED},
    "paper, contrastive": {"privacy": PROTECTED, "pretraining": {"kind": "contrastive"}},
    "secure": {"privacy": SECURE, "pretraining": SUMS},
    "private": {
        "privacy": SECURE | {"noise": NOISE, "dropout_tolerance": 0.0},
        "pretraining": SUMS,
        "clusters": {"n_clusters": 0},
    },
}


@pytest.mark.parametrize("sizes", [SINGLE, UNEQUAL], ids=["one user a node", "many users a node"])
@pytest.mark.parametrize("world", ["bpr", "contrastive, protected", "spectral, protected", "spectral start"])
def test_with_roles_apart_or_together_the_model_is_the_same(world: str, sizes: tuple[int, ...]) -> None:
    twins = Twins(settings(**WORLDS[world]), sizes, apart=True)
    for _ in range(len(twins.algorithm.phases) + 5):
        expected, played = twins.simulate(), twins.play()
        assert (played.phase, played.clients) == (expected.phase, expected.clients)
        elsewhere = ("service", "tokens", "neighbours")  # what the coordinator does not have
        simulated, flower = (
            {name: value for name, value in flatten(state)[0].items() if not name.startswith(elsewhere)}
            for state in (twins.simulated, twins.flower)
        )
        assert all(torch.equal(a, b) for a, b in pair(simulated, flower)), played.phase
        assert twins.service is not None
        for a, b in pair(flatten(twins.simulated.service)[0], flatten(twins.service.state)[0]):
            assert torch.equal(a, b)
        for users, node in ((twins.hosts[name], each) for name, each in twins.nodes.items()):
            own, there = (each.load_client_states(users, each.rows(users)[1]) for each in (node, twins.population))
            assert all(torch.equal(a, b) for a, b in pair(flatten(own)[0], flatten(there)[0]))
    assert twins.flower.tokens is None
    assert twins.flower.neighbours is None
    assert not twins.flower.service.reports.any()
    assert twins.flower.clusters.labels is not None


def test_service_and_coordinator_continue_from_what_they_stored() -> None:
    twins = Twins(settings(**PROFILES["paper, contrastive"]), UNEQUAL, apart=True)
    for _ in range(6):
        twins.simulate()
        twins.play()
        assert twins.service is not None
        assert twins.service_client is not None
        kept = {name: load(save({name: tensor}))[name] for name, tensor in twins.service_client.tensors().items()}
        twins.service_client = ServiceClient.of(SERVICE, kept)
        twins.service.state = unflatten(type(twins.service.state), *flatten(copied(twins.service.state)))
    assert torch.equal(twins.simulated.items, twins.flower.items)
    assert kept.keys() == {"neighbours", *(f"start {node}" for node in twins.hosts)}


# --- what each role receives ---


@dataclass
class Seen:
    """Everything that a role can read: the bytes of the messages that pass through it, and of what it can unseal."""

    coordinator: bytes = b""
    service: bytes = b""
    nodes: dict[int, bytes] = field(default_factory=dict)


Form = tuple[bytes, ...]
"""The bytes that numbers may have in a message: as they are, or in 4 bytes each where that loses nothing."""


def forms(tensor: Tensor) -> Form:
    narrow = {torch.int64: torch.int32, torch.float64: torch.float32}.get(tensor.dtype, tensor.dtype)
    return tensor.contiguous().numpy().tobytes(), tensor.to(narrow).contiguous().numpy().tobytes()


@dataclass
class Known:
    """What the tests search for, as bytes."""

    items: list[Form] = field(default_factory=list)
    vectors: list[Form] = field(default_factory=list)
    reports: dict[int, list[Form]] = field(default_factory=dict)
    edges: list[Form] = field(default_factory=list)
    changes: list[Form] = field(default_factory=list)
    degrees: list[Form] = field(default_factory=list)
    tokens: list[Form] = field(default_factory=list)


def opened(record: ArrayRecord, private: bytes, purposes: list[str]) -> bytes:
    """The bytes in a sealed record, where the key opens it."""
    found = b""
    for purpose in purposes:
        try:
            found += b"|".join(
                each.contiguous().numpy().tobytes() for each in unseal(record, private, purpose).values()
            )
        except PerfedrecError:
            continue
    return found


def apart(config: PerFedRecSettings) -> Twins:
    return Twins(config, UNEQUAL, apart=True)


def recorded(
    profile: str,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int = 4,
    world: Callable[[PerFedRecSettings], Any] = apart,
) -> tuple[Any, Seen, Known]:
    twins, known = world(settings(**PROFILES[profile])), Known()
    assert twins.service is not None

    work: list[Any] = []
    upload = twins.algorithm.protection.upload

    def client(*args: Any) -> tuple[Update, Any]:
        update, client_state = PerFedRecPP.client(twins.algorithm, *args)
        work[:] = args[2], client_state
        return update, client_state

    def protected(phase: str, update: Update, key: Any) -> Update:
        (rows, client_state), given = work, upload(phase, update, key)
        here = next((node for node, users in twins.hosts.items() if torch.isin(given.users, users).all()), 0)
        if rows.items.numel() > 1 and here:  # not the coordinator's example
            known.items += [forms(each) for each in rows.items.split(rows.counts.tolist())]
            known.vectors += [forms(each) for each in client_state.private if each.any()]
            if given.reports is not None:
                rows_of = given.reports.flatten(0, 1)
                known.reports.setdefault(here, []).extend(forms(each) for each in rows_of if each.any())
            if given.edges is not None:
                known.edges += [forms(given.edges[given.edges[:, 1] == user, 2]) for user in given.edges[:, 1].unique()]
            if phase == "degrees":  # as a list, and as the numbers of all items that go into a sum
                total = reduce(given, N_ITEMS, 1)
                known.degrees += [forms(total.keys), forms(total.sums), (to_words(total).numpy().tobytes(),)]
            if given.deltas is not None and given.deltas.shape[1] == DIM:
                sums = reduce(given, N_ITEMS, twins.algorithm.n_groups(twins.flower)).sums
                known.changes += [forms(each) for each in sums if each.all()]
        return given

    monkeypatch.setattr(twins.algorithm, "client", client)
    monkeypatch.setattr(twins.algorithm.protection, "upload", protected)
    tokens = twins.bundles[100].tokens(N_ITEMS)
    known.tokens = [forms(tokens), forms(tokens.argsort())]
    for _ in range(len(twins.algorithm.phases) + rounds):
        twins.play()
    if isinstance(twins, Deployment):
        assert twins.coordinator.hand_out(twins.flower) == list(twins.hosts)
    seen, purposes = Seen(nodes=dict.fromkeys(twins.nodes, b"")), ["neighbours", "table", "start"]
    purposes += [f"reports of round {number}" for number in range(twins.flower.round)]
    for sent in twins.grid.sent:
        content = b"|".join(sent.objects.values())
        records = list(sent.message.content.array_records.values()) if sent.message.has_content() else []
        seen.coordinator += content
        if sent.node == SERVICE:
            seen.service += content + b"".join(opened(each, twins.service.private, purposes) for each in records)
        else:
            bundle = twins.bundles[sent.node]
            for key in (bundle.common, bundle.own):
                seen.nodes[sent.node] += b"".join(opened(each, key, purposes) for each in records)
            seen.nodes[sent.node] += b"" if sent.up else content
    return twins, seen, known


def count(pieces: list[Form], where: bytes) -> int:
    return sum(any(form in where for form in piece) for piece in pieces)


@pytest.mark.parametrize("deployed", [False, True], ids=["rounds", "deployment"])
@pytest.mark.parametrize("profile", PROFILES)
def test_no_role_receives_what_it_must_not_see(
    profile: str, deployed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds only, and in all messages of a deployment: hosted users, degrees, rounds, the model for the nodes."""
    world: Any = (lambda config: Deployment(config, tmp_path)) if deployed else apart
    twins, seen, known = recorded(profile, monkeypatch, world=world)
    # Three numbers in a row may be there by chance, among the rows that a node's users have touched together.
    known.items, known.edges = ([each for each in lists if len(each[0]) > 24] for lists in (known.items, known.edges))
    everywhere = seen.coordinator + seen.service + b"".join(seen.nodes.values())
    assert len(known.items) > 2 * N_USERS
    assert len(known.vectors) > N_USERS
    # Nobody receives a user's items, except where sparse uploads show them anyway: the pass that fills the cluster
    # models changes the rows of a node's items and no others, and node 100 has one user.
    found = {each for each in known.items if count([each], everywhere)}
    lone = forms(twins.population.rows(twins.hosts[100])[0].items)
    assert lone in found if profile == "none, spectral" else found == set()
    rows = count(known.degrees, seen.coordinator)  # those of a node are seen if all its users are in one cluster
    assert (0 < rows <= len(twins.nodes)) if deployed and profile == "none, spectral" else rows == 0
    assert bool(known.degrees) == (deployed or profile in ("secure", "private"))
    # Nobody receives the key or the list of tokens.
    assert count([*known.tokens, (twins.bundles[100].secret, twins.bundles[100].common)], everywhere) == 0
    # The coordinator receives no user vector, protected or not, and no edge.
    assert count(known.vectors, seen.coordinator) == 0
    every_report = [each for reports in known.reports.values() for each in reports]
    assert count(every_report, seen.coordinator) == 0
    assert count(known.edges, seen.coordinator) == 0
    # The service receives no change of items; nodes receive no other node's report.
    assert count(known.changes, seen.service) == 0
    for node, found in seen.nodes.items():
        others = [each for other, reports in known.reports.items() if other != node for each in reports]
        assert count(others, found) == 0
        assert count(known.edges, found) == 0
        assert count(known.changes, found) == 0
    if profile in ("secure", "private"):
        # No user vector leaves a client, there is nothing for the service, and the coordinator sees only sums.
        assert every_report == known.edges == []
        assert seen.service == b""
        assert len(known.changes) > 100
        assert count(known.changes, seen.coordinator) == 0
    else:
        # The search finds what is sent: changes to the coordinator, reports and edges under tokens to the service.
        assert count(known.changes, seen.coordinator) > 0.9 * len(known.changes)
        assert count(every_report, seen.service) == len(every_report) > N_USERS
        # In the pass that fills the cluster models users' own vectors stay with them.
        sent = len(known.vectors) - (N_USERS if profile == "none, spectral" else 0)
        assert count(known.vectors, seen.service) == (pytest.approx(sent, abs=60) if profile.startswith("none") else 0)


@pytest.mark.parametrize("profile", ["none", "paper"])
def test_item_degrees_are_an_exact_secure_sum(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(name: str) -> Deployment:
        started = Deployment(settings(**PROFILES[profile]), tmp_path / name)
        started.coordinator.assemble(4, N_USERS, 0.0, lambda line: None)
        return started

    def found(world: Deployment) -> list[int]:
        """The nodes that sent their own degrees, as the numbers that they add to the sum."""
        sent = b"".join(b"".join(each.objects.values()) for each in world.grid.sent if each.up)
        counts = {
            node: torch.bincount(world.population.rows(users)[0].items, minlength=N_ITEMS) for node, users in hosts
        }
        return [node for node, each in counts.items() if (each * int(FIXED_POINT)).numpy().tobytes() in sent]

    secret, hosts = begun("secret"), list(begun("hosts").hosts.items())
    degrees = secret.coordinator.begin().degrees
    assert found(secret) == []
    rows, _ = secret.population.rows(torch.arange(N_USERS))
    true = torch.equal(degrees, torch.bincount(rows.items, minlength=N_ITEMS).float())
    assert true == (profile == "none")  # else there are decoys in it, and masked items are not
    with monkeypatch.context() as patch:
        collect = Round.collect
        patch.setattr(Round, "collect", lambda given, secure: collect(given))
        assert torch.equal(begun("clear").coordinator.begin().degrees, degrees)
    monkeypatch.setattr(secagg, "add_mask", lambda words, secret, sign: None)  # the search finds what is not masked
    bare = begun("bare")
    assert torch.equal(bare.coordinator.begin().degrees, degrees)
    assert found(bare) == ([node for node, _ in hosts] if profile == "none" else [])


def test_the_service_reads_edges_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing protected its graph is that of the users' items, under tokens that only nodes know."""
    twins, _, _ = recorded("none", monkeypatch, 1)
    assert twins.service is not None
    tokens, graph = twins.bundles[100].tokens(N_ITEMS), twins.service.state.graph.by_user
    assert sorted(tokens.tolist()) == list(range(N_ITEMS))
    assert int((tokens == torch.arange(N_ITEMS)).sum()) < 8  # one on average
    for user in range(N_USERS):
        rows, _ = twins.population.rows(torch.tensor([user]))
        dense = torch.zeros(N_ITEMS).index_fill_(0, tokens[rows.items], 1.0)
        unit = torch.zeros(N_ITEMS, N_ITEMS).fill_diagonal_(1.0)
        assert torch.equal(graph.times(unit)[user] > 0, dense > 0)


def test_tokens_follow_from_the_secret_alone() -> None:
    service = public_of(b"a" * 32)
    one, same, other = (
        Bundle(b"x" * 32, service, b"1" * 32),
        Bundle(b"x" * 32, service, b"2" * 32),
        Bundle(b"y" * 32, service, b"1" * 32),
    )
    assert torch.equal(one.tokens(500), same.tokens(500))
    assert not torch.equal(one.tokens(500), other.tokens(500))
    assert one.common == same.common != other.common
    assert "xxxx" not in repr(one)
    assert "1111" not in repr(one)


# --- what is sealed ---


def test_sealed_data_open_for_their_owner_and_purpose_only() -> None:
    private, tensors = b"k" * 32, {"a": torch.randn(3, 4), "empty": torch.zeros(0, 3, dtype=torch.int64)}
    record = seal(tensors, public_of(private), "round 3")
    back = unseal(record, private, "round 3")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    (array,) = unpack(record).values()
    with pytest.raises(SafetensorError):
        load(array.numpy().tobytes())
    changed = array.clone()
    changed[60] ^= 1
    for key, purpose, what in (
        (b"l" * 32, "round 3", record),
        (private, "round 4", record),
        (private, "round 3", pack({"sealed": changed})),
        (private, "round 3", pack({"sealed": array[:20]})),
        (private, "round 3", pack({"open": array})),
    ):
        with pytest.raises(PerfedrecError, match=f"sealed for '{purpose}'"):
            unseal(what, key, purpose)


def private_of(message: Message, twins: Twins, number: int) -> dict[str, Tensor]:
    assert twins.service is not None
    return unseal(message.content.array_records["private"], twins.service.private, f"reports of round {number}")


def change(what: Callable[[dict[str, Tensor]], dict[str, Tensor]], number: int = 0) -> Any:
    """Seal something else in the reply of node 102."""
    holder: list[Twins] = []

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == 102 and "private" in reply.content:
            bundle = holder[0].bundles[102]
            private = what(private_of(reply, holder[0], 0))
            reply.content["private"] = seal(private, bundle.service, f"reports of round {number}")
        return reply

    holder.append(Twins(settings(), UNEQUAL, tamper, apart=True))
    return holder[0]


@pytest.mark.parametrize(
    ("what", "number", "message"),
    [
        (lambda private: private, 1, "sealed for 'reports of round 0'"),
        (lambda private: private | {"reports": private["reports"][:, :, 1:]}, 0, "array reports"),
        (lambda private: private | {"reports": private["reports"] / 0}, 0, "not finite"),
        (lambda private: private | {"report_users": private["report_users"].flip(0) + 1}, 0, "one report of each user"),
        (lambda private: private | {"edges": private["edges"] + N_ITEMS}, 0, "array edges"),
        (lambda private: private | {"more": private["edges"].clone()}, 0, "expected the arrays"),
        (lambda private: {"key": private["key"]}, 0, "expected reports"),
        (lambda private: {"reports": private["reports"]}, 0, "key"),
    ],
)
def test_the_service_refuses_impossible_parts_and_names_the_node(
    what: Callable[[dict[str, Tensor]], dict[str, Tensor]], number: int, message: str
) -> None:
    twins = change(what, number)
    with pytest.raises(PerfedrecError, match=f"reply of node 102 to the service: .*{message}"):
        twins.play()
    assert twins.flower.round == 0


def test_a_round_without_one_sealed_part_is_not_aborted() -> None:
    twins, rejected = change(lambda private: private, 1), list[Rejection]()
    report = twins.play(rejected)
    assert [(each.node, each.reason) for each in rejected] == [(102, "sealed")]
    assert (twins.flower.round, report.clients, report.aborted) == (1, N_USERS, None)


def test_without_the_service_a_round_fails() -> None:
    twins = Twins(
        settings(), UNEQUAL, lambda reply: None if reply.metadata.src_node_id == SERVICE else reply, apart=True
    )
    with pytest.raises(PerfedrecError, match="service, node 999, does not answer"):
        twins.play()
    assert twins.flower.round == 0


def test_another_node_orders_the_table_where_one_cannot() -> None:
    def silent(reply: Message) -> Message | None:
        lost = reply.metadata.src_node_id in (100, 101) and reply.metadata.message_type == "train.name"
        return None if lost else reply

    twins = Twins(settings(**PROFILES["paper, contrastive"]), UNEQUAL, silent, apart=True)
    twins.simulate()
    twins.play()
    assert torch.equal(twins.simulated.items, twins.flower.items)
    asked = [
        sent.node for sent in twins.grid.sent if not sent.up and sent.message.metadata.message_type == "train.name"
    ]
    assert asked == [100, 101, 102]
