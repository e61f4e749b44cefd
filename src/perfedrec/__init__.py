"""Personalised federated recommendation with self-supervised pre-training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfedrec.algorithms.federated import Federated, FederatedSettings
    from perfedrec.algorithms.perfedrec import PerFedRec
    from perfedrec.algorithms.perfedrec_pp import PerFedRecPP
    from perfedrec.algorithms.settings import PerFedRecSettings
    from perfedrec.centralised.method import Method, Training
    from perfedrec.centralised.vectors import Batch, VectorMethod, VectorSettings
    from perfedrec.core.errors import CheckpointError, ConfigError, DataError, PerfedrecError
    from perfedrec.core.keys import Key
    from perfedrec.core.settings import Settings
    from perfedrec.data import Dataset, Interactions, load, split, synthetic
    from perfedrec.experiment.config import Config, RunSettings
    from perfedrec.experiment.config import load as configure
    from perfedrec.experiment.run import Result, open_run, train

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Dataset",
    "Federated",
    "FederatedSettings",
    "Interactions",
    "Key",
    "Method",
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
    "load",
    "open_run",
    "split",
    "synthetic",
    "train",
]

_HOMES = {
    "perfedrec.algorithms.federated": ("Federated", "FederatedSettings"),
    "perfedrec.algorithms.perfedrec": ("PerFedRec",),
    "perfedrec.algorithms.perfedrec_pp": ("PerFedRecPP",),
    "perfedrec.algorithms.settings": ("PerFedRecSettings",),
    "perfedrec.centralised.method": ("Method", "Training"),
    "perfedrec.centralised.vectors": ("Batch", "VectorMethod", "VectorSettings"),
    "perfedrec.core.errors": ("CheckpointError", "ConfigError", "DataError", "PerfedrecError"),
    "perfedrec.core.keys": ("Key",),
    "perfedrec.core.settings": ("Settings",),
    "perfedrec.data": ("Dataset", "Interactions", "load", "split", "synthetic"),
    "perfedrec.experiment.config": ("Config", "RunSettings", "configure"),
    "perfedrec.experiment.run": ("Result", "open_run", "train"),
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
