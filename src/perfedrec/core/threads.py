"""Running code on one thread, so that its result does not depend on the number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread.

    Linear-algebra libraries split the sums of factorisations, k-means and dense products between threads, so that the
    rounding depends on the number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
