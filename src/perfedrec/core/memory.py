"""The memory of this machine, and refusing work that does not fit into it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from perfedrec.core.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """The bytes of memory that this process can still have, within the limit of its container; ``None`` where the
    system does not tell."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    try:
        limit, used = (int((_GROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(limit - used, 0))


def give_back() -> None:
    """Give memory that is free within this process back to the system, where the C library is glibc, which keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


_LARGE = 1 << 20
"""Bytes from which :func:`zeros` asks the system for pages of their own."""


def zeros(*size: int, like: Tensor) -> Tensor:
    """Zeros of the type and on the device of ``like``. On a processor many of them take memory only where they are
    written. ``torch.zeros`` writes all, and ``numpy.zeros`` asks for pages so large that a few rows fill them all."""
    n_bytes = prod(size) * like.element_size()
    if like.device.type != "cpu" or n_bytes < _LARGE:
        return like.new_zeros(size)
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(size)


def check_memory(needed: int, what: str, advice: str) -> None:
    """Raise :class:`ConfigError` where ``what`` needs more bytes than are free. ``advice`` says what was expected."""
    free = free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free here; "
            f"expected {advice}"
        )
