"""Keyed random words in numpy alone: what :mod:`perfedrec.core.keys` draws, for code that must not wait for torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Self

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def digest(name: str) -> bytes:
    """8 bytes for a name; two names practically never share them."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


@lru_cache(maxsize=1024)
def _purpose(name: str) -> int:
    """The number that stands for the name of a purpose: the same few in every round."""
    return int.from_bytes(digest(name), "little")


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class WordKey:
    """A 64-bit key. Each ``fold`` derives a key with independent draws."""

    value: int

    def fold(self, *parts: int | str) -> Self:
        """Derive a key for a purpose, a round or a counter, given as any sequence of integers and names."""
        value = self.value & _MASK
        for part in parts:
            if isinstance(part, str):
                part = _purpose(part)
            value = _mix_int((value ^ _mix_int((part + GOLDEN) & _MASK)) + GOLDEN & _MASK)
        return type(self)(value)

    def words(self, ids: NDArray[np.int64] | Words) -> Words:
        """One word for each id: those of :meth:`perfedrec.core.keys.Key.spread`."""
        return fold_in(np.uint64(self.value & _MASK), ids.astype(np.uint64))


TIES = WordKey(0).fold("equal scores")
"""The key by which equal scores are ordered: see :mod:`perfedrec.evaluation.order`."""


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return words ^ (words >> np.uint64(31))


def fold_in(keys: Words | np.uint64, ids: Words) -> Words:
    """One word for each pair of a key and an id; ``keys`` and ``ids`` broadcast."""
    return _mixed(_mixed(ids * np.uint64(GOLDEN) + np.uint64(1)) ^ keys)


def words_of(names: Iterable[str]) -> Words:
    """One word for each name: a digest of it."""
    return np.frombuffer(b"".join(map(digest, names)), dtype="<u8").astype(np.uint64)


def symmetric(key: np.uint64, n: int) -> NDArray[np.float64]:
    """``n`` numbers for a key, uniform on (-1, 1): odd multiples of 2^-24."""
    counters = np.arange(1, (n + 1) // 2 + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    halves = _mixed(key + counters).view(np.int32)[:n]
    numbers: NDArray[np.float64] = ((halves >> 8) + np.float64(0.5)) * 2.0**-23
    return numbers


def network(size: int) -> tuple[int, int, int]:
    """The two sides of the network of :func:`perfedrec.core.keys.shuffle`, whose product is its domain, and the number
    of its rounds."""
    left = isqrt(max(size - 1, 0)) + 1
    return left, -(-size // left), 14 if size < 32 else 8 if size < 4096 else 4


def shuffle(key: np.uint64, positions: Words, size: int) -> Words:
    """The images of ``positions`` under the pseudo-random permutation of a key; images of ``size`` or more are to be
    skipped. See :func:`perfedrec.core.keys.shuffle`."""
    *both, rounds = network(size)
    left, right = map(np.uint64, both)
    a = positions // right
    b = positions - a * right
    for counter in range(rounds):
        source, target, modulus = (b, a, left) if counter % 2 == 0 else (a, b, right)
        word = (source * np.uint64(16) + np.uint64(counter + 1)) * np.uint64(GOLDEN)
        word = ((word ^ key) * np.uint64(MULTIPLIERS[0])) >> np.uint64(33)
        target = (word + target) % modulus
        a, b = (target, b) if counter % 2 == 0 else (a, target)
    return a * right + b


def draw_outside(own: NDArray[np.int64], n_items: int, count: int, key: np.uint64) -> NDArray[np.int64]:
    """Distinct items that a user with the items ``own`` does not have: ``count`` of them, or all where there are fewer.
    They are those of :func:`perfedrec.core.sampling.draw_outside`."""
    count, owned = min(count, n_items - own.size), np.zeros(n_items, dtype=bool)
    owned[own] = True
    left, right, _ = network(n_items)
    domain, tried = left * right, 2 * count + 8
    while True:
        tried = min(tried, domain)
        images = shuffle(key, np.arange(tried, dtype=np.uint64), n_items).astype(np.int64)
        images = images[images < n_items]
        found = images[~owned[images]]
        if found.size >= count:
            return found[:count]
        tried *= 2
