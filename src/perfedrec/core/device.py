"""The device on which tensors are stored and computed."""

from typing import Literal

import torch

from perfedrec.core.errors import ConfigError


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this name; ``auto`` is CUDA where the machine has it, otherwise the CPU.

    Raises :class:`ConfigError` for ``cuda`` on a machine without CUDA.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but torch finds no CUDA device; expected auto or cpu on this machine")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
