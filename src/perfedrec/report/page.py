"""A page: sections of prose, figures, tables and charts, rendered into one HTML file that needs nothing else.

The file's content security policy forbids the browser to request anything (``default-src 'none'``). It allows only the
two scripts of the file, which it names by their digests, so that text from a data set or a configuration can never run
as a script.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, ClassVar, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

import perfedrec

Change = dict[str, Any]
"""A part of a plotly trace or layout, as JSON: what an option of a switch changes."""


@dataclass(frozen=True)
class Prose:
    """A paragraph; an ``aside`` is a remark on the rest, and set apart from it."""

    kind: ClassVar[str] = "prose"
    text: str
    aside: bool = False


@dataclass(frozen=True)
class Tile:
    """A key figure with its name, and a note that helps to judge it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Key figures side by side."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a ``header``; the first ``text`` columns hold words, the others numbers.

    A ``folded`` table is hidden until the reader opens it by its caption.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    note: str = ""
    folded: bool = False

    def csv(self) -> str:
        """The header and the rows as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def address(self) -> str:
        """The values of :meth:`csv` in a ``data:`` address."""
        return "data:text/csv;charset=utf-8;base64," + b64encode(self.csv().encode()).decode()


@dataclass(frozen=True)
class Pairs:
    """Names with texts."""

    kind: ClassVar[str] = "pairs"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """A text shown as it is, hidden until the reader opens it by its ``summary``."""

    kind: ClassVar[str] = "code"
    summary: str
    text: str


@dataclass(frozen=True)
class Option:
    """One choice of a switch: what it changes in each of the traces (``data``), and in the ``layout``."""

    label: str
    data: Sequence[Change]
    layout: Change = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A choice between options; the first one is shown at the start."""

    label: str
    options: Sequence[Option]


Height = Literal["short", "normal", "tall", "huge"]


@dataclass(frozen=True)
class Chart:
    """A figure with a ``title``, a ``text`` that says what it shows, its numbers as a table, and switches.

    Colours are given as CSS variables of the page, such as ``var(--c1)``, so that they change with light mode, dark
    mode and print.
    """

    kind: ClassVar[str] = "chart"
    name: str
    title: str
    text: str
    figure: Figure
    numbers: Table
    switches: Sequence[Switch] = ()
    height: Height = "normal"

    def plain(self) -> dict[str, Any]:
        """The chart as the script of the page reads it."""
        drawn = json.loads(self.figure.to_json())
        options = [[{"data": each.data, "layout": each.layout} for each in switch.options] for switch in self.switches]
        return {"data": drawn["data"], "layout": drawn["layout"], "switches": options}


Block = Prose | Tiles | Table | Pairs | Code | Chart


@dataclass(frozen=True)
class Section:
    """A part of the page that can be linked to."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report: ``over`` is the line above the title, which names the kind of report; ``lead`` is the summary."""

    over: str
    title: str
    lead: str
    sections: Sequence[Section]

    def charts(self) -> Iterator[Chart]:
        for section in self.sections:
            yield from (block for block in section.blocks if isinstance(block, Chart))


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("perfedrec.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A page without charts has no script at all.
    scripts = [get_plotlyjs(), _asset("charts.js")] if any(page.charts()) else []
    digests = [f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts]
    allowed = " ".join(digests) or "'none'"
    # The data stand inside a script element: without "<" they cannot end it.
    charts = json.dumps({chart.name: chart.plain() for chart in page.charts()}, allow_nan=False).replace("<", "\\u003c")
    return environment.get_template("page.html.j2").render(
        page=page,
        policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(_asset("page.css")),
        # packed, a third of the size
        library=b64encode(gzip.compress(scripts[0].encode(), mtime=0)).decode() if scripts else "",
        script=Markup(scripts[1]) if scripts else "",
        charts=Markup(charts),
        version=perfedrec.__version__,
    )


def _asset(name: str) -> str:
    return (resources.files("perfedrec.report") / "assets" / name).read_text(encoding="utf-8")
