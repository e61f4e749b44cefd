"""SecAgg+ (Bell et al., CCS 2020): what every node of a sum does, and what the coordinator does to open the sum alone.

A node adds to its vector a mask of its own and one for each peer, of which one end adds what the other takes off. It
shares the secrets that its masks follow from among its peers (Shamir), so that the masks of those who stay can be taken
off, and those of the ones who drop out completed, as long as a ``threshold`` of a node's peers answers. Four stages:

======== =================================================== ==================================================
stage    the coordinator sends                               a node answers
======== =================================================== ==================================================
keys     the session's number                                two public keys, made for this sum, and a voucher
shares   threshold, and the peers' public keys and vouchers  for each peer shares of both secrets, sealed for it
masked   the shares sealed for the node, and its instruction its masked vector
unmask   which peers are in the sum, and which dropped out   shares of the seeds of the former, keys of the latter
======== =================================================== ==================================================

Vectors are whole numbers modulo 2^64 and sums exact. Key pairs, key agreement (ECDH on P-384), sealing (Fernet) and
Shamir shares are Flower's. Two of its parts are not used: its masks come from a Mersenne Twister with a seed of 32 bits
(the 256 bits agreed upon, folded by XOR), which can be tried out, so masks here are a key stream of ChaCha20; and its
quantisation to float64 steps is lossy, where sums here are in fixed point already.

Nodes that have a secret in common, which the coordinator does not have, vouch for their keys with it (HMAC-SHA256) and
take no others: a coordinator that relays keys of its own, or invents nodes, gets no answer. Without one it is trusted
to relay what it was given (honest but curious).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from perfedrec.core.aggregate import Aggregate, reduce
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Update
from perfedrec.privacy.aggregation import alone, from_words, to_words
from perfedrec.runtimes.flower.codec import UploadError

Words = np.ndarray[Any, np.dtype[np.uint64]]
Values = dict[str, Any]

Ask = Callable[[str, Mapping[int, Values]], Iterable[tuple[int, Values]]]
"""Sends nodes what a stage tells them and gives what they answer, each at most once and as it comes."""

Refuse = Callable[[int, str], None]
"""Takes note of a node whose answer cannot be used, and why: to the sum it has dropped out."""

STAGES = ("keys", "shares", "masked", "unmask")
MOST_PEERS = 32
"""Peers of a node. With more nodes than this the peers are a random sample of them: the work of a node does not grow
with their number."""

_SCALAR = 48  # bytes of a private key of P-384
_BLOCK = 1 << 15  # words of a mask made at a time: they stay in the cache


class AbortedError(PerfedrecError):
    """A sum that is not opened, because in a ``stage`` too few nodes answered, or too few clients stand behind it.

    It may be taken later: ``exit_code`` is that of what can be tried again.
    """

    exit_code = 3

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"secure aggregation is given up in stage {stage}: {reason}")
        self.stage, self.reason = stage, reason


def threshold(n: int) -> int:
    """How many of ``n`` nodes, a node with its peers, it takes to open a secret of one of them: all but a third.

    Where the peers are a sample of the nodes, a third drops out of each sample only on average. Then it takes 30 %:
    when a third of 1,000 nodes drops out, all samples have so many left but for 3 sums in 1,000.
    """
    return n - n // 3 if n <= MOST_PEERS + 1 else lowest(MOST_PEERS + 1)


def lowest(n: int) -> int:
    """The least threshold that a node takes part with."""
    return max(2, 3 * n // 10 + 1)


def least(n: int) -> int:
    """The least threshold that a node with ``n - 1`` peers takes part with: what is due among ``n`` nodes, unless there
    may be many more of them. With two thirds a coordinator cannot have both secrets of a node opened by telling some
    of its peers that it is in the sum and others that it is not."""
    return threshold(n) if n <= MOST_PEERS else lowest(n)


def voucher(secret: bytes, session: bytes, node: int, mask: bytes, seal: bytes) -> bytes:
    """What a node says for its two public keys to those who know the ``secret``; nothing where it knows none."""
    parts = b"".join(len(each).to_bytes(4, "little") + each for each in (session, str(node).encode(), mask, seal))
    return hmac.digest(secret, b"perfedrec secagg keys" + parts, sha256) if secret else b""


def circle(nodes: Collection[int], seed: bytes) -> dict[int, list[int]]:
    """The peers of each node: all others, or the ``MOST_PEERS`` nearest on a circle in random order (Harary graph)."""
    order = sorted(nodes, key=lambda node: sha256(seed + node.to_bytes(8, "little")).digest())
    n, reach = len(order), MOST_PEERS // 2
    if n <= MOST_PEERS + 1:
        return {node: [other for other in order if other != node] for node in order}
    return {
        node: [order[(place + step) % n] for step in range(-reach, reach + 1) if step]
        for place, node in enumerate(order)
    }


def add_mask(words: Words, secret: bytes, sign: int) -> None:
    """Add to ``words`` [D], or take off, the key stream of ChaCha20 that a ``secret`` names, modulo 2^64, in place."""
    stream = Cipher(algorithms.ChaCha20(sha256(b"perfedrec mask" + secret).digest(), bytes(16)), None).encryptor()
    zeros, out = bytes(8 * min(_BLOCK, words.size)), bytearray(8 * min(_BLOCK, words.size))
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, words.size, _BLOCK):
        part = words[start : start + _BLOCK]
        stream.update_into(memoryview(zeros)[: part.nbytes], out)
        combine(part, np.frombuffer(out, "<u8", part.size), out=part)


@dataclass
class Participant:
    """A node's side of one sum: its secrets, which never leave it, and the stage that it expects ``next``.

    Every method raises :class:`PerfedrecError` where the coordinator asks for something that the protocol has not: in
    particular for both secrets of one node, with which its vector could be seen.
    """

    node: int
    session: bytes
    next: str = "keys"
    threshold: int = 0
    mask_key: bytes = b""
    seal_key: bytes = b""
    seed: bytes = b""
    peers: list[int] = field(default_factory=list)
    mask_keys: list[bytes] = field(default_factory=list)
    seal_keys: list[bytes] = field(default_factory=list)
    holders: list[int] = field(default_factory=list)
    seed_shares: list[bytes] = field(default_factory=list)
    key_shares: list[bytes] = field(default_factory=list)

    def keys(self, secret: bytes = b"") -> Values:
        """Stage 1: fresh key pairs, one to agree on masks and one to seal shares; with a ``secret`` that nodes have in
        common, vouched for."""
        self._in("keys", self.session)
        (mask, mask_public), (seal, seal_public) = generate_key_pairs(), generate_key_pairs()
        self.mask_key, self.seal_key = private_key_to_bytes(mask), private_key_to_bytes(seal)
        self.next = "shares"
        public = {"mask": public_key_to_bytes(mask_public), "seal": public_key_to_bytes(seal_public)}
        return public | {"voucher": voucher(secret, self.session, self.node, **public)}

    def shares(
        self,
        session: bytes,
        threshold: int,
        peers: list[int],
        mask_keys: list[bytes],
        seal_keys: list[bytes],
        vouchers: Sequence[bytes] = (),
        secret: bytes = b"",
    ) -> Values:
        """Stage 2: shares of the seed of the node's own mask and of its key, one of each for every peer.

        With a ``secret`` :class:`UploadError` is raised for keys that are not vouched for with it.
        """
        self._in("shares", session)
        n = len(peers) + 1
        if not least(n) <= threshold <= n or self.node in peers or len(set(peers)) != len(peers):
            raise PerfedrecError(f"a threshold of {threshold} for {n} nodes does not protect them")
        if len({*mask_keys, *seal_keys}) != 2 * len(peers):
            raise PerfedrecError("some public keys are identical; expected two keys of its own for every peer")
        given = dict(zip(peers, vouchers, strict=False))
        for peer, mask, seal in zip(peers, mask_keys, seal_keys, strict=True):
            wanted = voucher(secret, session, peer, mask, seal)
            if secret and not hmac.compare_digest(given.get(peer, b""), wanted):
                raise UploadError("unvouched", f"keys came as if from node {peer}, and it does not vouch for them")
        self.threshold, self.peers, self.mask_keys, self.seal_keys = threshold, peers, mask_keys, seal_keys
        self.seed = os.urandom(32)
        own = bytes_to_private_key(self.mask_key).private_numbers().private_value.to_bytes(_SCALAR, "big")
        seeds, keys = create_shares(self.seed, threshold, n), create_shares(own, threshold, n)
        self.holders, self.seed_shares, self.key_shares = [self.node], [seeds[-1]], [keys[-1]]
        sealed = [
            encrypt(self._sealing(place), share_keys_plaintext_concat(self.node, peer, seeds[place], keys[place]))
            for place, peer in enumerate(peers)
        ]
        self.next = "masked"
        return {"to": list(peers), "sealed": sealed}

    def receive(self, session: bytes, senders: list[int], sealed: list[bytes]) -> None:
        """Stage 3, first half: the shares that the peers who are still there have sealed for this node."""
        self._in("masked", session)
        if len(set(senders)) != len(senders) or not set(senders) <= set(self.peers):
            raise PerfedrecError("there are shares of nodes that are no peers")
        if len(senders) + 1 < self.threshold:
            raise PerfedrecError(f"shares of {len(senders)} peers came, expected {self.threshold - 1} or more")
        for sender, text in zip(senders, sealed, strict=True):
            try:
                source, to, seed, key = share_keys_plaintext_separate(
                    decrypt(self._sealing(self.peers.index(sender)), text)
                )
            except InvalidToken as error:
                raise PerfedrecError(f"shares of node {sender} are not what it sealed") from error
            if (source, to) != (sender, self.node):
                raise PerfedrecError(f"shares from node {source} for node {to} came as if from node {sender}")
            self.holders.append(sender)
            self.seed_shares.append(seed)
            self.key_shares.append(key)

    def mask(self, words: Words) -> Words:
        """Stage 3, second half: ``words`` [D] with the node's own mask and those of its pairs, in place."""
        add_mask(words, self.seed, +1)
        for peer in self.holders[1:]:
            public = self.mask_keys[self.peers.index(peer)]
            secret = generate_shared_key(bytes_to_private_key(self.mask_key), bytes_to_public_key(public))
            add_mask(words, secret, _sign(self.node, peer))
        self.next = "unmask"
        return words

    def unmask(self, session: bytes, present: list[int], gone: list[int]) -> Values:
        """Stage 4: shares of the seeds of who is in the sum and of the keys of who is not; once, and never both."""
        self._in("unmask", session)
        if sorted([*present, *gone]) != sorted(self.holders) or self.node not in present:
            raise PerfedrecError("expected each node whose shares are here once: it is in the sum or it is not")
        if len(present) < self.threshold:
            raise PerfedrecError(f"{len(present)} nodes are in the sum, expected {self.threshold} or more")
        self.next = "nothing"
        places = {holder: place for place, holder in enumerate(self.holders)}
        return {
            "present": [self.seed_shares[places[node]] for node in present],
            "gone": [self.key_shares[places[node]] for node in gone],
        }

    def record(self) -> Values:
        """Everything, as plain values; ``Participant(**record)`` goes on with it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def _in(self, stage: str, session: bytes) -> None:
        if self.next != stage or self.session != session:
            raise PerfedrecError(f"stage {stage} of secure aggregation came out of turn, expected stage {self.next}")

    def _sealing(self, place: int) -> bytes:
        return generate_shared_key(bytes_to_private_key(self.seal_key), bytes_to_public_key(self.seal_keys[place]))


def secure_sum(
    ask: Ask,
    nodes: Collection[int],
    size: int,
    check: Callable[[Collection[int]], None],
    refuse: Refuse,
    label: bytes = b"",
) -> Words:
    """The coordinator's side: the sum [``size``] of the vectors of those ``nodes`` that stay until they have sent one.

    Up to a third of the nodes may drop out. ``check`` is told which ones are in the sum before it is opened, and may
    raise :class:`AbortedError`, as this function does where too few nodes are left. Who are peers follows from the
    ``label``, so that a sum that is taken again is taken among the same.
    """
    session = os.urandom(16)

    def answers(stage: str, tasks: Mapping[int, Values], **wanted: type) -> dict[int, Values]:
        found = {}
        for node, values in ask(stage, {node: {"session": session, **task} for node, task in tasks.items()}):
            if {name: type(value) for name, value in values.items()} == wanted:
                found[node] = values
            else:
                refuse(node, f"stage {stage}: expected {sorted(wanted)}, got {sorted(values)}")
        return found

    keys = answers("keys", {node: {} for node in nodes}, mask=bytes, seal=bytes, voucher=bytes)
    for node in [node for node, own in keys.items() if not (_is_key(own["mask"]) and _is_key(own["seal"]))]:
        refuse(node, "stage keys: expected public keys on P-384")  # they would stop its peers
        del keys[node]
    _enough("keys", len(keys), max(2, threshold(len(nodes))))
    peers, needed = circle(keys, label), threshold(len(keys))

    tasks: dict[int, Values] = {}
    for node, around in peers.items():
        public = {f"{kind}_keys": [keys[peer][kind] for peer in around] for kind in ("mask", "seal")}
        public["vouchers"] = [keys[peer]["voucher"] for peer in around]
        tasks[node] = {"threshold": needed, "peers": around, **public}
    shared = answers("shares", tasks, to=list, sealed=list)
    parcels = {node: dict(zip(each["to"], each["sealed"], strict=False)) for node, each in shared.items()}
    peers = {node: [peer for peer in peers[node] if node in parcels.get(peer, {})] for node in parcels}
    _enough("shares", min((len(around) + 1 for around in peers.values()), default=0), needed)

    tasks = {
        node: {"senders": around, "sealed": [parcels[peer][node] for peer in around]} for node, around in peers.items()
    }
    total, present = np.zeros(size, np.uint64), set[int]()
    for node, values in ask("masked", {node: {"session": session, **task} for node, task in tasks.items()}):
        vector = values.get("vector")
        if isinstance(vector, np.ndarray) and (vector.dtype, vector.shape) == (total.dtype, total.shape):
            total += vector  # modulo 2^64
            present.add(node)
        else:
            refuse(node, f"stage masked: expected a vector of {size} words")
    _enough("masked", min((len(present & {node, *peers[node]}) for node in present), default=0), needed)
    check(present)

    tasks = {
        node: {
            "present": [each for each in (node, *peers[node]) if each in present],
            "gone": [each for each in peers[node] if each not in present],
        }
        for node in present
    }
    shares: dict[str, dict[int, list[bytes]]] = {"present": {}, "gone": {}}
    for node, values in answers("unmask", tasks, present=list, gone=list).items():
        for side, found in shares.items():
            for holder, share in zip(tasks[node][side], values[side], strict=False):
                found.setdefault(holder, []).append(share)
    for node in present:
        add_mask(total, _combined(node, shares["present"].get(node, ()), needed), -1)
    for node in peers.keys() - present:
        key = _key_of(node, _combined(node, shares["gone"].get(node, ()), needed), keys[node]["mask"])
        for peer in present.intersection(peers[node]):
            add_mask(total, generate_shared_key(key, bytes_to_public_key(keys[peer]["mask"])), _sign(node, peer))
    return total


class Together:
    """The protocol among the clients of a block, each of them a node, in one process. Called, it computes what
    :func:`perfedrec.core.types.reduce` computes.

    ``gone`` names, by stage, the clients that drop out in it, by their place in the block.
    """

    def __init__(self, gone: Mapping[str, Collection[int]] | None = None) -> None:
        self.gone = gone or {}

    def __call__(self, update: Update, n_items: int, n_groups: int) -> Aggregate:
        n = update.users.numel()
        parts = [reduce(alone(update, place), n_items, n_groups) for place in range(n)]
        total, present = self.sum({place: to_words(part).numpy().view(np.uint64) for place, part in enumerate(parts)})
        return from_words(torch.from_numpy(total.view(np.int64)), len(present), parts[0])

    def sum(self, vectors: Mapping[int, Words]) -> tuple[Words, set[int]]:
        """The sum of the ``vectors``, and whose are in it."""
        nodes, present = dict[int, Participant](), set[int]()

        def ask(stage: str, tasks: Mapping[int, Values]) -> Iterator[tuple[int, Values]]:
            for node, task in tasks.items():
                if node in self.gone.get(stage, ()):
                    continue
                if stage == "keys":
                    nodes[node] = Participant(node, **task)
                    yield node, nodes[node].keys()
                elif stage == "masked":
                    nodes[node].receive(**task)
                    yield node, {"vector": nodes[node].mask(vectors[node].copy())}
                else:
                    yield node, getattr(nodes[node], stage)(**task)

        def refuse(node: int, why: str) -> None:
            raise AssertionError(f"node {node}: {why}")

        size = next(iter(vectors.values())).size
        return secure_sum(ask, vectors, size, present.update, refuse), present


def _enough(stage: str, present: int, needed: int) -> None:
    if present < needed:
        raise AbortedError(stage, f"{present} nodes answered where {needed} are needed")


def _is_key(public: bytes) -> bool:
    try:
        return isinstance(bytes_to_public_key(public).curve, ec.SECP384R1)
    except (ValueError, AttributeError):
        return False


def _combined(node: int, shares: Sequence[bytes], needed: int) -> bytes:
    if len(shares) < needed:
        raise AbortedError("unmask", f"{len(shares)} shares of a secret of node {node} came, expected {needed}")
    try:
        secret: bytes = combine_shares(list(shares[:needed]))
    except (ValueError, IndexError, TypeError) as error:
        raise AbortedError("unmask", f"the shares of a secret of node {node} do not belong together") from error
    return secret


def _key_of(node: int, scalar: bytes, public: bytes) -> ec.EllipticCurvePrivateKey:
    """The private key whose ``scalar`` was shared, if it belongs to the ``public`` key."""
    try:
        key = ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP384R1())
    except ValueError:
        key = None
    if key is None or public_key_to_bytes(key.public_key()) != public:
        raise AbortedError("unmask", f"the shares of the key of node {node} do not belong together")
    return key


def _sign(node: int, peer: int) -> int:
    return 1 if node < peer else -1
