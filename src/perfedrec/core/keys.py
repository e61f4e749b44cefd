"""Keyed random numbers: every draw is a pure function of (seed, purpose, round, user, counter).

A draw never depends on block size, client order, thread count or runtime, because there is no generator whose state
could be consumed in another order. A :class:`Key` is folded step by step (``Key(seed).fold("noise", round)``), spread
over users (:meth:`Key.spread`), and turned into numbers by the functions below, all of them vectorised.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; constants "Mix13" of Stafford).
It is a good statistical generator and **not** a cryptographic one: it serves simulation, selection and sampling.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 writes them."""
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def _mix_(bits: Tensor) -> Tensor:
    """Mix int64 words in place."""
    if bits.device.type == "cpu" and bits.is_contiguous():
        flat = bits.numpy().reshape(-1).view(np.uint64)  # the same memory; numpy shifts and multiplies twice as fast
        scratch = np.empty(min(_CHUNK, flat.size), np.uint64)
        for start in range(0, flat.size, _CHUNK):
            words = flat[start : start + _CHUNK]  # few enough to stay in the cache
            for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1]), (31, None)):
                words ^= np.right_shift(words, np.uint64(shift), out=scratch[: words.size])
                if multiplier is not None:
                    words *= np.uint64(multiplier)
        return bits
    # torch shifts arithmetically, so the sign bits are masked away after each shift.
    scratch_ = torch.empty_like(bits)
    for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1]), (31, None)):
        torch.bitwise_right_shift(bits, shift, out=scratch_)
        scratch_ &= (1 << (64 - shift)) - 1
        bits ^= scratch_
        if multiplier is not None:
            bits *= _signed(multiplier)
    return bits


@dataclass(frozen=True)
class Key:
    """A 64-bit key. ``Key(seed)`` starts a chain; every ``fold`` gives an independent stream."""

    value: int

    def fold(self, *parts: int | str) -> Key:
        """Derive the key for a purpose, a round, a counter: any chain of integers and names."""
        value = self.value & _MASK
        for part in parts:
            if isinstance(part, str):
                part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
            value = _mix_int((value ^ _mix_int((part + _GOLDEN) & _MASK)) + _GOLDEN & _MASK)
        return Key(value)

    def spread(self, ids: Tensor) -> Tensor:
        """One key per id (a user, an item), as int64 of the shape of ``ids``."""
        return fold_in(torch.full((), _signed(self.value & _MASK), device=ids.device), ids)


def fold_in(keys: Tensor, ids: Tensor) -> Tensor:
    """Keys for ``(key, id)`` pairs; both int64, broadcast against each other."""
    return _mix_(_mix_(ids * _signed(_GOLDEN) + 1) ^ keys)


def bits(keys: Tensor, n: int) -> Tensor:
    """``n`` int64 words per key, of shape ``[*keys.shape, n]``."""
    counters = torch.arange(1, n + 1, device=keys.device) * _signed(_GOLDEN)
    return _mix_(keys.unsqueeze(-1) + counters)


def symmetric(keys: Tensor, n: int) -> Tensor:
    """``n`` float32 numbers per key, uniform on (-1, 1): odd multiples of 2^-24, so never 0 and never +-1."""
    if not keys.numel():  # words of no key have no layout to be halved
        return torch.empty(*keys.shape, n, device=keys.device)
    halves = bits(keys, (n + 1) // 2).view(torch.int32)[..., :n]
    return (halves >> 8).to(torch.float32).add_(0.5).mul_(2.0**-23)


def uniform(keys: Tensor, n: int) -> Tensor:
    """``n`` float32 numbers per key, uniform on (0, 1)."""
    return symmetric(keys, n).add_(1.0).mul_(0.5).clamp_(2.0**-25, 1 - 2.0**-24)


def laplace(keys: Tensor, n: int) -> Tensor:
    """``n`` standard Laplace numbers per key (scale 1, variance 2), by inversion of the distribution function."""
    if not keys.numel():  # words of no key have no layout to be halved
        return torch.empty(*keys.shape, n, device=keys.device)
    halves = bits(keys, (n + 1) // 2).view(torch.int32)[..., :n]
    magnitude = (halves & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)  # in (0, 1)
    if magnitude.device.type == "cpu":
        np.log(magnitude.numpy(), out=magnitude.numpy())  # three times as fast as torch's
    else:
        magnitude.log_()
    magnitude.view(torch.int32).bitwise_xor_(halves & -(1 << 31))  # with a sign of its own
    return magnitude


def normal(keys: Tensor, n: int) -> Tensor:
    """``n`` standard normal numbers per key, by inversion of the distribution function."""
    return torch.erfinv(symmetric(keys, n)).mul_(2.0**0.5)


def shuffle(keys: Tensor, positions: Tensor, size: int) -> Tensor:
    """Images of ``positions`` under the pseudo-random permutation of ``range(domain(size))`` that each key names.

    Images of ``size`` or more are to be skipped: the others, in the order of their positions, are ``range(size)`` in
    random order. A generalised Feistel network (Black and Rogaway, 2002) costs what ``positions`` costs, whatever
    ``size`` is: 20 distinct items out of a million take some 20 evaluations. A small domain needs more rounds of it,
    or some permutations come up far more often than others. ``keys`` and ``positions`` are int64 of one shape.
    """
    left, right = _sides(size)
    rounds = 14 if size < 32 else 8 if size < 4096 else 4
    a = torch.div(positions, right, rounding_mode="floor")
    b = positions - a * right
    for counter in range(rounds):
        source, target, modulus = (b, a, left) if counter % 2 == 0 else (a, b, right)
        word = (source * 16).add_(counter + 1).mul_(_signed(_GOLDEN)).bitwise_xor_(keys).mul_(_signed(_MULTIPLIERS[0]))
        target = word.bitwise_right_shift_(33).bitwise_and_(0x7FFFFFFF).add_(target).remainder_(modulus)
        a, b = (target, b) if counter % 2 == 0 else (a, target)
    return a * right + b


def domain(size: int) -> int:
    """The number of positions that :func:`shuffle` permutes: at least ``size``, at most ``size + sqrt(size) + 1``."""
    left, right = _sides(size)
    return left * right


def _sides(size: int) -> tuple[int, int]:
    left = isqrt(max(size - 1, 0)) + 1
    return left, -(-size // left)
