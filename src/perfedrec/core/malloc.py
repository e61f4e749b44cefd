"""How the C library keeps memory that is free within this process."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The numbers of two options of mallopt(3)."""

_KEPT, _OWN_PAGES = 1 << 26, 1 << 25
"""Bytes that stay with the process at the end of its heap, and the size from which a block has pages of its own."""


def keep_freed_memory() -> None:
    """Let glibc keep 64 MB that are free, and blocks of up to 32 MB in its heap, unless the environment says otherwise.

    By default it gives the pages of a freed table back to the system, which fills them with zeros when the next table
    asks for them. A matrix of scores is made and freed many times in a second: an evaluation of Yelp took 89 ms with
    11,000 new pages, and takes 63 without any. Elsewhere nothing happens.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _OWN_PAGES)
