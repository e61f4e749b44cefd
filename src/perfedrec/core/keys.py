"""Keyed random numbers: every draw is a pure function of (seed, purpose, round, user, counter).

There is no generator whose state could be used in another order. Therefore a draw never depends on the block size, the
order of clients, the number of threads or the runtime. A :class:`Key` is derived step by step
(``Key(seed).fold("noise", round)``), spread over users (:meth:`Key.spread`), and turned into numbers by the functions
below, which are all vectorised.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; constants "Mix13" of Stafford).
It is a good statistical generator, and **not** a cryptographic one: it is for simulation, selection and sampling.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfedrec.core import words
from perfedrec.core.compiled import usable
from perfedrec.core.words import GOLDEN as _GOLDEN
from perfedrec.core.words import MULTIPLIERS as _MULTIPLIERS
from perfedrec.core.words import WordKey
from perfedrec.core.words import network as network

_MASK = (1 << 64) - 1
_CHUNK = 1 << 15
_MANY = 256  # words for which a kernel pays


def _signed(value: int) -> int:
    """The int64 of torch that has the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _loaded_kernels(words: Tensor) -> Any:
    """The module of kernels if it pays for the ``words``, else ``None``. It is not loaded for them: a node that only
    recommends shall answer at once."""
    if words.numel() < _MANY or words.dtype != torch.int64 or not usable(words):
        return None
    return sys.modules.get("perfedrec.core.kernels")


def _mix_(bits: Tensor) -> Tensor:
    """Mix int64 words in place."""
    if bits.device.type == "cpu" and bits.is_contiguous():
        flat = bits.numpy().reshape(-1).view(np.uint64)  # the same memory: numpy shifts and multiplies twice as fast
        kernels = _loaded_kernels(bits)
        if kernels is not None:
            kernels.mix_words(flat)
            return bits
        scratch = np.empty(min(_CHUNK, flat.size), np.uint64)
        for start in range(0, flat.size, _CHUNK):
            words = flat[start : start + _CHUNK]  # small enough to stay in the cache
            for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1]), (31, None)):
                words ^= np.right_shift(words, np.uint64(shift), out=scratch[: words.size])
                if multiplier is not None:
                    words *= np.uint64(multiplier)
        return bits
    # A shift in torch copies the sign bit; the copies are masked away after each shift.
    scratch_ = torch.empty_like(bits)
    for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1]), (31, None)):
        torch.bitwise_right_shift(bits, shift, out=scratch_)
        scratch_ &= (1 << (64 - shift)) - 1
        bits ^= scratch_
        if multiplier is not None:
            bits *= _signed(multiplier)
    return bits


@dataclass(frozen=True)
class Key(WordKey):
    """A 64-bit key. ``Key(seed)`` is the first one; each ``fold`` derives a key with independent draws."""

    def spread(self, ids: Tensor) -> Tensor:
        """One key for each id (of a user or an item), as int64 of the shape of ``ids``."""
        kernels = _loaded_kernels(ids)
        if kernels is not None:
            keys = torch.empty_like(ids)
            kernels.spread(self.value & _MASK, ids.numpy().reshape(-1), keys.numpy().reshape(-1).view(np.uint64))
            return keys
        return fold_in(torch.full((), _signed(self.value & _MASK), device=ids.device), ids)


def words_of(names: Iterable[str]) -> Tensor:
    """One int64 word for each name: a digest of it, so that two names practically never share a word."""
    return torch.from_numpy(words.words_of(names).view(np.int64))


def fold_in(keys: Tensor, ids: Tensor) -> Tensor:
    """One key for each pair of a key and an id, as int64; ``keys`` and ``ids`` are int64 and broadcast."""
    return _mix_(_mix_(ids * _signed(_GOLDEN) + 1) ^ keys)


def fold_rows(keys: Tensor, segments: Tensor, ids: Tensor) -> Tensor:
    """[T] one key for each row, from the key of its segment and its id: :func:`fold_in` of ``keys`` [B] at ``segments``
    [T] and ``ids`` [T]."""
    kernels = _loaded_kernels(ids) if usable(keys, segments) else None
    if kernels is None:
        return fold_in(keys[segments], ids)
    folded = torch.empty_like(ids)
    given = keys.numpy().view(np.uint64), segments.numpy(), ids.numpy()
    kernels.fold_rows(*given, folded.numpy().view(np.uint64))
    return folded


def fold_numbers(keys: Tensor, n: int) -> Tensor:
    """[B, n] one key for each of the ``keys`` [B] and each number from 0 to ``n - 1``: :func:`fold_in` of both."""
    kernels = _loaded_kernels(keys)
    if kernels is None:
        return fold_in(keys[:, None], torch.arange(n, device=keys.device))
    folded = keys.new_empty(keys.numel(), n)
    kernels.fold_numbers(keys.numpy().view(np.uint64), folded.numpy().view(np.uint64))
    return folded


def bits(keys: Tensor, n: int) -> Tensor:
    """``n`` random int64 words for each key, of shape ``[*keys.shape, n]``."""
    counters = torch.arange(1, n + 1, device=keys.device) * _signed(_GOLDEN)
    return _mix_(keys.unsqueeze(-1) + counters)


def symmetric(keys: Tensor, n: int) -> Tensor:
    """``n`` float32 numbers for each key, uniform on (-1, 1), of shape ``[*keys.shape, n]``.

    They are odd multiples of 2^-24, and so never 0, 1 or -1.
    """
    if not keys.numel():  # an empty tensor of words cannot be viewed as halves
        return torch.empty(*keys.shape, n, device=keys.device)
    halves = bits(keys, (n + 1) // 2).view(torch.int32)[..., :n]
    return (halves >> 8).to(torch.float32).add_(0.5).mul_(2.0**-23)


def uniform(keys: Tensor, n: int) -> Tensor:
    """``n`` float32 numbers for each key, uniform on (0, 1), of shape ``[*keys.shape, n]``."""
    return symmetric(keys, n).add_(1.0).mul_(0.5).clamp_(2.0**-25, 1 - 2.0**-24)


def laplace(keys: Tensor, n: int) -> Tensor:
    """``n`` standard Laplace numbers for each key (scale 1, variance 2), float32 of shape ``[*keys.shape, n]``.

    They are drawn by inverting the distribution function.
    """
    if not keys.numel():  # an empty tensor of words cannot be viewed as halves
        return torch.empty(*keys.shape, n, device=keys.device)
    halves = bits(keys, (n + 1) // 2).view(torch.int32)[..., :n]
    magnitude = (halves & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)  # in (0, 1)
    if magnitude.device.type == "cpu":
        np.log(magnitude.numpy(), out=magnitude.numpy())  # three times as fast as in torch
    else:
        magnitude.log_()
    magnitude.view(torch.int32).bitwise_xor_(halves & -(1 << 31))  # a random sign, from a bit that is not yet used
    return magnitude


def normal(keys: Tensor, n: int) -> Tensor:
    """``n`` standard normal numbers for each key, float32 of shape ``[*keys.shape, n]``.

    They are drawn by inverting the distribution function.
    """
    return torch.erfinv(symmetric(keys, n)).mul_(2.0**0.5)


def shuffle(keys: Tensor, positions: Tensor, size: int) -> Tensor:
    """The images of ``positions`` under a pseudo-random permutation of ``range(domain(size))``, one for each key.

    ``keys`` and ``positions`` are int64 of the same shape, and so is the result. The caller must skip images of
    ``size`` or more; the others, in the order of their positions, are ``range(size)`` in random order.

    The permutation is a generalised Feistel network (Black and Rogaway, 2002). Its cost depends on the number of
    positions and not on ``size``: 20 distinct items out of a million take about 20 evaluations. A small domain needs
    more rounds of the network; with fewer, some permutations would occur far more often than others.
    """
    left, right, rounds = network(size)
    a = torch.div(positions, right, rounding_mode="floor")
    b = positions - a * right
    for counter in range(rounds):
        source, target, modulus = (b, a, left) if counter % 2 == 0 else (a, b, right)
        word = (source * 16).add_(counter + 1).mul_(_signed(_GOLDEN)).bitwise_xor_(keys).mul_(_signed(_MULTIPLIERS[0]))
        target = word.bitwise_right_shift_(33).bitwise_and_(0x7FFFFFFF).add_(target).remainder_(modulus)
        a, b = (target, b) if counter % 2 == 0 else (a, target)
    return a * right + b


def domain(size: int) -> int:
    """The number of positions that :func:`shuffle` permutes: from ``size`` to ``size + sqrt(size) + 1``."""
    left, right, _ = network(size)
    return left * right
