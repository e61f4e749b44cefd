"""Compiled kernels: when they are used, how they are compiled and cached, and how their work is spread over threads.

Kernels are numba functions. They stand beside the torch functions that they replace: torch computes the same on a GPU,
where numba is not installed, and as the oracle in tests. All runtimes use the same ones.

A kernel has one signature and is compiled at its first call, which takes a second or so. The machine code is then kept
in the user's cache folder, in a folder of its own for each version of the kernels, of numba and of the processor. One
process compiles and others that need the same kernel wait for it. Where no folder can be written to, a kernel is
compiled in each process. (numba stores its cache with pickle. The folder is the user's own, like the code itself.)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS_PER_THREAD = 2048
"""The least number of rows, of some 64 numbers each, for which a further thread is woken up. It takes 50 to 90 us to do
so, as long as arithmetic on a thousand rows."""

PARTS_PER_THREAD = 3
"""The parts that work is spread in, for each thread."""

LIGHT = 4
"""What does little with its rows, like copying them, counts as this many times fewer rows."""

FIXED_PARTS = 8
"""Parts whose results are added up: as many whatever the number of threads."""

_compiling = threading.RLock()


@cache
def _installed() -> bool:
    off = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")  # numba itself is loaded with the first kernel
    return not off and find_spec("numba") is not None


def usable(*tensors: Tensor | None) -> bool:
    """Whether kernels can work on ``tensors``: on the processor, with all numbers in sequence, and without gradients.
    Callers check the types of the numbers."""
    for each in tensors:
        if each is not None and not (each.is_cpu and each.is_contiguous() and not each.requires_grad):
            return False
    return _installed()


class Kernel:
    """A ``function`` that is compiled for its ``signature``, in numba's notation, when it is first called.

    ``fast`` allows sums in another order, in which they can be vectorised. The order is still the same at each call.
    A kernel may make arrays only if it ``makes_arrays``: see :func:`helper`.
    """

    def __init__(
        self, function: Callable[..., Any], signature: str, fast: bool = False, makes_arrays: bool = False
    ) -> None:
        self.function, self.signature, self.fast, self.makes_arrays = function, signature, fast, makes_arrays
        self.__doc__ = function.__doc__
        self._made: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._made is None:
            with _compiling:
                if self._made is None:
                    self._made = self._compiled()
        return self._made(*arguments)

    def _compiled(self) -> Callable[..., Any]:
        folder = _folder()
        if folder is not None:
            # A cache that cannot be read or written must not end the work: it raises whatever its files make it raise.
            with suppress(Exception), _locked(folder):
                return self._jitted(folder)
        return self._jitted(None)

    def _jitted(self, folder: Path | None) -> Callable[..., Any]:
        from numba import config, njit

        before, fast = config.CACHE_DIR, set(_FAST) if self.fast else False
        config.CACHE_DIR = "" if folder is None else str(folder)  # numba reads it when it sees a function
        options = {"nogil": True, "fastmath": fast, "error_model": "numpy", "_nrt": self.makes_arrays}
        try:
            made: Callable[..., Any] = njit(self.signature, cache=folder is not None, **options)(self.function)
        finally:
            config.CACHE_DIR = before
        return made


def kernel(signature: str, fast: bool = False, makes_arrays: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a function as a :class:`Kernel`."""
    return partial(Kernel, signature=signature, fast=fast, makes_arrays=makes_arrays)


_FAST = frozenset({"reassoc", "contract", "nsz"})
"""What LLVM may do with sums of a ``fast`` kernel."""


def helper(
    function: Callable[..., Any],
    flags: frozenset[str] = frozenset(),
    inline: bool = False,
    makes_arrays: bool = False,
) -> Any:
    """Decorate a function that kernels call. Arrays that it changes must not be in its other arguments as well.

    numba counts the references to each array, so that it can free those that a function makes. In a loop over rows this
    takes as long as the arithmetic, because each row is an array of its own for numba. So nothing is counted unless a
    function ``makes_arrays``. A kernel with arrays of its own makes them first, and leaves its loops to helpers. A
    helper returns numbers: an array that it returned would be freed too early.

    With ``inline`` it becomes a part of the kernel in any case. Otherwise the process that compiles the kernel may call
    the function's own code, which is optimised apart, and processes that find the kernel in the cache what was made of
    it within the kernel: a ``fast`` function may round in two ways then.
    """
    from numba import njit

    options = {"nogil": True, "fastmath": set(flags) or False, "error_model": "numpy", "_nrt": makes_arrays}
    return njit(**options, forceinline=inline, pipeline_class=_no_alias())(function)


fast_helper = partial(helper, flags=_FAST)
"""Decorates a function as ``fast`` as a :class:`Kernel` can be."""

finite_helper = partial(helper, flags=_FAST | {"nnan"})
"""Decorates such a function of numbers none of which is NaN."""

part, fast_part = partial(helper, inline=True), partial(fast_helper, inline=True)
"""Decorate helpers that are parts of their kernel in any case."""


@cache
def _no_alias() -> Any:
    """A compiler that takes it that an array that a function changes shares no memory with its other arguments.
    Otherwise each loop over a row would begin with comparing their addresses, and would often not be vectorised."""
    from numba.core.compiler import CompilerBase, DefaultPassBuilder

    class NoAlias(CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            self.state.flags.noalias = True
            return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    return NoAlias


@cache
def _folder() -> Path | None:
    """The folder for this version of all kernels on this processor; ``None`` where none can be written to."""
    import numba
    from llvmlite import binding

    sources = sorted(Path(__file__).parents[1].rglob("*kernels.py"))
    parts = [each.read_bytes() for each in (Path(__file__), *sources)]
    parts += [numba.__version__.encode(), binding.get_host_cpu_name().encode()]
    parts.append(binding.get_host_cpu_features().flatten().encode())
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()
    chosen = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(chosen) if chosen else Path.home() / ".cache"
        folder = base / "perfedrec" / f"kernels-{digest}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "lock").touch()
    except (OSError, RuntimeError):  # no home, or one that is read-only
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that processes that start at once compile a kernel once, and write one after the
    other."""
    with open(folder / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        yield


# --- threads ---


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 1), thread_name_prefix="kernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def spread(work: Callable[[int, int], Any], n: int, rows: int, parts: int = 0) -> list[Any]:
    """Call ``work(start, stop)`` for consecutive parts of ``range(n)``, in as many threads as torch has, or fewer where
    there are few ``rows``. Returns the results in order.

    Threads that wait do not use the processor. The parts must not depend on each other. A thread takes one part after
    the other, so that one that starts late, or shares its processor with other work, does less. Where results are added
    up, a number of ``parts`` keeps the sum independent of the number of threads.
    """
    n_threads = max(1, min(torch.get_num_threads(), n, rows // ROWS_PER_THREAD))
    if n_threads == 1 and not parts:
        return [work(0, n)]
    n_parts = max(1, min(n, parts or PARTS_PER_THREAD * n_threads))
    results: list[Any] = [None] * n_parts
    left = deque(range(n_parts))

    def take() -> None:
        while True:
            try:
                part = left.popleft()
            except IndexError:
                return
            results[part] = work(n * part // n_parts, n * (part + 1) // n_parts)

    others = [_pool().submit(take) for _ in range(1, n_threads)]
    try:
        take()
    finally:
        left.clear()  # after an error nothing more is begun
        begun = [each for each in others if not each.cancel()]
        wait(begun)
    for each in begun:
        each.result()
    return results
