"""Secure aggregation over messages: drop-outs at each stage, what the coordinator sees, and noise that survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from tests.parity.federation import SINGLE, Twins, settings

from perfedrec import configure
from perfedrec.core.aggregate import FIXED_POINT, Aggregate
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.records import flatten
from perfedrec.privacy.aggregation import to_words
from perfedrec.privacy.protection import Protection
from perfedrec.runtimes.flower import codec, secagg, secure_sum
from perfedrec.runtimes.flower.secagg import STAGES, AbortedError

SIX = (4, 4, 4, 4, 4, 3)
SECURE = {"aggregation": "secure", "norm": "l2", "clip": 0.5}
NOISE = {"degrees": 2.0, "spectral": 2.0, "join": 2.0, "training": 2.0}
SUMS = {"kind": "spectral", "cluster_passes": 0}
EVERYONE = {"n_clients_per_round": 23}
Tamper = Callable[[Message], Message | None]


def secure(sizes: tuple[int, ...], tamper: Tamper | None = None, **privacy: Any) -> Twins:
    options = SECURE | {"dropout_tolerance": 0.4} | privacy
    clusters = {"n_clusters": 0} if "noise" in privacy else {}  # their sizes are summed without noise
    return Twins(settings(pretraining=SUMS, privacy=options, selection=EVERYONE, clusters=clusters), sizes, tamper)


def silent(stage: str, *nodes: int) -> Tamper:
    """Replies of these nodes in a stage are lost."""

    def tamper(reply: Message) -> Message | None:
        lost = reply.metadata.src_node_id in nodes and reply.metadata.message_type == f"train.{stage}"
        return None if lost else reply

    return tamper


def asked_in(twins: Twins, stage: str) -> set[int]:
    """The nodes to which messages of a stage went."""
    return {
        sent.node for sent in twins.grid.sent if not sent.up and sent.message.metadata.message_type == f"train.{stage}"
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_third_of_the_nodes_drops_out_at_each_stage_and_the_rounds_are_those_of_the_rest(stage: str) -> None:
    torn, whole = secure(SIX, silent(stage, 101, 104)), secure(SIX)
    if stage != "unmask":  # by then their vectors are in the sum
        for node in (101, 104):
            whole.hosts.pop(node)
    for _ in range(len(torn.algorithm.phases) + 2):
        reports = torn.play(), whole.play()
        assert reports[0].aborted is None
        assert reports[0].clients == reports[1].clients
        for (name, a), (_, b) in zip(flatten(torn.flower)[0].items(), flatten(whole.flower)[0].items(), strict=True):
            assert torch.equal(a, b), name
    assert float(torn.flower.items.abs().max()) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_a_round_is_aborted_with_its_reason(stage: str) -> None:
    twins = secure(SIX)
    for _ in range(len(twins.algorithm.phases)):
        twins.play()
    items, twins.grid.tamper = twins.flower.items.clone(), silent(stage, 101, 102, 104)
    report = twins.play()
    assert report.aborted is not None
    assert f"aborted in stage {stage}" in report.aborted
    assert report.clients == 0
    assert torch.equal(twins.flower.items, items)
    twins.grid.tamper = None
    assert twins.play().aborted is None  # a new session works

    early = secure(SIX, silent(stage, 101, 102, 104))
    with pytest.raises(AbortedError, match=stage):
        early.play()
    assert early.flower.round == 0
    early.grid.tamper = None
    assert early.play().clients == 23
    early.simulate()
    assert early.difference() == 0


@pytest.mark.parametrize("rank", [0, 6], ids=["rows", "basis"])
def test_updates_of_low_rank_are_summed_securely(rank: int) -> None:
    """CoLR's nodes mask three numbers for each row, not the eight of an item vector."""
    options = ("model.embedding_dim=8", "update.rank=3", "privacy.aggregation=secure", f"privacy.rank={rank}")
    algorithm = configure("colr", overrides=[*options, "selection.n_clients_per_round=23"]).build()
    twins = Twins(settings(), SIX, algorithm=algorithm)
    for _ in range(len(algorithm.phases) + 2):
        twins.grid.sent.clear()
        assert twins.simulate().clients == twins.play().clients == 23
        assert twins.difference() <= 1e-5
    masked = [each.message for each in twins.grid.sent if each.up]
    masked = [each for each in masked if each.metadata.message_type == "train.masked"]
    rows = algorithm.n_rows(twins.flower)
    assert rows == (60 if rank == 0 else twins.flower.basis.shape[1])
    for each in masked:
        numbers = sum(array.numpy().size for record in each.content.array_records.values() for array in record.values())
        assert rows * 3 <= numbers < rows * 8
    assert len(masked) == 6


def test_a_sum_of_too_few_clients_is_not_opened() -> None:
    twins = secure(SIX, silent("masked", 101, 104), noise=NOISE, dropout_tolerance=0.05)
    with pytest.raises(AbortedError, match="15 clients are too few"):
        twins.play()
    assert asked_in(twins, "unmask") == set()

    alone = secure((23,))
    with pytest.raises(AbortedError, match="1 node answered, and 2 are needed"):
        alone.play()  # the sum would be the node's upload
    assert asked_in(alone, "shares") == set()


def test_a_node_that_fails_has_dropped_out() -> None:
    twins = secure(SIX)
    twins.nodes[102].client_state.private[0] = torch.nan
    for _ in range(2 + len(twins.algorithm.phases)):
        report = twins.play()
    assert report.aborted is None
    assert bool(twins.flower.items.isfinite().all())


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_be_read_counts_as_a_drop_out(stage: str) -> None:
    def spoil(reply: Message) -> Message:
        if reply.metadata.src_node_id == 102 and reply.metadata.message_type == f"train.{stage}":
            if stage == "masked":
                reply.content[secure_sum.VECTOR] = codec.pack({secure_sum.VECTOR: torch.zeros(3, dtype=torch.int64)})
            else:
                reply.content[secure_sum.RECORD] = ConfigRecord({"mask": b"no key", "seal": b"no key"})
        return reply

    twins = secure(SIX, spoil)
    assert twins.play().clients == (23 if stage == "unmask" else 19)


def test_shares_that_do_not_belong_together_open_nothing() -> None:
    def spoil(reply: Message) -> Message:
        if reply.metadata.src_node_id == 100 and reply.metadata.message_type == "train.unmask":
            answer = dict(reply.content.config_records[secure_sum.RECORD].items())
            present = [share[:5] + bytes([share[5] ^ 1]) + share[6:] for share in answer["present"]]
            reply.content[secure_sum.RECORD] = ConfigRecord({"present": present, "gone": answer["gone"]})
        return reply

    with pytest.raises(AbortedError, match="aborted in stage unmask"):
        secure((8, 8, 7), spoil).play()


def test_a_node_answers_nothing_but_the_stages() -> None:
    twins = secure(SIX)
    twins.play()
    asked = next(sent.message for sent in twins.grid.sent if sent.message.metadata.message_type == "train.masked")
    for kind, message in (("train", "secure sums only"), ("train.masked", "out of turn"), ("train.unmask", "read")):
        again = Message(asked.content, dst_node_id=100, message_type=kind)
        (answer,) = twins.grid.send_and_receive([again])
        assert answer.has_error()
        assert message in answer.error.reason


# --- what the coordinator sees ---


def traffic(twins: Twins) -> bytes:
    return b"|".join(content for sent in twins.grid.sent for content in sent.objects.values())


@pytest.mark.parametrize("sizes", [(1, 1, 1, 20), SIX], ids=["users on their own", "many users a node"])
def test_no_message_holds_a_nodes_vector_or_secret(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[torch.Tensor] = []
    secrets: list[bytes] = []

    def kept(total: Aggregate) -> torch.Tensor:
        words = to_words(total)
        plain.append(words.clone())
        return words

    class Watched(secagg.Participant):
        def record(self) -> dict[str, Any]:
            private = secagg.bytes_to_private_key(self.mask_key).private_numbers().private_value
            secrets.extend(each for each in (self.seed, self.mask_key, self.seal_key) if each)
            secrets.append(private.to_bytes(48, "big"))
            return super().record()

    monkeypatch.setattr(secure_sum, "to_words", kept)
    monkeypatch.setattr(secure_sum, "Participant", Watched)
    twins = secure(sizes, rank=0)  # as in the clear, below
    for _ in range(len(twins.algorithm.phases) + 2):
        twins.play()
    seen = traffic(twins)
    assert len(secrets) > 100
    assert not any(secret in seen for secret in secrets)

    def pieces(kind: torch.dtype) -> list[bytes]:
        """Every seventh pair of neighbouring numbers that are not 0."""
        pairs = torch.cat([words[: words.numel() // 2 * 2].view(-1, 2) for words in plain])
        return [each.numpy().tobytes() for each in pairs[(pairs != 0).all(1)][::7].to(kind)]

    wide, narrow = pieces(torch.float64), pieces(torch.float32)  # an upload in the clear has one of these forms
    assert len(wide) > 400
    assert not any(piece in seen for piece in [*wide, *narrow, *pieces(torch.int64)])

    monkeypatch.undo()  # the search finds what is sent in the clear
    clear = secure(sizes, aggregation="dense")
    for _ in range(len(clear.algorithm.phases) + 2):
        clear.play()
    shown = traffic(clear)
    found = sum(either in shown or piece in shown for either, piece in zip(wide, narrow, strict=True))
    assert found > 0.97 * len(wide)  # except those of the coordinator's example


# --- noise ---


def test_the_noise_of_a_sum_survives_drop_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the remaining nodes has the deviation that they added, which is at least the accounted one."""
    twins = secure(SIX, silent("masked", 101, 104), noise=NOISE, dropout_tolerance=0.4)
    protection, exact, opened = twins.algorithm.protection, list[torch.Tensor](), list[torch.Tensor]()
    add_noise = Protection.add_noise

    def noted(given: Protection, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        exact.append(to_words(aggregate))
        return add_noise(given, phase, aggregate, asked, key)

    def server(state: Any, phase: str, aggregate: Aggregate, key: Any) -> Any:
        opened.append(to_words(aggregate))
        return type(twins.algorithm).server(twins.algorithm, state, phase, aggregate, key)

    monkeypatch.setattr(Protection, "add_noise", noted)
    monkeypatch.setattr(twins.algorithm, "server", server)
    places = [place for place, node in enumerate(twins.hosts) if node not in (101, 104)]
    for phase in (each.name for each in twins.algorithm.phases):
        exact.clear()
        opened.clear()
        report = twins.play()
        assert report.clients == 15
        noise = ((opened[0] - sum(exact[place] for place in places)) / FIXED_POINT).numpy()
        accounted = protection.share_scale(phase, 23)[1] * protection.fewest(23) ** 0.5
        expected = accounted * (15 / protection.fewest(23)) ** 0.5
        error = 4 / (2 * noise.size) ** 0.5
        assert abs(noise.std() / expected - 1) < error, phase
        assert accounted <= expected
        assert abs(noise.mean()) < 4 * expected / noise.size**0.5
    assert accounted == pytest.approx(2.0)


def test_one_user_a_node_with_few_peers_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secagg, "MOST_PEERS", 8)
    twins = secure(SINGLE)
    predicted, played = twins.simulate(), twins.play()
    assert twins.difference() == 0
    assert played.bytes_up_max == predicted.bytes_up_max - 8 + 128  # no group and weight, but numpy's header
    peers = [
        len(np.atleast_1d(sent.message.content.config_records[secure_sum.RECORD]["peers"]))
        for sent in twins.grid.sent
        if not sent.up and sent.message.metadata.message_type == "train.shares"
    ]
    assert peers == [8] * 23


def test_user_vectors_do_not_go_through_secure_aggregation() -> None:
    like = replace(Aggregate.empty(3, 1), reports=torch.zeros(1, 1, 2))
    with pytest.raises(PerfedrecError, match="takes sums"):
        secure_sum.secure_sum(lambda *_: [], lambda *_: None, {}, {}, like, 0)
