"""The cells of a file by role, as its format has them, before they become ids, ratings and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import polars as pl

from perfedrec.data.roles import Place


@dataclass(frozen=True)
class Cells:
    """``table`` has a column for each role of the file: user, item and perhaps rating and timestamp.

    ``place`` gives the place of a row of the table in the file, as in ``line 7``. ``places`` are the columns of the
    roles, empty where the format has no columns; ``header`` says whether the first line names them (None: the format
    decides). ``blank`` is the number of blank lines. ``integers``: ids must be integers. ``ordered``: the items of a
    user are in the order of time. ``remarks`` are sentences about what was left out.
    """

    table: pl.DataFrame
    place: Callable[[int], str]
    places: Mapping[str, Place] = field(default_factory=dict)
    header: bool | None = None
    blank: int = 0
    integers: bool = False
    ordered: bool = False
    remarks: tuple[str, ...] = ()
