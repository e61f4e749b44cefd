"""Data: immutable interactions with id maps, file formats, splits, attributes and synthetic data."""

from perfedrec.data.attributes import read_attributes
from perfedrec.data.catalogue import Catalogue, read_catalogue
from perfedrec.data.dataset import (
    Attributes,
    Dataset,
    Encoding,
    HeldOut,
    SplitReport,
    SyntheticTruth,
    Ties,
)
from perfedrec.data.describe import describe, gini
from perfedrec.data.detection import detect
from perfedrec.data.fetch import SOURCES, Source, fetch
from perfedrec.data.formats import FORMATS, parse_columns, read, read_with_report
from perfedrec.data.frames import DataLike, rows_of
from perfedrec.data.given import from_files
from perfedrec.data.interactions import Interactions
from perfedrec.data.lists import read_negatives
from perfedrec.data.prepare import PrepareReport, prepare
from perfedrec.data.readreport import ReadReport
from perfedrec.data.relations import Relations, read_relations
from perfedrec.data.source import LoadOptions, attributes_beside, load
from perfedrec.data.split import SplitRule, implied, parse_ratio, split
from perfedrec.data.synthetic import synthetic
from perfedrec.data.ties import LastTies, last_ties
from perfedrec.data.write import write

__all__ = [
    "FORMATS",
    "SOURCES",
    "Attributes",
    "Catalogue",
    "DataLike",
    "Dataset",
    "Encoding",
    "HeldOut",
    "Interactions",
    "LastTies",
    "LoadOptions",
    "PrepareReport",
    "ReadReport",
    "Relations",
    "Source",
    "SplitReport",
    "SplitRule",
    "SyntheticTruth",
    "Ties",
    "attributes_beside",
    "describe",
    "detect",
    "fetch",
    "from_files",
    "gini",
    "implied",
    "last_ties",
    "load",
    "parse_columns",
    "parse_ratio",
    "prepare",
    "read",
    "read_attributes",
    "read_catalogue",
    "read_negatives",
    "read_relations",
    "read_with_report",
    "rows_of",
    "split",
    "synthetic",
    "write",
]
