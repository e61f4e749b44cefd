"""Flat arrays that may be larger than the memory: files that are mapped into it.

A file has no name once it is mapped, and is gone with the process that made it. It lies in the folder for temporary
files (the variable ``TMPDIR``), which should be on a disk. The system keeps in memory what is in use, as long as nobody
else needs it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import warnings
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from perfedrec.core.errors import ConfigError, reason

if TYPE_CHECKING:  # reading data does not wait for torch
    import torch
    from torch import Tensor

IN_MEMORY = 1 << 27
"""Bytes up to which an array is in memory."""

SET_ASIDE = 1 << 22
"""Bytes from which an array that is rarely read is in a file."""


def empty(size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A flat array of ``size`` numbers without values, in a file where it is large.

    Raises :class:`ConfigError` where the disk has no room for all of it.
    """
    kind = np.dtype(dtype)
    if size * kind.itemsize <= IN_MEMORY:
        return np.empty(size, kind)
    with _file() as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is noticed here, and not when the array is written
                os.posix_fallocate(file.fileno(), 0, size * kind.itemsize)
            else:
                file.truncate(size * kind.itemsize)
            memory = mmap.mmap(file.fileno(), size * kind.itemsize)
        except OSError as error:
            raise _no_room(f"data of {size * kind.itemsize / 1e9:.1f} GB", error) from None
    return np.frombuffer(memory, kind)


def as_tensor(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of an ``array``, which it shares where that is in the memory of the ``device``. It must not be written:
    the array may be read-only."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array, device=device)


def sparse(size: int, what: str) -> mmap.mmap:
    """``size`` bytes of zeros, at least one, in a file that takes disk and memory only where it is written.

    ``what`` is stored there, for the message. Raises :class:`ConfigError` where the system gives no such file.
    """
    with _file() as file:
        try:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise _no_room(f"{what} of {size / 1e9:.0f} GB, of which only a part is written", error) from None
    return memory


def set_aside(tensor: Tensor, what: str) -> Tensor:
    """A copy of a ``tensor`` for what is rarely read, in a file where it is large: it takes memory while it is read.

    Many copies can be in use at once: none keeps its file open. Raises :class:`ConfigError` where the disk has no room.
    """
    import torch

    if tensor.device.type != "cpu" or not tensor.numel() or tensor.nbytes < SET_ASIDE:
        return tensor.clone()
    try:
        with tempfile.NamedTemporaryFile(prefix=_PREFIX) as file:
            file.write(tensor.contiguous().numpy().data)  # a full disk is noticed here
            file.flush()
            filed = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise _no_room(f"{what} of {tensor.nbytes / 1e6:.0f} MB", error) from None
    return filed.view(tensor.shape)


def check_room(needed: int, what: str) -> None:
    """Raise :class:`ConfigError` where the disk has less than ``needed`` bytes left for ``what``. A file in memory that
    the disk has no room for would end the process without a word."""
    folder = _folder()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: {what} need {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free there; {_ADVICE}"
        )


_ADVICE = "expected a folder for temporary files, TMPDIR, on a disk with more room"

_PREFIX = "perfedrec-"
"""How the names of the files begin."""


def _file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix=_PREFIX)
    except OSError as error:
        raise _no_room("large arrays", error) from None


def _folder() -> str:
    """The folder for temporary files. Raises :class:`ConfigError` where there is none."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"{error.strerror}; {_ADVICE}") from None


def _no_room(what: str, error: OSError) -> ConfigError:
    return ConfigError(f"{_folder()}: no room for {what} ({reason(error)}); {_ADVICE}")
