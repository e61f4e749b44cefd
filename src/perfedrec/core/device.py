"""Where tensors live."""

from typing import Literal

import torch

from perfedrec.core.errors import ConfigError


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """``auto`` takes CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but torch finds no CUDA device; expected auto or cpu on this machine")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
