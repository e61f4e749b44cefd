"""Who may take part, which nodes a round does without, and the model that nodes receive: over a grid in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from tests.parity.federation import N_ITEMS, N_USERS, PROTECTED, SERVICE, population, settings
from tests.parity.grid import MemoryGrid

from perfedrec.core.algorithm import Phase
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.records import copied, flatten
from perfedrec.core.types import NEWCOMER, Plan
from perfedrec.federation.agreement import build, method_of
from perfedrec.federation.node import policy_of
from perfedrec.federation.owner import Node
from perfedrec.federation.service import StateStore
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.privacy.policy import Policy
from perfedrec.runs.config import RunSettings, config_of
from perfedrec.runtimes.flower import (
    Bundle,
    Coordinator,
    Federation,
    NodeApp,
    Owner,
    ServiceApp,
    ServiceClient,
    Setup,
    needs_service,
    public_of,
)
from perfedrec.runtimes.flower.codec import digest, pack, unpack
from perfedrec.runtimes.flower.node_loop import answer
from perfedrec.runtimes.flower.rounds import Round
from perfedrec.runtimes.flower.secagg import AbortedError, Participant
from perfedrec.runtimes.flower.secure_sum import RECORD
from perfedrec.runtimes.node import Store

ALGORITHM = PerFedRecPP(settings())
ALONE = PerFedRecPP(
    settings(model={"neighbours": False}, clusters={"n_clusters": 0}, selection={"n_clients_per_round": N_USERS})
)
"""A method that needs no neighbourhood service."""
SECURE = PerFedRecPP(
    settings(
        privacy={"aggregation": "secure", "norm": "l2", "clip": 0.5},
        pretraining={"kind": "spectral", "cluster_passes": 0},
        selection={"n_clients_per_round": N_USERS, "max_participations": 9},
    )
)
REQUIRES = "this node requires the protection of profile secure at least, and "
PRIVATE = bytes(range(32))
PARTS = torch.arange(N_USERS).split([10, 4, 9])


def store(path: Path, users: torch.Tensor, named: bool = True, items: int = N_ITEMS) -> Store:
    whole = population()
    rows, _ = whole.rows(users)
    owners = users[rows.segments].tolist()
    frame = pl.DataFrame({"user": [f"u{each}" for each in owners], "item": rows.items.numpy()})
    made = Store.create(path, np.arange(items), bytes(32))
    made.import_interactions(frame, identities={f"u{each}": each for each in owners} if named else None)
    return made


def for_few(policy: Policy | None) -> Owner:
    """An owner with the policy for federations of fewer users than a profile's least sum has."""
    privacy = None if policy is None else policy.privacy.model_copy(update={"min_clients": 2})
    found = () if policy is None or privacy is None else (replace(policy, privacy=privacy),)
    return Owner(lambda: found)


def coordinator(
    stores: dict[int, Store],
    tamper: Callable[[Message], Message | None] | None = None,
    versions: dict[int, str] | None = None,
    algorithm: PerFedRecPP = ALGORITHM,
    policies: dict[int, str] | None = None,
) -> Coordinator:
    bundles = {node: Bundle(b"s" * 32, public_of(PRIVATE), bytes([node]) * 32) for node in stores}
    deployed: dict[int, Any] = {
        node: NodeApp(
            each,
            build,
            (versions or {}).get(node, "1"),
            bundles[node],
            for_few(policy_of((policies or {}).get(node, "none"))),
        )
        for node, each in stores.items()
    }
    first = next(iter(stores))
    state_store = StateStore(stores[first].path.parent / "service")
    deployed[SERVICE] = ServiceApp(PRIVATE, public_of(bundles[first].common), build, "1", state_store)
    apps: Any = {node: partial(answer, each.app()) for node, each in deployed.items()}
    setup = Setup("a run", method_of(config_of(algorithm, RunSettings())), stores[first].catalogue, "1")
    service_client = ServiceClient(SERVICE) if needs_service(algorithm) else None
    federation = Federation(algorithm, N_ITEMS, 0, setup, deadline=0.0, service_client=service_client)
    return Coordinator(MemoryGrid(apps, tamper), federation, service=SERVICE)


def change_terms(given: Coordinator, **changes: Any) -> None:
    given.federation = replace(given.federation, **changes)


def configured(given: Coordinator, algorithm: PerFedRecPP) -> Setup:
    """The setup with the configuration of another method."""
    assert given.federation.setup is not None
    return replace(given.federation.setup, configuration=method_of(config_of(algorithm, RunSettings())))


@pytest.fixture
def stores(tmp_path: Path) -> dict[int, Store]:
    return {100 + i: store(tmp_path / f"{i}.node", users) for i, users in enumerate(PARTS)}


def assembled(given: Coordinator, nodes: int = 3, seconds: float = 600.0) -> list[str]:
    lines: list[str] = []
    given.assemble(nodes, 1, seconds, lines.append)
    return lines


def test_nodes_name_the_users_that_they_host(stores: dict[int, Store]) -> None:
    given = coordinator(stores)
    lines = assembled(given)
    assert lines[-1] == f"3 nodes and {N_USERS} users are present (needed: 3 and 1)"
    assert given.directory is not None
    assert torch.equal(given.directory.identities, torch.arange(N_USERS))
    assert [each.tolist() for each in given.directory.hosts.values()] == [each.tolist() for each in PARTS]


def test_a_user_belongs_to_one_node(stores: dict[int, Store], tmp_path: Path) -> None:
    stores[103] = store(tmp_path / "3.node", torch.tensor([2, 3]))
    given = coordinator(stores)
    lines = assembled(given)
    assert any("node 103 is refused: 2 of its users are hosted by another node" in line for line in lines)
    assert [(each.node, each.reason) for each in given.rejected] == [(103, "users")]
    assert given.directory is not None
    assert 103 not in given.directory.hosts


def test_another_catalogue_or_version_is_refused(stores: dict[int, Store], tmp_path: Path) -> None:
    stores[103] = store(tmp_path / "3.node", torch.tensor([2, 3]), items=N_ITEMS + 1)
    given = coordinator(stores, versions={101: "0"})
    assembled(given, nodes=2)
    assert {each.node: each.reason for each in given.rejected} == {101: "version", 103: "catalogue"}


def test_a_node_is_not_in_a_run_that_protects_less_than_its_owner_requires(stores: dict[int, Store]) -> None:
    given = coordinator(stores, policies={100: "secure", 101: "paper"})
    lines = assembled(given, nodes=1)
    assert f"node 100 is refused: {REQUIRES}privacy.aggregation is sparse, not secure" in lines
    assert {each.node: each.reason for each in given.rejected} == {100: "policy", 101: "policy"}
    assert given.directory is not None
    assert list(given.directory.hosts) == [102]
    assert [each.status()["run"] for each in stores.values()] == [None, None, "a run"]


def refusals(given: Coordinator) -> set[str]:
    """What nodes have answered instead of a sum."""
    grid: Any = given.grid
    return {sent.message.error.reason for sent in grid.sent if sent.up and sent.message.has_error()}


def test_options_that_become_weaker_during_a_run_are_noticed(stores: dict[int, Store]) -> None:
    """A node looks at them in every message, and not only when it joins."""
    given = coordinator(stores, algorithm=SECURE, policies=dict.fromkeys(stores, "secure"))
    assembled(given)
    state, _ = given.play(given.begin())
    assert refusals(given) == set()
    weaker = settings(**SECURE.settings.model_dump(by_alias=True) | {"selection": {"max_participations": None}})
    change_terms(given, setup=configured(given, PerFedRecPP(weaker)))
    with pytest.raises(AbortedError):
        given.play(state)
    assert refusals(given) == {f"policy: {REQUIRES}selection.max_participations is off, above 50"}


class Greedy(PerFedRecPP):
    """Asks for item degrees twice. Often enough, and their noise would be averaged away."""

    @property
    def phases(self) -> list[Phase]:
        first, *others = super().phases
        return [first, first, *others]


def test_a_phase_is_refused_in_the_wrong_round(stores: dict[int, Store]) -> None:
    given = coordinator(stores, algorithm=SECURE)
    assembled(given)
    change_terms(given, algorithm=Greedy(SECURE.settings))
    state, _ = given.play(given.begin())
    with pytest.raises(AbortedError):
        given.play(state)
    assert refusals(given) == {"phase: phase degrees came in round 1; expected spectral"}


@pytest.mark.parametrize("missing", [True, False])
def test_a_node_without_opendp_says_so_when_it_is_asked_to_join(
    stores: dict[int, Store], missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "opendp", None)
    noisy = PROTECTED | {"noise_source": "opendp"}
    given = coordinator(stores, algorithm=PerFedRecPP(settings(privacy=noisy)))
    if not missing:
        assert assembled(given)[-1].startswith("3 nodes and")
        return
    with pytest.raises(PerfedrecError, match=r"gave up waiting: 0 nodes and .*needed: 3"):
        assembled(given, seconds=0.0)
    assert {each.reason for each in given.rejected} == {"noise"}
    assert "this node cannot draw its noise" in given.rejected[0].detail
    assert "it lacks the extra opendp" in given.rejected[0].detail
    assert sys.prefix not in given.rejected[0].detail  # a node's paths are not the coordinator's
    assert [each.status()["run"] for each in stores.values()] == [None] * 3


def test_a_single_node_sends_item_degrees_only_if_its_owner_allows_it(tmp_path: Path) -> None:
    def begun(require: str) -> Any:
        stores = {100: store(tmp_path / f"{require}.node", torch.arange(N_USERS))}
        privacy = {"clip": 0.5, "noise_scale": 0.1, "pseudo_items": 0.1, "masking": 0.1, "noise_source": "opendp"}
        given = coordinator(stores, algorithm=PerFedRecPP(settings(privacy=privacy)), policies={100: require})
        assembled(given, nodes=1)
        return given.begin()

    assert float(begun("none").degrees.max()) > 1
    with pytest.raises(PerfedrecError, match=r"no node has sent .* item degrees are asked for without a secure sum"):
        begun("paper")


def test_a_sum_is_opened_again_with_the_same_nodes_and_with_no_others(stores: dict[int, Store]) -> None:
    """A coordinator that was killed plays a round again. If one node were left out, the difference of the sums would be
    its part."""
    given = coordinator(stores, algorithm=SECURE)
    assembled(given)
    state = given.begin()
    for _ in SECURE.phases:
        state, _ = given.play(state)
    start = copied(state)
    state, _ = given.play(state)
    again, report = given.play(copied(start))
    assert report.aborted is None
    assert torch.equal(state.items, again.items)
    app = given.grid.apps.pop(102)  # type: ignore[attr-defined]
    _, report = given.play(copied(start))
    assert report.aborted is not None
    assert "aborted in stage unmask" in report.aborted
    (said,) = refusals(given)
    number = len(SECURE.phases)
    assert said.startswith(f"failed: the sum of round {number} of run a run was opened with other nodes")
    given.grid.apps[102] = app  # type: ignore[attr-defined]
    assert given.play(state)[1].aborted is None


def test_keys_that_the_coordinator_has_swapped_are_noticed(stores: dict[int, Store]) -> None:
    def swap(reply: Message) -> Message:
        if reply.metadata.src_node_id == 101 and reply.metadata.message_type == "train.keys":
            reply.content[RECORD] = ConfigRecord(Participant(101, bytes(16)).keys())
        return reply

    given = coordinator(stores, swap, algorithm=SECURE)
    assembled(given)
    with pytest.raises(AbortedError, match="in stage shares"):
        given.play(given.begin())
    said = "unvouched: keys came in the name of node 101, which does not vouch for them"
    assert refusals(given) == {said}


def ask_for_degrees(given: Coordinator, number: int, users: int = N_USERS) -> None:
    """Take a secure sum of the degrees, as before the first round."""
    assert given.directory is not None
    federation, plan = replace(given.federation, service_client=None), Plan("degrees", torch.arange(users))
    Round(given.grid, federation, given.directory, replace(given.blank(), round=number), plan).collect(secure=True)


@pytest.mark.parametrize(("algorithm", "number"), [(SECURE, -1), (ALGORITHM, -2)], ids=["not at all", "twice"])
def test_degrees_are_only_sent_where_they_are_due(
    stores: dict[int, Store], algorithm: PerFedRecPP, number: int
) -> None:
    given = coordinator(stores, algorithm=algorithm)
    assembled(given)
    with pytest.raises(AbortedError, match="in stage masked"):
        ask_for_degrees(given, number)
    assert refusals(given) == {f"phase: phase degrees came in round {number}; expected no phase"}


def test_degrees_are_sent_again_for_the_same_users_only(stores: dict[int, Store]) -> None:
    given = coordinator(stores)
    assembled(given)
    given.begin()
    ask_for_degrees(given, -1)
    with pytest.raises(AbortedError, match="in stage unmask"):
        ask_for_degrees(given, -1, N_USERS - 1)
    (said,) = refusals(given)
    assert said.startswith("failed: the sum of the item degrees of run a run was opened with other nodes or users")


def test_a_run_keeps_the_configuration_that_it_began_with(stores: dict[int, Store]) -> None:
    """Two configurations that a node's owner allows could together release more than the owner allows."""
    given = coordinator(stores, algorithm=SECURE, policies=dict.fromkeys(stores, "secure"))
    assembled(given)
    state, _ = given.play(given.begin())
    tighter = SECURE.settings.model_copy(update={"privacy": SECURE.settings.privacy.model_copy(update={"clip": 0.25})})
    change_terms(given, setup=configured(given, PerFedRecPP(tighter)))
    with pytest.raises(AbortedError, match="in stage masked"):
        given.play(copied(state))
    assert refusals(given) == {"failed: run a run began with another configuration; expected that one, or a new name"}


def test_waiting_ends(stores: dict[int, Store]) -> None:
    with pytest.raises(PerfedrecError, match=r"gave up waiting: 3 nodes and .*needed: 4"):
        assembled(coordinator(stores), nodes=4, seconds=0.0)


def test_users_without_an_identity_receive_one(tmp_path: Path) -> None:
    stores = {100 + i: store(tmp_path / f"{i}.node", users, named=i > 0) for i, users in enumerate(PARTS)}
    given = coordinator(stores)
    assembled(given)
    assert given.directory is not None
    assert given.directory.identities.unique().numel() == N_USERS
    assert stores[100].unregistered() == []
    places = given.directory.hosts[100]
    assert torch.equal(given.directory.identities[places], stores[100].everyone())
    state = given.begin()
    for _ in range(2):
        state, report = given.play(state)
        assert report.clients == report.cohort
    assert given.rejected == []


def change(name: str, new: Callable[[Any], Any]) -> Callable[[Message], Message]:
    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == 101 and reply.has_content() and "sums" in reply.content:
            tensors = unpack(reply.content.array_records["sums"])
            reply.content["sums"] = pack(tensors | {name: new(tensors[name])})
        return reply

    return tamper


def claim(reply: Message) -> Message:
    """Count one more user than there is."""
    if reply.metadata.src_node_id == 101 and reply.has_content() and "counts" in reply.content:
        counts: Any = reply.content.config_records["counts"]
        counts["clients"] += 1
    return reply


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (change("sums", lambda sums: sums * torch.nan), "not finite"),
        (change("sums", lambda sums: sums / 0), "not finite"),
        (change("sums", lambda sums: sums / 3), "range"),
        (change("weights", lambda weights: weights[:0]), "shape"),
        (change("sums", lambda sums: sums.repeat(400, 1)), "size"),
        (change("keys", lambda keys: keys.flip(0)), "keys"),
        (claim, "users"),
        (lambda reply: None if reply.metadata.src_node_id == 101 and "sums" in reply.content else reply, "late"),
    ],
)
def test_a_round_continues_without_a_node_whose_answer_is_refused(
    stores: dict[int, Store], tamper: Callable[[Message], Message | None], reason: str
) -> None:
    given = coordinator(stores, tamper, algorithm=ALONE)
    assembled(given)
    state = given.blank()  # without the question for degrees, where the node would fail as well
    state, report = given.play(state)
    assert report.clients == N_USERS - PARTS[1].numel()
    (found,) = given.rejected
    assert (found.node, found.round, found.reason, found.users) == (101, 0, reason, PARTS[1].numel())
    assert state.round == 1


def test_a_round_does_not_wait_for_a_node_that_is_not_connected(stores: dict[int, Store]) -> None:
    given = coordinator(stores)
    assembled(given)
    del given.grid.apps[102]  # type: ignore[attr-defined]
    _, report = given.play(given.begin())
    assert report.clients == N_USERS - PARTS[2].numel()
    assert {(each.node, each.reason) for each in given.rejected if each.round == 0} == {(102, "away")}


def test_the_digest_of_a_request_covers_everything_in_it() -> None:
    def content(number: int = 1, key: str = "a", values: object = (1.0, 2.0), shape: int = 2) -> RecordDict:
        array = Array("float32", (shape,), "numpy.ndarray", np.array(values, np.float32).tobytes())
        return RecordDict({"task": ConfigRecord({"round": number}), "own": ArrayRecord({key: array})})

    same = {**content(), "session": ConfigRecord({"number": 7})}
    others = [content(2), content(key="b"), content(values=(1.0, 3.0)), content(shape=3)]
    others.append(RecordDict({"task": content()["task"], "owns": content()["own"]}))
    assert digest(RecordDict(same), "session") == digest(content(), "session")
    assert len({digest(each, "session") for each in (content(), *others)}) == 6


def test_the_same_round_is_answered_with_the_same_sum(stores: dict[int, Store]) -> None:
    """A coordinator that died before it wrote its checkpoint asks again, and receives the same answers."""
    given = coordinator(stores)
    assembled(given)
    state = given.begin()
    for _ in ALGORITHM.phases:
        state, _ = given.play(state)
    again, held = copied(state), dict(given.service_client.tensors()) if given.service_client is not None else {}
    after, _ = given.play(state)
    change_terms(given, service_client=ServiceClient.of(SERVICE, held))
    twice, report = given.play(again)
    assert report.clients == report.cohort
    assert torch.equal(after.items, twice.items)
    assert given.rejected == []


class Forgetful:
    """A SuperLink that was killed with the first answers of each kind; with another ``code``, killed nodes."""

    def __init__(self, code: int = ErrorCode.MESSAGE_UNAVAILABLE) -> None:
        self.code, self.seen = code, set[tuple[int, str]]()

    def __call__(self, reply: Message) -> Message:
        about = reply.metadata.src_node_id, reply.metadata.message_type
        if about in self.seen:
            return reply
        self.seen.add(about)
        return make_message(metadata=reply.metadata, error=Error(self.code, ""))


@pytest.mark.parametrize("algorithm", [ALGORITHM, SECURE], ids=["with a service", "secure"])
def test_what_a_superlink_forgets_is_asked_again(algorithm: PerFedRecPP, tmp_path: Path) -> None:
    """Also during secure aggregation, where nodes must not answer twice."""
    ends = list[Any]()
    for tamper in (None, Forgetful()):
        folder = tmp_path / str(tamper is None)
        folder.mkdir()
        stores = {100 + i: store(folder / f"{i}.node", users) for i, users in enumerate(PARTS)}
        given = coordinator(stores, tamper, algorithm=algorithm)
        change_terms(given, deadline=600.0)
        assembled(given)
        state = given.begin()
        for _ in range(len(algorithm.phases) + 2):
            state, report = given.play(state)
            assert (report.aborted, report.clients) == (None, report.cohort)
        assert given.rejected == []
        assert given.hand_out(state) == list(stores)
        ends.append(flatten(state)[0])
    kinds = {kind for _, kind in tamper.seen} if isinstance(tamper, Forgetful) else set()
    stages = {f"train.{stage}" for stage in ("keys", "shares", "masked", "unmask")}
    assert kinds >= {"query", "query.model", *(stages if algorithm is SECURE else {"train", "train.serve"})}
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(each, ends[1][name]) for name, each in ends[0].items())


def test_nodes_that_had_left_are_asked_again_which_users_they_host(stores: dict[int, Store]) -> None:
    given = coordinator(stores, Forgetful(ErrorCode.NODE_UNAVAILABLE))
    assert assembled(given)[-1] == f"3 nodes and {N_USERS} users are present (needed: 3 and 1)"
    assert given.rejected == []


def test_the_model_is_sent_to_the_connected_nodes(stores: dict[int, Store]) -> None:
    given = coordinator(stores, algorithm=ALONE)
    assembled(given)
    grid: Any = given.grid
    del grid.apps[102]
    assert given.hand_out(given.blank()) == [100, 101]
    assert 102 not in {each.node for each in grid.sent if each.message.metadata.message_type == "query.model"}


def test_nodes_recommend_with_the_model_that_they_receive(stores: dict[int, Store]) -> None:
    given = coordinator(stores)
    assembled(given)
    state = given.begin()
    for _ in range(4):
        state, _ = given.play(state)
    assert given.hand_out(state) == [100, 101, 102]
    assert stores[101].served().run == "a run"
    known = set(population().rows(torch.tensor([11]))[0].items.tolist())
    with Node.open(stores[101].path) as node:
        items = [row["item"] for row in node.recommend("u11", 5)]
    assert len(items) == 5
    assert not known & set(map(int, items))


@pytest.mark.parametrize("users", [torch.arange(5, 20), torch.full((7,), NEWCOMER)], ids=["some", "nobody"])
def test_nodes_get_the_model_of_another_run_and_stay_in_their_own(
    stores: dict[int, Store], users: torch.Tensor
) -> None:
    """Those who took part in that run get what is theirs; all others are served as new users."""
    given = coordinator(stores, algorithm=ALONE)
    assembled(given)
    state, _ = given.play(given.begin())
    assert given.federation.setup is not None
    earlier = replace(given.federation.setup, run="an earlier run")
    assert given.hand_out_other(ALONE, state, users, earlier) == [100, 101, 102]
    for node, hosted in zip(stores, PARTS, strict=True):
        assert stores[node].served().run == "an earlier run"
        places = [users.tolist().index(each) if each in users else NEWCOMER for each in hosted.tolist()]
        expected = flatten(ALONE.broadcast(ALONE.serving(state), torch.tensor(places)))[0]
        found = flatten(stores[node].broadcast(ALONE.broadcast_type, hosted))[0]
        assert all(torch.equal(each, expected[name]) for name, each in found.items())
    assert not given.rejected
    assert given.play(state)[1].clients == N_USERS  # in the run of before


def test_a_node_runs_no_code_that_a_coordinator_names() -> None:
    with pytest.raises(ConfigError, match="does not come with perfedrec"):
        build('algorithm = "/tmp/evil.py:Method"')


def test_pre_trained_vectors_of_a_node_follow_it_to_a_new_key() -> None:
    start = pack({"sealed": torch.arange(3)})
    old = ServiceClient(SERVICE, {"start n0": start}, names={7: "n0", 8: "n1"})
    new = ServiceClient.of(SERVICE, old.tensors(), names={8: "n1", 9: "n0"})
    assert ["start" in new.add(node, RecordDict()) for node in (7, 8, 9)] == [False, False, True]
    assert torch.equal(unpack(new.add(9, RecordDict()).array_records["start"])["sealed"], torch.arange(3))
