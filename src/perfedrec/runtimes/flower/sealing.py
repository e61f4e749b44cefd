"""Data that pass through the coordinator, which must not read them: sealed by HPKE (RFC 9180) for one other role.

Sealed data are not signed: the coordinator is trusted to pass on what it received (honest but curious).
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from flwr.app import ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.runtimes.flower.codec import pack, unpack

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
SEALED = "sealed"


def public_of(private: bytes) -> bytes:
    """The public key (32 bytes, X25519) of a ``private`` one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def seal(tensors: Mapping[str, Tensor], public: bytes, purpose: str) -> ArrayRecord:
    """``tensors`` that only the owner of the ``public`` key [32 bytes] can read, and only for the same ``purpose``."""
    content = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    text = _SUITE.encrypt(content, X25519PublicKey.from_public_bytes(public), info=purpose.encode())
    return pack({SEALED: torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def unseal(record: ArrayRecord, private: bytes, purpose: str) -> dict[str, Tensor]:
    """The tensors that :func:`seal` sealed. Raises :class:`PerfedrecError` where they were sealed for another key or
    another purpose, or were changed on the way."""
    try:
        text = unpack(record)[SEALED].numpy().tobytes()
        return load(_SUITE.decrypt(text, X25519PrivateKey.from_private_bytes(private), info=purpose.encode()))
    except (InvalidTag, KeyError, ValueError, SafetensorError) as error:
        raise PerfedrecError(f"data sealed for '{purpose}' cannot be opened with this key") from error


@dataclass(frozen=True)
class Bundle:
    """What a node receives when it is registered: a ``secret`` [32 bytes] that all nodes share, and that neither the
    coordinator nor the service has; the public key of the ``service``; and a private key of its ``own``."""

    secret: bytes = field(repr=False)
    service: bytes
    own: bytes = field(repr=False)

    @property
    def common(self) -> bytes:
        """The private key that all nodes share; the service has its public key (:func:`public_of`)."""
        return self._derived(b"nodes")

    @property
    def vouching(self) -> bytes:
        """The key by which nodes vouch for the public keys that the coordinator passes on between them."""
        return self._derived(b"vouching")

    def tokens(self, n_items: int) -> Tensor:
        """[m] the token of each item, which stands for it at the service: its place in the order of HMAC-SHA256 of the
        items under the secret."""
        return _ordered(self._derived(b"tokens"), n_items)

    def _derived(self, purpose: bytes) -> bytes:
        return hmac.digest(self.secret, b"perfedrec " + purpose, sha256)


@lru_cache(maxsize=1)  # a node needs it in every round, and a million items take seconds
def _ordered(key: bytes, n_items: int) -> Tensor:
    names = [hmac.digest(key, item.to_bytes(8, "little"), sha256) for item in range(n_items)]
    places = torch.empty(n_items, dtype=torch.int64)
    places[torch.tensor(sorted(range(n_items), key=names.__getitem__), dtype=torch.int64)] = torch.arange(n_items)
    return places
