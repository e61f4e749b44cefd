"""Personalised federated recommendation with self-supervised pre-training."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from perfedrec.core.malloc import keep_freed_memory
from perfedrec.core.version import __version__ as __version__

if TYPE_CHECKING:
    from perfedrec.core.errors import CheckpointError, ConfigError, DataError, PerfedrecError
    from perfedrec.core.keys import Key
    from perfedrec.core.settings import Settings
    from perfedrec.data import Dataset, Interactions, load, split, synthetic
    from perfedrec.evaluation import metrics
    from perfedrec.federation.owner import Node
    from perfedrec.methods.centralised.method import Method, Training
    from perfedrec.methods.centralised.vectors import Batch, VectorMethod, VectorSettings
    from perfedrec.methods.federated.base import Federated
    from perfedrec.methods.federated.perfedrec import PerFedRec
    from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
    from perfedrec.methods.federated.settings import FederatedSettings, PerFedRecSettings
    from perfedrec.methods.registry import list_methods
    from perfedrec.runs.config import Config, RunSettings
    from perfedrec.runs.config import load as configure
    from perfedrec.runs.folder import Entry
    from perfedrec.runs.result import Result, open_run
    from perfedrec.runs.training import train

keep_freed_memory()

# polars keeps what it has freed for its next table, some 70 MB after reading Gowalla, and reads no faster by it.
os.environ.setdefault("_RJEM_MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0")

# OpenMP reads it when torch is loaded. Threads that wait shall not take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = [
    "Batch",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Dataset",
    "Entry",
    "Federated",
    "FederatedSettings",
    "Interactions",
    "Key",
    "Method",
    "Node",
    "PerFedRec",
    "PerFedRecPP",
    "PerFedRecSettings",
    "PerfedrecError",
    "Result",
    "RunSettings",
    "Settings",
    "Training",
    "VectorMethod",
    "VectorSettings",
    "configure",
    "list_methods",
    "load",
    "metrics",
    "open_run",
    "split",
    "synthetic",
    "train",
]

_HOMES = {
    "perfedrec.methods.federated.base": ("Federated",),
    "perfedrec.methods.federated.perfedrec": ("PerFedRec",),
    "perfedrec.methods.federated.perfedrec_pp": ("PerFedRecPP",),
    "perfedrec.methods.federated.settings": ("FederatedSettings", "PerFedRecSettings"),
    "perfedrec.methods.centralised.method": ("Method", "Training"),
    "perfedrec.methods.centralised.vectors": ("Batch", "VectorMethod", "VectorSettings"),
    "perfedrec.core.errors": ("CheckpointError", "ConfigError", "DataError", "PerfedrecError"),
    "perfedrec.core.keys": ("Key",),
    "perfedrec.core.settings": ("Settings",),
    "perfedrec.data": ("Dataset", "Interactions", "load", "split", "synthetic"),
    "perfedrec.evaluation": ("metrics",),
    "perfedrec.federation.owner": ("Node",),
    "perfedrec.methods.registry": ("list_methods",),
    "perfedrec.runs.config": ("Config", "RunSettings", "configure"),
    "perfedrec.runs.folder": ("Entry",),
    "perfedrec.runs.result": ("Result", "open_run"),
    "perfedrec.runs.training": ("train",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that help and completion do not wait for torch."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), "load" if name == "configure" else name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
