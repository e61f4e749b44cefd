"""SecAgg+ (Bell et al., CCS 2020): the coordinator learns the sum of the nodes' vectors, and no vector of a node.

A node adds to its vector a mask of its own and one mask for each peer: one of the two nodes adds that mask, the other
subtracts it. The node splits the secrets from which its masks follow into shares for its peers (Shamir). So the own
masks of nodes that stay can be removed, and the pairwise masks of nodes that drop out, as long as a ``threshold`` of
each node's peers answers. There are four stages:

======== =================================================== ==================================================
stage    the coordinator sends                               a node answers
======== =================================================== ==================================================
keys     the number of the session                           two public keys, made for this sum, and a voucher
shares   threshold, and the peers' public keys and vouchers  for each peer shares of both secrets, sealed for it
masked   the shares sealed for the node, and its instruction its masked vector
unmask   which peers are in the sum, and which dropped out   shares of the former's seeds and of the latter's keys
======== =================================================== ==================================================

Vectors are whole numbers modulo 2^64, and sums are exact. Key pairs, key agreement (ECDH on P-384), sealing (Fernet)
and Shamir shares are Flower's. Two of its parts are not used. Its masks come from a Mersenne Twister with a seed of 32
bits (the agreed 256 bits, folded by XOR), and all such seeds can be tried; here a mask is a key stream of ChaCha20. Its
quantisation to float64 steps loses precision; sums here are in fixed point already.

Nodes that share a secret, which the coordinator does not have, vouch for their keys with it (HMAC-SHA256) and accept no
other keys: a coordinator that sends keys of its own, or invents nodes, gets no answer. Without that secret the
coordinator is trusted to pass on what it received (honest but curious).
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
from perfedrec.core.counted import counted
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Update
from perfedrec.privacy.aggregation import from_words, summed_part, to_words
from perfedrec.runtimes.flower.codec import UploadError

Words = np.ndarray[Any, np.dtype[np.uint64]]
Values = dict[str, Any]

Ask = Callable[[str, Mapping[int, Values]], Iterable[tuple[int, Values]]]
"""Sends the values of a stage to nodes, and yields their answers as they come, at most one of each node."""

Refuse = Callable[[int, str], None]
"""Receives a node whose answer cannot be used, and the reason. For the sum that node has dropped out."""

STAGES = ("keys", "shares", "masked", "unmask")
MOST_PEERS = 32
"""The most peers of a node. Where there are more nodes, a node's peers are a random sample of them, so that its work
does not grow with their number."""

_SCALAR = 48  # bytes of a private key of P-384
_BLOCK = 1 << 15  # words of a mask that are made at a time: they fit into the cache


class AbortedError(PerfedrecError):
    """A sum that is not opened, because in a ``stage`` too few nodes answered, or because it is a sum over too few
    clients. It can be tried again later, as ``exit_code`` says.
    """

    exit_code = 3

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"secure aggregation was aborted in stage {stage}: {reason}")
        self.stage, self.reason = stage, reason


def threshold(n: int) -> int:
    """How many of ``n`` nodes (a node and its peers) are needed to open a secret of one of them: all but a third.

    Where the peers are a sample of the nodes, a third drops out of each sample only on average. Then 30 % are needed:
    when a third of 1,000 nodes drops out, every sample keeps that many nodes in all but 3 of 1,000 sums.
    """
    return n - n // 3 if n <= MOST_PEERS + 1 else sampled_threshold(MOST_PEERS + 1)


def sampled_threshold(n: int) -> int:
    """The threshold among ``n`` nodes that are a sample: 30 % of them."""
    return max(2, 3 * n // 10 + 1)


def least_threshold(n: int) -> int:
    """The lowest threshold that a node with ``n - 1`` peers accepts: that among ``n`` nodes or, where its peers may be
    a sample, that of a sample.

    Where two thirds are needed, a coordinator cannot open both secrets of a node by saying to some of its peers that
    the node is in the sum, and to others that it is not.
    """
    return threshold(n) if n <= MOST_PEERS else sampled_threshold(n)


def voucher(secret: bytes, session: bytes, node: int, mask: bytes, seal: bytes) -> bytes:
    """What proves the two public keys of a node to nodes that know the ``secret``; empty where there is no secret."""
    parts = b"".join(len(each).to_bytes(4, "little") + each for each in (session, str(node).encode(), mask, seal))
    return hmac.digest(secret, b"perfedrec secagg keys" + parts, sha256) if secret else b""


def choose_peers(nodes: Collection[int], seed: bytes) -> dict[int, list[int]]:
    """The peers of each node: all other nodes, or its ``MOST_PEERS`` nearest nodes on a circle whose random order
    follows from the ``seed`` (a Harary graph)."""
    order = sorted(nodes, key=lambda node: sha256(seed + node.to_bytes(8, "little")).digest())
    n, reach = len(order), MOST_PEERS // 2
    if n <= MOST_PEERS + 1:
        return {node: [other for other in order if other != node] for node in order}
    return {
        node: [order[(place + step) % n] for step in range(-reach, reach + 1) if step]
        for place, node in enumerate(order)
    }


def add_mask(words: Words, secret: bytes, sign: int) -> None:
    """Add to ``words`` [D] (``sign`` +1), or subtract from them (-1), the key stream of ChaCha20 under a ``secret``,
    modulo 2^64 and in place."""
    stream = Cipher(algorithms.ChaCha20(sha256(b"perfedrec mask" + secret).digest(), bytes(16)), None).encryptor()
    zeros, out = bytes(8 * min(_BLOCK, words.size)), bytearray(8 * min(_BLOCK, words.size))
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, words.size, _BLOCK):
        part = words[start : start + _BLOCK]
        stream.update_into(memoryview(zeros)[: part.nbytes], out)
        combine(part, np.frombuffer(out, "<u8", part.size), out=part)


@dataclass
class Participant:
    """A node's side of one sum: its secrets, which never leave the node, and the stage that it expects ``next``.

    Every method raises :class:`PerfedrecError` where the coordinator asks for anything that the protocol does not
    allow, in particular for both secrets of one node: with both its vector could be read.
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
        """Stage 1: new key pairs, one to agree on masks and one to seal shares, with a voucher where nodes share a
        ``secret``."""
        self._expect("keys", self.session)
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

        Where nodes share a ``secret``, :class:`UploadError` is raised for keys whose voucher does not prove them.
        """
        self._expect("shares", session)
        n = len(peers) + 1
        if not least_threshold(n) <= threshold <= n or self.node in peers or len(set(peers)) != len(peers):
            raise PerfedrecError(f"a threshold of {threshold} for {n} nodes does not protect them")
        if len({*mask_keys, *seal_keys}) != 2 * len(peers):
            raise PerfedrecError("some public keys are identical; expected two keys of its own for every peer")
        given = dict(zip(peers, vouchers, strict=False))
        for peer, mask, seal in zip(peers, mask_keys, seal_keys, strict=True):
            wanted = voucher(secret, session, peer, mask, seal)
            if secret and not hmac.compare_digest(given.get(peer, b""), wanted):
                raise UploadError("unvouched", f"keys came in the name of node {peer}, which does not vouch for them")
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
        """Stage 3, first half: the shares that the remaining peers have sealed for this node."""
        self._expect("masked", session)
        if len(set(senders)) != len(senders) or not set(senders) <= set(self.peers):
            raise PerfedrecError("there are shares of nodes that are no peers; expected one of each peer at most")
        if len(senders) + 1 < self.threshold:
            raise PerfedrecError(f"shares of {len(senders)} peers came; expected {self.threshold - 1} or more")
        for sender, text in zip(senders, sealed, strict=True):
            try:
                source, to, seed, key = share_keys_plaintext_separate(
                    decrypt(self._sealing(self.peers.index(sender)), text)
                )
            except InvalidToken as error:
                raise PerfedrecError(
                    f"shares of node {sender} are not what it sealed; they cannot be opened"
                ) from error
            if (source, to) != (sender, self.node):
                raise PerfedrecError(f"shares from node {source} for node {to} came in the name of node {sender}")
            self.holders.append(sender)
            self.seed_shares.append(seed)
            self.key_shares.append(key)

    def mask(self, words: Words) -> Words:
        """Stage 3, second half: ``words`` [D] with the node's own mask and its pairwise masks, in place."""
        add_mask(words, self.seed, +1)
        for peer in self.holders[1:]:
            public = self.mask_keys[self.peers.index(peer)]
            secret = generate_shared_key(bytes_to_private_key(self.mask_key), bytes_to_public_key(public))
            add_mask(words, secret, _sign(self.node, peer))
        self.next = "unmask"
        return words

    def unmask(self, session: bytes, present: list[int], gone: list[int]) -> Values:
        """Stage 4: shares of the seeds of the nodes that are ``present`` in the sum, and of the keys of those that are
        ``gone``. It is answered once, and never with both for one node."""
        self._expect("unmask", session)
        if sorted([*present, *gone]) != sorted(self.holders) or self.node not in present:
            raise PerfedrecError(
                "expected each node whose shares are here once: as present in the sum or as gone from it"
            )
        if len(present) < self.threshold:
            raise PerfedrecError(
                f"{counted(len(present), 'node is', 'nodes are')} in the sum; expected {self.threshold} or more"
            )
        self.next = "nothing"
        places = {holder: place for place, holder in enumerate(self.holders)}
        return {
            "present": [self.seed_shares[places[node]] for node in present],
            "gone": [self.key_shares[places[node]] for node in gone],
        }

    def record(self) -> Values:
        """Everything, as plain values; ``Participant(**record)`` continues from it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def _expect(self, stage: str, session: bytes) -> None:
        if self.next != stage or self.session != session:
            raise PerfedrecError(f"stage {stage} of secure aggregation came out of turn; expected stage {self.next}")

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

    Up to a third of the nodes may drop out. ``check`` receives the nodes that are in the sum before it is opened, and
    may raise :class:`AbortedError`; this function raises it where too few nodes are left. The ``label`` decides which
    nodes are peers, so that a sum that is repeated has the same peers.
    """
    session = _Session(ask, refuse)
    keys = session.collect_keys(nodes)
    needed, peers = threshold(len(keys)), choose_peers(keys, label)
    parcels = session.collect_shares(keys, peers, needed)
    peers = {node: [peer for peer in peers[node] if node in parcels.get(peer, {})] for node in parcels}
    _enough("shares", min((len(around) + 1 for around in peers.values()), default=0), needed)
    total, present = session.collect_vectors(parcels, peers, size)
    _enough("masked", min((len(present & {node, *peers[node]}) for node in present), default=0), needed)
    check(present)
    secrets = session.collect_secrets(peers, present)
    _remove_masks(total, keys, peers, present, secrets, needed)
    return total


@dataclass
class _Session:
    """The coordinator's messages in the four stages of one sum. Nodes whose answers cannot be used are refused."""

    ask: Ask
    refuse: Refuse
    number: bytes = field(default_factory=lambda: os.urandom(16))

    def collect_keys(self, nodes: Collection[int]) -> dict[int, Values]:
        """Stage 1: the public keys and the voucher of each node."""
        keys = self._answers("keys", {node: {} for node in nodes}, mask=bytes, seal=bytes, voucher=bytes)
        for node in [node for node, own in keys.items() if not (_is_key(own["mask"]) and _is_key(own["seal"]))]:
            self.refuse(node, "stage keys: expected public keys on P-384")  # its peers could not use them
            del keys[node]
        _enough("keys", len(keys), max(2, threshold(len(nodes))))
        return keys

    def collect_shares(
        self, keys: Mapping[int, Values], peers: Mapping[int, list[int]], needed: int
    ) -> dict[int, dict[int, bytes]]:
        """Stage 2: by sender and receiver, the shares of the sender's secrets, sealed for the receiver."""
        tasks: dict[int, Values] = {}
        for node, around in peers.items():
            public = {f"{kind}_keys": [keys[peer][kind] for peer in around] for kind in ("mask", "seal")}
            public["vouchers"] = [keys[peer]["voucher"] for peer in around]
            tasks[node] = {"threshold": needed, "peers": around, **public}
        shared = self._answers("shares", tasks, to=list, sealed=list)
        return {node: dict(zip(each["to"], each["sealed"], strict=False)) for node, each in shared.items()}

    def collect_vectors(
        self, parcels: Mapping[int, Mapping[int, bytes]], peers: Mapping[int, list[int]], size: int
    ) -> tuple[Words, set[int]]:
        """Stage 3: the sum of the masked vectors, and the nodes that are in it."""
        tasks = {
            node: {"senders": around, "sealed": [parcels[peer][node] for peer in around]}
            for node, around in peers.items()
        }
        total, present = np.zeros(size, np.uint64), set[int]()
        for node, values in self._send("masked", tasks):
            vector = values.get("vector")
            if isinstance(vector, np.ndarray) and (vector.dtype, vector.shape) == (total.dtype, total.shape):
                total += vector  # modulo 2^64
                present.add(node)
            else:
                self.refuse(node, f"stage masked: expected a vector of {size} words")
        return total, present

    def collect_secrets(self, peers: Mapping[int, list[int]], present: Collection[int]) -> dict[int, list[bytes]]:
        """Stage 4: by node the shares of its one secret that opens the sum: its seed if it is ``present`` in the sum,
        its key otherwise."""
        tasks = {
            node: {
                "present": [each for each in (node, *peers[node]) if each in present],
                "gone": [each for each in peers[node] if each not in present],
            }
            for node in present
        }
        found: dict[int, list[bytes]] = {}
        for node, values in self._answers("unmask", tasks, present=list, gone=list).items():
            for side in ("present", "gone"):
                for owner, share in zip(tasks[node][side], values[side], strict=False):
                    found.setdefault(owner, []).append(share)
        return found

    def _answers(self, stage: str, tasks: Mapping[int, Values], **wanted: type) -> dict[int, Values]:
        """By node the values of a stage that have the names and types ``wanted``."""
        found = {}
        for node, values in self._send(stage, tasks):
            if {name: type(value) for name, value in values.items()} == wanted:
                found[node] = values
            else:
                self.refuse(node, f"stage {stage}: expected {sorted(wanted)}, got {sorted(values)}")
        return found

    def _send(self, stage: str, tasks: Mapping[int, Values]) -> Iterable[tuple[int, Values]]:
        return self.ask(stage, {node: {"session": self.number, **task} for node, task in tasks.items()})


def _remove_masks(
    total: Words,
    keys: Mapping[int, Values],
    peers: Mapping[int, list[int]],
    present: Collection[int],
    secrets: Mapping[int, Sequence[bytes]],
    needed: int,
) -> None:
    """Take the masks off ``total``, in place: those of the nodes that are ``present`` in the sum themselves, and those
    that they made with nodes that dropped out."""
    for node in present:
        add_mask(total, _combined(node, secrets.get(node, ()), needed), -1)
    for node in peers.keys() - set(present):
        key = _key_of(node, _combined(node, secrets.get(node, ()), needed), keys[node]["mask"])
        for peer in set(present).intersection(peers[node]):
            add_mask(total, generate_shared_key(key, bytes_to_public_key(keys[peer]["mask"])), _sign(node, peer))


class Together:
    """The protocol in one process, for tests and benchmarks: each client of a block is a node. Called, it computes what
    :func:`perfedrec.core.aggregate.reduce` computes.

    ``dropped`` names by stage the clients that drop out in it, as places in the block.
    """

    def __init__(self, dropped: Mapping[str, Collection[int]] | None = None) -> None:
        self.dropped = dropped or {}

    def __call__(self, update: Update, n_items: int, n_groups: int) -> Aggregate:
        n = update.users.numel()
        parts = [reduce(summed_part(update, place), n_items, n_groups) for place in range(n)]
        total, present = self.sum({place: to_words(part).numpy().view(np.uint64) for place, part in enumerate(parts)})
        return from_words(torch.from_numpy(total.view(np.int64)), len(present), parts[0])

    def sum(self, vectors: Mapping[int, Words]) -> tuple[Words, set[int]]:
        """The sum of the ``vectors``, and the clients that are in it."""
        nodes, present = dict[int, Participant](), set[int]()

        def ask(stage: str, tasks: Mapping[int, Values]) -> Iterator[tuple[int, Values]]:
            for node, task in tasks.items():
                if node in self.dropped.get(stage, ()):
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
        raise AbortedError(stage, f"{counted(present, 'node')} answered, and {needed} are needed")


def _is_key(public: bytes) -> bool:
    try:
        return isinstance(bytes_to_public_key(public).curve, ec.SECP384R1)
    except (ValueError, AttributeError):
        return False


def _combined(node: int, shares: Sequence[bytes], needed: int) -> bytes:
    if len(shares) < needed:
        raise AbortedError("unmask", f"{len(shares)} shares of a secret of node {node} came; expected {needed}")
    try:
        secret: bytes = combine_shares(list(shares[:needed]))
    except (ValueError, IndexError, TypeError) as error:
        raise AbortedError("unmask", f"the shares of a secret of node {node} do not belong together") from error
    return secret


def _key_of(node: int, scalar: bytes, public: bytes) -> ec.EllipticCurvePrivateKey:
    """The private key whose ``scalar`` was shared. Raises :class:`AbortedError` where it is not that of the ``public``
    key."""
    try:
        key = ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP384R1())
    except ValueError:
        key = None
    if key is None or public_key_to_bytes(key.public_key()) != public:
        raise AbortedError("unmask", f"the shares of the key of node {node} do not belong together")
    return key


def _sign(node: int, peer: int) -> int:
    return 1 if node < peer else -1
