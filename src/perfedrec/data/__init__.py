"""Immutable interactions with id maps, file formats, splits, attributes and synthetic data."""

from perfedrec.data.dataset import Attributes, Dataset, HeldOut, SplitReport, SyntheticTruth
from perfedrec.data.formats import FORMATS, read
from perfedrec.data.interactions import Interactions
from perfedrec.data.source import load
from perfedrec.data.split import from_files, split
from perfedrec.data.synthetic import synthetic

__all__ = [
    "FORMATS",
    "Attributes",
    "Dataset",
    "HeldOut",
    "Interactions",
    "SplitReport",
    "SyntheticTruth",
    "from_files",
    "load",
    "read",
    "split",
    "synthetic",
]
