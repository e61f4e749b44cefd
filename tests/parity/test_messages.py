"""What travels between coordinator and nodes, and what the coordinator refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from tests.parity.federation import DIM, LAYOUT, N_ITEMS, N_USERS, PROTECTED, SINGLE, UNEQUAL, Twins, settings
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.records import flatten
from perfedrec.core.types import Update
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runtimes.flower.codec import Instructions, Task, array_bytes, pack, unpack

DOWN = {"users", "present", "broadcast.groups", "broadcast.items", "broadcast.degrees", "broadcast.tokens"}
UP = {"keys", "sums", "weights", "report_users", "reports"}
NUMPY_HEADER = 128


def tensors_of(message: Message) -> dict[str, Tensor]:
    """All arrays of a message; those of a group are ``group g/name``."""
    found: dict[str, Tensor] = {}
    for name, record in message.content.array_records.items():
        prefix = f"{name}/" if name.startswith("group") else ""
        found |= {prefix + each: tensor for each, tensor in unpack(record).items()}
    return found


def test_packing_keeps_every_bit_in_one_array_per_type() -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 5),
        "b": torch.arange(6).reshape(1, 2, 3),
        "yes": torch.tensor([True, False]),
        "turned": torch.randn(4, 3).T,
    }
    record = pack(tensors)
    assert sorted(array.dtype for array in record.values()) == ["bool", "float32", "int32"]  # small whole numbers
    assert sorted(key.split(" ")[0] for key in record) == ["bool", "float32", "int64"]
    for name, tensor in unpack(record).items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert tensor.numpy().tobytes() == tensors[name].contiguous().numpy().tobytes()


def test_messages_hold_the_broadcast_or_the_sum_and_nothing_else() -> None:
    twins = Twins(settings(pretraining={"kind": "contrastive"}, privacy=PROTECTED), UNEQUAL)
    for number in range(6):
        state, first = twins.flower, len(twins.grid.sent)
        phase = twins.play().phase
        for sent in twins.grid.sent[first:]:
            got, hosted = tensors_of(sent.message), twins.hosts[sent.node]
            shapes = {name: tuple(tensor.shape) for name, tensor in got.items()}
            if sent.up:
                assert got.keys() == UP | ({"edges"} if phase == "join" else set())
                assert set(sent.message.content.config_records["counts"]) == {"n_items", "clients"}
                assert torch.isin(got["report_users"], hosted).all()
                assert shapes["reports"] == (got["report_users"].numel(), 2, DIM)
                assert shapes["weights"] == (1 if state.clusters.labels is None else 3,)
                assert shapes["sums"] == ((0, 0) if phase == "join" else (got["keys"].numel(), DIM))
                if phase == "join":
                    assert shapes["edges"][1:] == (3,)
                    assert torch.isin(got["edges"][:, 1], hosted).all()
                continue
            users = got["users"]
            groups = torch.zeros_like(users) if state.clusters.labels is None else state.clusters.labels[users]
            optional = {"broadcast.neighbours", "broadcast.start"} if number else set()
            tables = (
                {f"group {group}/broadcast.offsets" for group in groups.tolist()}
                if state.clusters.labels is not None
                else set()
            )
            assert got.keys() == DOWN | optional | tables  # only the tables of the clusters of its users
            assert torch.isin(users, hosted).all()
            assert torch.equal(got["present"][got["broadcast.groups"]], groups)
            assert set(sent.message.content.config_records["task"]) == {
                "phase",
                "round",
                "n_groups",
                "asked",
                "broadcast.cluster_stats",
                "broadcast.trained",
            }  # no key, no seed
            assert shapes["broadcast.items"] == (N_ITEMS, DIM)
            for name in tables:
                assert shapes[name] == (N_ITEMS, DIM)
            if number:
                assert torch.equal(got["broadcast.start"], state.service.start[users])  # of its own users only
    assert twins.flower.clusters.labels is not None


def secrets(twins: Twins) -> list[bytes]:
    """The exact numbers in the users' client states."""
    found = []
    for node in twins.nodes.values():
        client_state = flatten(node.load_client_states(node.users, node.rows(node.users)[1]))[0]
        for name in ("private", "first", "rows"):
            found += [vector.numpy().tobytes() for vector in client_state[name] if vector.any()]
    return found


def leaks(privacy: dict[str, float]) -> tuple[int, int]:
    """How many exact vectors, and how many complete lists of a user's items, can be found in four rounds' traffic."""
    twins = Twins(settings(privacy=privacy), SINGLE)
    hidden = secrets(twins)
    for _ in range(4):
        twins.play()
        hidden += secrets(twins)
    traffic = b"|".join(content for sent in twins.grid.sent for content in sent.objects.values())
    items = [node.items for node in twins.nodes.values()]
    listed = {tuple(twins.flower.tokens[each].tolist()) for each in items}
    joins = [tensors_of(sent.message) for sent in twins.grid.sent if sent.up]
    lists = listed & {tuple(each["edges"][:, 2].tolist()) for each in joins if "edges" in each}
    return (
        sum(vector in traffic for vector in hidden),
        sum(each.numpy().tobytes() in traffic for each in items) + len(lists),
    )


def test_no_message_holds_a_users_vector_or_list_of_items() -> None:
    assert leaks(PROTECTED) == (0, 0)
    vectors, lists = leaks({})
    assert vectors >= N_USERS  # the search finds what is not protected: the reports of layer 0 ...
    assert lists >= N_USERS  # ... and the edges


@pytest.mark.parametrize("sizes", [SINGLE, UNEQUAL], ids=["one user a node", "many users a node"])
def test_an_upload_costs_what_its_users_contribute(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of one user takes 4 bytes a number and 4 for its key, as an update counts; that of several users takes
    8 a number where 4 would lose something, and rows that users share travel once.

    On top come three headers of numpy, 4 bytes for each reporting user and each group, and 12 instead of 4 for an edge.
    """
    twins = Twins(settings(privacy=PROTECTED), sizes)
    given: list[Update] = []

    def client(*args: Any) -> tuple[Update, Any]:
        update, client_state = PerFedRecPP.client(twins.algorithm, *args)
        given.append(update)
        return update, client_state

    monkeypatch.setattr(twins.algorithm, "client", client)
    for _ in range(5):
        given.clear()
        groups, first = twins.algorithm.n_groups(twins.flower), len(twins.grid.sent)
        report = twins.play()
        uploads = [sent.message.content for sent in twins.grid.sent[first:] if sent.up]
        for content, each in zip(uploads, given[1:], strict=True):  # the first is the coordinator's example
            size, counted, users = array_bytes(content), int(each.upload_bytes().sum()), each.users.numel()
            edges = 0 if each.edges is None else each.edges.shape[0]
            rows = 0 if each.segments is None else (each.groups[each.segments] * N_ITEMS + each.items).unique().numel()
            alone = users == 1 or not rows
            fixed = 3 * NUMPY_HEADER + (4 if alone else 8) * groups + 4 * users + 12 * edges
            numbers = rows * (4 + (4 if alone else 8) * DIM) + users * 4 * 2 * DIM
            assert size in (fixed + numbers, fixed + numbers - (0 if alone else rows * 4 * DIM + 4 * groups))
            assert size <= fixed + counted if alone else size <= fixed + 2 * counted
        assert report.bytes_up == sum(map(array_bytes, uploads))
        assert report.bytes_up_max == max(map(array_bytes, uploads))


def test_shared_tables_are_one_object_for_all_nodes() -> None:
    twins = Twins(settings(), UNEQUAL)
    for _ in range(3):
        first = len(twins.grid.sent)
        twins.play()
    down = [sent for sent in twins.grid.sent[first:] if not sent.up]
    apart, together = sum(len(sent.objects) for sent in down), len({name for sent in down for name in sent.objects})
    assert max(len(sent.objects) for sent in down) <= 26  # four records and three groups, two arrays and chunks each
    assert together < 0.7 * apart


# --- what is refused ---


def change(name: str, new: Callable[[Tensor], Tensor | None]) -> Callable[[Message], Message]:
    """Replace the array ``name`` in the reply of node 102, or remove it (``None``)."""

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == 102 and reply.has_content():
            tensors = unpack(reply.content.array_records["sums"])
            changed = new(tensors.pop(name))
            reply.content["sums"] = pack(tensors if changed is None else tensors | {name: changed})
        return reply

    return tamper


def relabel(reply: Message) -> Message:
    """An array that holds fewer numbers than its name says."""
    if reply.metadata.src_node_id == 102:
        arrays = reply.content.array_records["sums"]
        reply.content["sums"] = ArrayRecord({key: Array(array.numpy()[:-1]) for key, array in arrays.items()})
    return reply


def miscount(reply: Message) -> Message:
    if reply.metadata.src_node_id == 102:
        reply.content["counts"] = ConfigRecord({"n_items": N_ITEMS, "clients": 400})
    return reply


def silence(reply: Message) -> Message | None:
    return None if reply.metadata.src_node_id == 102 else reply


def spoil(values: Tensor) -> Tensor:
    values = values.clone()
    values.view(-1)[3] = torch.nan
    return values


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change("reports", lambda reports: reports[:, :, :-1]), r"array reports: expected torch.float32 .*8\], got"),
        (change("reports", lambda reports: reports[:-1]), "one report of each user"),
        (change("reports", lambda reports: reports.double()), "expected torch.float32 .* got torch.float64"),
        (change("reports", spoil), "array reports holds numbers that are not finite"),
        (change("reports", lambda _: None), "expected the arrays"),
        (change("report_users", lambda users: (users + 1) % N_USERS), "one report of each user"),
        (change("sums", lambda sums: sums.float()), "array sums: expected torch.float64"),
        (change("sums", lambda sums: sums[:, :3]), "array sums"),
        (change("sums", lambda sums: sums + 0.5), "array sums is not in fixed point"),
        (change("sums", lambda sums: sums * 2.0**60), "array sums is not in fixed point"),
        (change("keys", lambda keys: keys + N_ITEMS), "array keys"),
        (change("keys", lambda keys: keys.flip(0)), "array keys"),
        (change("keys", lambda keys: keys[1:]), "array keys"),
        (change("weights", lambda weights: weights.repeat(2)), "array weights"),
        (relabel, "cannot be read"),
        (miscount, "expected .* clients"),
    ],
)
def test_an_impossible_reply_is_refused_and_its_node_named(tamper: Callable[[Message], Message], message: str) -> None:
    twins = Twins(settings(model={"neighbours": False}), UNEQUAL, tamper)
    items = twins.flower.items.clone()
    with pytest.raises(PerfedrecError, match=rf"round 0 \(train\), reply of node 102: .*{message}"):
        twins.play()
    assert twins.flower.round == 0
    assert torch.equal(twins.flower.items, items)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (lambda edges: edges + torch.tensor([0, 0, N_ITEMS]), "array edges"),
        (lambda edges: edges.clamp(max=0), "array edges"),
        (lambda edges: edges[:, :2], "array edges: expected torch.int64"),
    ],
)
def test_impossible_edges_are_refused(new: Callable[[Tensor], Tensor], message: str) -> None:
    twins = Twins(settings(), UNEQUAL, change("edges", new))
    assert 0 not in twins.hosts[102]
    with pytest.raises(PerfedrecError, match=rf"round 0 \(join\), reply of node 102: {message}"):
        twins.play()


def test_a_node_that_fails_or_is_silent_is_named() -> None:
    twins = Twins(settings(), UNEQUAL, silence)
    with pytest.raises(PerfedrecError, match=r"reply of node 102: no reply"):
        twins.play()

    twins = Twins(settings(), UNEQUAL)
    twins.nodes[102].client_state.private[0] = torch.nan
    with pytest.raises(PerfedrecError, match=r"reply of node 102: .*not finite"):
        twins.play()

    twins = Twins(settings(), UNEQUAL)
    twins.hosts[102] = torch.cat([twins.hosts[102], twins.hosts.pop(101)])  # the coordinator has wrong hosts
    with pytest.raises(PerfedrecError, match=r"reply of node 102: .* does not host"):
        twins.play()


def test_an_instruction_with_something_missing_is_refused() -> None:
    twins = Twins(settings(), UNEQUAL)
    content = Instructions(twins.algorithm, twins.flower, "join", N_USERS, torch.arange(N_USERS)).content(
        twins.hosts[102]
    )
    for name in ("own", "shared", "task"):
        with pytest.raises(PerfedrecError, match=f"came without '{name}'"):
            Task.read(RecordDict({key: record for key, record in content.items() if key != name}), LAYOUT, None)
