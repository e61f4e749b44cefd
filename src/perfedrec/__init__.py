"""Personalised federated recommendation with self-supervised pre-training."""

from perfedrec.algorithms.perfedrec import PerFedRec
from perfedrec.algorithms.perfedrec_pp import PerFedRecPP
from perfedrec.algorithms.settings import PerFedRecSettings
from perfedrec.core.errors import CheckpointError, ConfigError, DataError, PerfedrecError
from perfedrec.data import Dataset, Interactions, load, split, synthetic
from perfedrec.experiment.config import Config, RunSettings
from perfedrec.experiment.config import load as configure
from perfedrec.experiment.run import Result, open_run, train

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Dataset",
    "Interactions",
    "PerFedRec",
    "PerFedRecPP",
    "PerFedRecSettings",
    "PerfedrecError",
    "Result",
    "RunSettings",
    "configure",
    "load",
    "open_run",
    "split",
    "synthetic",
    "train",
]
