"""How many threads compute: one where a result would depend on it, and few where there is little work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from threadpoolctl import ThreadpoolController


@lru_cache(maxsize=1)
def _libraries(n_modules: int) -> ThreadpoolController:
    """The libraries that are loaded. To look for them takes 2 ms, so it is done again only after an import."""
    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread.

    Linear-algebra libraries split the sums of factorisations, k-means and dense products between threads, so that the
    rounding depends on the number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries(len(sys.modules)).limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


NUMBERS_PER_THREAD = 2_000_000
"""The least size of a round's work, in numbers of item rows that are trained, for which a further thread pays. Threads
wait for each other many times in a round. On a machine that does other work as well, each time may last as long as the
whole work of a smaller round."""


@contextmanager
def threads_for(numbers: int) -> Iterator[None]:
    """Run the block, whose work has this size, on as many threads as it has use for, and not on more than now."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, numbers // NUMBERS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
