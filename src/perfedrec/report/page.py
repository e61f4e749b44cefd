"""A page: sections of prose, figures, tables and charts, rendered into one HTML file that needs nothing else.

The file forbids the browser every request (``default-src 'none'``), and lets those scripts run that are in it, by their
digests, and no other: what a data set or a configuration holds cannot become one.
"""

from __future__ import annotations

import gzip
import hashlib
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


@dataclass(frozen=True)
class Prose:
    """A paragraph; ``aside`` for what qualifies the rest."""

    kind: ClassVar[str] = "prose"
    text: str
    aside: bool = False


@dataclass(frozen=True)
class Tile:
    """A key figure with its name and what puts it into proportion."""

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
    """Rows of cells under a ``header``; the first ``text`` columns hold words, the others numbers. ``folded`` away
    under its caption, where it is long."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Pairs:
    """Names with texts."""

    kind: ClassVar[str] = "pairs"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """A text as it is, folded away under a ``summary``."""

    kind: ClassVar[str] = "code"
    summary: str
    text: str


@dataclass(frozen=True)
class Option:
    """A way to look at a chart: what it changes in each of the traces, and in the layout."""

    label: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A choice between options, the first of which is shown first."""

    label: str
    options: Sequence[Option]


Height = Literal["short", "normal", "tall", "huge"]


@dataclass(frozen=True)
class Chart:
    """A figure with its ``title``, what is to be seen in it (``text``), its numbers as a table, and switches.

    Colours are names of the page's own, ``var(--c1)``, so that the chart follows light, dark and print.
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
        """As the page's script reads it."""
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
    """A whole report: ``over`` tells its kind, ``lead`` sums it up."""

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
    library, script = get_plotlyjs(), _asset("charts.js")
    digests = " ".join(
        f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in (library, script)
    )
    # In a block of data nothing may look like markup.
    charts = json.dumps({chart.name: chart.plain() for chart in page.charts()}, allow_nan=False).replace("<", "\\u003c")
    return environment.get_template("page.html.j2").render(
        page=page,
        policy=f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(_asset("page.css")),
        library=b64encode(gzip.compress(library.encode(), mtime=0)).decode(),  # a third of its size
        script=Markup(script),
        charts=Markup(charts),
        version=perfedrec.__version__,
    )


def _asset(name: str) -> str:
    return (resources.files("perfedrec.report") / "assets" / name).read_text(encoding="utf-8")
