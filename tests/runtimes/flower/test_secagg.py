"""Secure aggregation without messages: exact sums, drop-outs, what one upload reveals, and what a node refuses."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from scipy import stats

from perfedrec.core.aggregate import FIXED_POINT, reduce
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Update
from perfedrec.privacy.aggregation import EXACT, from_words, to_words
from perfedrec.runtimes.flower import secagg
from perfedrec.runtimes.flower.codec import UploadError
from perfedrec.runtimes.flower.secagg import AbortedError, Participant, Together, add_mask, choose_peers, threshold

STAGES = secagg.STAGES


def vectors(n: int, size: int = 50, seed: int = 0) -> dict[int, secagg.Words]:
    """Whole numbers between -2^52 and 2^52, modulo 2^64."""
    drawn = np.random.default_rng(seed).integers(-(2**52), 2**52, (n, size))
    return dict(enumerate(drawn.view(np.uint64)))


@effort(max_examples=15)
@given(
    st.integers(2, 7).flatmap(
        lambda n: st.tuples(st.just(n), st.sampled_from(STAGES), st.sets(st.integers(0, n - 1), max_size=n // 3))
    )
)
def test_up_to_a_third_may_drop_out_at_any_stage(case: tuple[int, str, set[int]]) -> None:
    n, stage, gone = case
    given = vectors(n)
    total, present = Together({stage: gone}).sum(given)
    assert present == set(given) - (set() if stage == "unmask" else gone)
    assert np.array_equal(total, sum((given[node] for node in present), np.zeros(50, np.uint64)))


@pytest.mark.parametrize("stage", STAGES)
def test_with_more_drop_outs_the_sum_is_aborted_in_that_stage(stage: str) -> None:
    with pytest.raises(AbortedError, match=f"aborted in stage {stage}") as caught:
        Together({stage: {0, 2, 5}}).sum(vectors(6))
    assert caught.value.stage == stage


def test_with_many_nodes_each_has_a_sample_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secagg, "MOST_PEERS", 6)
    peers = choose_peers(range(20), b"seed")
    assert {len(around) for around in peers.values()} == {6}
    assert all(node in peers[peer] for node, around in peers.items() for peer in around)
    assert peers != choose_peers(range(20), b"another")
    given = vectors(20)
    for stage in STAGES:
        total, present = Together({stage: {0, 7}}).sum(given)
        assert len(present) == (20 if stage == "unmask" else 18)
        assert np.array_equal(total, sum((given[node] for node in present), np.zeros(50, np.uint64)))


def test_thresholds() -> None:
    assert {n: threshold(n) for n in (2, 3, 4, 5, 6, 9, 33, 34, 1000)} == {
        **{2: 2, 3: 2, 4: 3, 5: 4, 6: 4, 9: 6, 33: 22},
        **{34: 10, 1000: 10},
    }
    # A third of 1,000 nodes drops out: how likely it is that a node of either kind has too few remaining peers.
    left, gone = stats.hypergeom(999, 666, 32).cdf(8), stats.hypergeom(999, 667, 32).cdf(9)
    assert 667 * left + 333 * gone < 0.003


def updates(n: int, clip: float) -> Update:
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(4).repeat(n)
    return Update(
        users=torch.arange(n),
        groups=torch.zeros(n, dtype=torch.int64),
        weights=torch.ones(n),
        segments=torch.arange(n).repeat_interleave(4),
        items=rows,
        deltas=(torch.rand(4 * n, 3, generator=generator) * 2 - 1) * clip,
        dense=(torch.rand(n, 2, generator=generator) * 2 - 1) * clip,
    )


@pytest.mark.parametrize("clip", [1e-6, 0.3, 10.0])
def test_the_sum_is_the_sum_in_the_clear_and_differs_from_the_exact_one_by_rounding_only(clip: float) -> None:
    n, given = 6, updates(6, clip)
    total, clear = Together()(given, 4, 1), reduce(given, 4, 1)
    assert torch.equal(total.keys, clear.keys)
    assert torch.equal(total.sums, clear.sums)
    assert total.dense is not None
    assert torch.equal(total.dense, clear.dense)
    assert given.deltas is not None
    bound = Fraction(n, 2 * int(FIXED_POINT))  # half a step for each client
    for item in range(4):
        for column in range(3):
            exact = sum(Fraction(float(each)) for each in given.deltas[given.items == item, column])
            off = abs(Fraction(float(total.sums[item, column])) / int(FIXED_POINT) - exact)
            assert off <= bound
    mean = given.deltas.abs().mean().item()
    assert clip > 1e-6 or float(bound) < 1e-4 * mean  # small changes are not lost


def test_an_impossible_sum_is_refused() -> None:
    like = reduce(updates(2, 1.0), 4, 1)
    words = to_words(like)
    assert torch.equal(from_words(words, 2, like).sums, like.sums)
    for wrong in (EXACT, -EXACT, -(2**63), 2**63 - 1):
        words[5] = wrong
        with pytest.raises(PerfedrecError, match="below 2"):
            from_words(words, 2, like)
    with pytest.raises(PerfedrecError, match="numbers"):
        from_words(words[1:], 2, like)
    like.sums[0, 0] = float(EXACT)
    with pytest.raises(PerfedrecError, match="too large to be exact"):
        to_words(like)


# --- what one upload reveals ---


def pair() -> tuple[Participant, Participant]:
    """Two nodes, ready to mask."""
    session = b"0" * 16
    nodes = Participant(3, session), Participant(8, session)
    keys = [node.keys() for node in nodes]
    sealed = [
        node.shares(session, 2, [other.node], [key["mask"]], [key["seal"]])["sealed"]
        for node, other, key in ((nodes[0], nodes[1], keys[1]), (nodes[1], nodes[0], keys[0]))
    ]
    nodes[0].receive(session, [8], sealed[1])
    nodes[1].receive(session, [3], sealed[0])
    return nodes


def test_an_upload_is_noise_whatever_is_in_it() -> None:
    """Keys have no seed. The limits are those that right masks pass but once in 10^10 times."""
    size = 200_000
    inputs = {
        "nothing": np.zeros(size, np.uint64),
        "one number": np.full(size, 5 << 36, np.uint64),
        "a wave": (np.sin(np.arange(size) / 50) * 2**45).astype(np.int64).view(np.uint64),
    }
    sent = {name: pair()[0].mask(each.copy()) for name, each in inputs.items()}
    for name, words in sent.items():
        octets = np.bincount(words.view(np.uint8), minlength=256)
        assert stats.chisquare(octets).pvalue > 1e-12, name
        assert stats.kstest(words / 2.0**64, "uniform").pvalue > 1e-12, name
        for bit in (0, 36, 52, 63):  # low bits, those of the fixed point, the sign
            assert abs(int(((words >> np.uint64(bit)) & np.uint64(1)).sum()) - size / 2) < 7 * (size / 4) ** 0.5
        follows = np.corrcoef(words[:-1] / 2.0**64, words[1:] / 2.0**64)[0, 1]
        assert abs(follows) < 7 / size**0.5, name
    signed = sent["a wave"].view(np.int64).astype(float)
    for other in (inputs["a wave"].view(np.int64).astype(float), sent["nothing"].view(np.int64).astype(float)):
        assert abs(np.corrcoef(signed, other)[0, 1]) < 7 / size**0.5


def test_the_mask_is_chacha20_of_all_bits_of_the_secret() -> None:
    """The first block under a known key, computed from the definition (RFC 8439, section 2.3)."""
    from hashlib import sha256

    key = sha256(b"perfedrec mask" + b"s").digest()
    state = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *np.frombuffer(key, "<u4").tolist(), 0, 0, 0, 0]
    work = state.copy()

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            work[x] = (work[x] + work[y]) % 2**32
            turned = work[z] ^ work[x]
            work[z] = ((turned << by) | (turned >> (32 - by))) % 2**32

    for _ in range(10):
        for column in range(4):
            quarter(column, column + 4, column + 8, column + 12)
        for a, b, c, d in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            quarter(a, b, c, d)
    block = np.array([(a + b) % 2**32 for a, b in zip(state, work, strict=True)], "<u4").view("<u8")
    words = np.zeros(100_000, np.uint64)
    add_mask(words, b"s", +1)
    assert np.array_equal(words[:8], block)
    assert len(np.unique(words)) == words.size  # no part of it comes twice
    add_mask(words, b"s", -1)
    assert not words.any()


# --- what a node refuses ---


def test_a_node_never_opens_both_secrets_of_one_node_and_never_answers_twice() -> None:
    node, _ = pair()
    for present, gone in (([3, 8], [8]), ([3], []), ([3, 8, 8], []), ([8], [3]), ([3, 8, 9], [])):
        with pytest.raises(PerfedrecError):
            node.unmask(node.session, present, gone)  # out of turn: nothing has been sent
    node.mask(np.zeros(4, np.uint64))
    for present, gone in (([3, 8], [8]), ([3], []), ([3, 8, 8], []), ([8], [3]), ([3, 8, 9], [])):
        with pytest.raises(PerfedrecError, match="each node whose shares are here once"):
            node.unmask(node.session, present, gone)
    with pytest.raises(PerfedrecError, match="expected 2 or more"):
        node.unmask(node.session, [3], [8])
    with pytest.raises(PerfedrecError, match="out of turn"):
        node.unmask(b"another session", [3, 8], [])
    assert set(node.unmask(node.session, [3, 8], [])) == {"present", "gone"}
    with pytest.raises(PerfedrecError, match="out of turn"):
        node.unmask(node.session, [3, 8], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1}, "does not protect"),
        ({"threshold": 2}, "does not protect"),  # two of the peers could open one secret, the other two the other one
        ({"threshold": 5}, "does not protect"),
        ({"threshold": 9, "peers": list(range(4, 36))}, "does not protect"),
        ({"peers": [1, 2, 3]}, "does not protect"),
        ({"peers": [1, 2, 2]}, "does not protect"),
        ({"mask_keys": [b"a", b"a", b"b"]}, "identical"),
        ({"session": b"another"}, "out of turn"),
    ],
)
def test_a_node_does_not_share_its_secrets_where_that_protects_nothing(change: dict[str, Any], message: str) -> None:
    node = Participant(3, b"session")
    node.keys()
    keys = {"mask_keys": [b"a", b"b", b"c"], "seal_keys": [b"d", b"e", b"f"]}
    asked: dict[str, Any] = {"session": b"session", "threshold": 3, "peers": [1, 2, 4], **keys}
    with pytest.raises(PerfedrecError, match=message):
        node.shares(**{**asked, **change})
    assert node.seed == b""


def test_a_node_accepts_only_shares_that_were_sealed_for_it_by_their_sender() -> None:
    session, nodes = b"0" * 16, [Participant(number, b"0" * 16) for number in range(3)]
    keys = [node.keys() for node in nodes]
    sealed = {}
    for node in nodes:
        others = [each for each in range(3) if each != node.node]
        public = [[keys[each][kind] for each in others] for kind in ("mask", "seal")]
        sealed[node.node] = dict(zip(others, node.shares(session, 2, others, *public)["sealed"], strict=True))
    torn = sealed[1][0][:-6] + b"AAAAA="
    for senders, texts, message in (
        ([1, 2], [sealed[2][0], sealed[1][0]], "not what it sealed"),  # each in the name of the other
        ([1, 2], [sealed[1][2], sealed[2][0]], "not what it sealed"),  # for another node
        ([1, 2], [torn, sealed[2][0]], "not what it sealed"),
        ([1, 5], [sealed[1][0], sealed[2][0]], "no peers"),
        ([1, 1], [sealed[1][0], sealed[1][0]], "no peers"),
        ([], [], "expected 1 or more"),
    ):
        with pytest.raises(PerfedrecError, match=message):
            Participant(**nodes[0].record()).receive(session, senders, texts)
    nodes[0].receive(session, [2, 1], [sealed[2][0], sealed[1][0]])
    assert nodes[0].holders == [0, 2, 1]


def test_a_node_accepts_no_keys_for_which_their_node_does_not_vouch() -> None:
    secret, session = b"s" * 32, b"0" * 16
    fresh = {node: Participant(node, session).keys(secret) for node in (1, 2, 4)}
    second = Participant(2, session).keys(secret)

    def shared(two: dict[str, bytes], secret: bytes = secret) -> Participant:
        """Node 3, asked for shares with the keys ``two`` as those of node 2."""
        node, public = Participant(3, session), [fresh[1], two, fresh[4]]
        node.keys(secret)
        given = [[each[name] for each in public] for name in ("mask", "seal", "voucher")]
        node.shares(session, 3, [1, 2, 4], *given, secret=secret)
        return node

    for good in (fresh[2], second):
        assert shared(good).next == "masked"
    for bad in (
        fresh[2] | {"mask": second["mask"]},  # a key of the coordinator, with the voucher for another key
        fresh[2] | {"seal": second["seal"]},
        second | {"mask": second["seal"], "seal": second["mask"]},
        Participant(5, session).keys(secret),  # those of another node, in the name of node 2
        Participant(2, session).keys(b"t" * 32),  # of a process that does not have the secret
        Participant(2, session).keys(),
        Participant(2, b"1" * 16).keys(secret),  # of another sum
    ):
        with pytest.raises(UploadError, match="in the name of node 2, which does not vouch") as error:
            shared(bad)
        assert error.value.reason == "unvouched"
        assert shared(bad, secret=b"").next == "masked"  # a node without a secret trusts the coordinator
