"""The charts of a report as figures for papers: PDF and SVG, one column wide, with the numbers of each chart as CSV.

A figure is drawn from the same plotly traces that the page shows, so that both always show the same values.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from perfedrec.core.errors import ConfigError, reason
from perfedrec.report.page import Change, Chart, Page
from perfedrec.runs.checkpoint import write_atomic

WIDTH = 3.3
"""Inches: a column of the common two-column styles."""

MAKER = "perfedrec report"
"""What figures name as their maker; a file without it is never replaced."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine writes the same figure
    "font.size": 7,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.hashsalt": "perfedrec",
    "text.parse_math": False,  # a dollar in a label is a dollar
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}
METADATA = {"pdf": {"Creator": MAKER, "CreationDate": None}, "svg": {"Creator": MAKER, "Date": None}}
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "x": "X",
    "star": "*",
    "triangle-down": "v",
    "cross": "P",
    "line-ns-open": "|",
}
LINES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (9, 3))}
PIXEL = 0.5  # points on paper for a pixel of the page: figures are narrower
MARKS = 10  # a curve has about this number of marks: enough to tell curves apart, too few to hide them
PAPER = "white"


def write_figures(page: Page, folder: Path) -> list[Path]:
    """Write each chart of a page to ``folder`` as PDF, SVG and CSV, and return the paths of the files.

    A chart with switches, such as one for the metric, is written as the page first shows it, and once more for each
    other choice of each switch. Equal pages give equal bytes. Raises :class:`ConfigError` where the folder cannot be
    written, or has a file of the same name that is not of this kind; nothing is written then.
    """
    contents: dict[Path, bytes] = {}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for name, chart in zip(_names(page), page.charts(), strict=True):
            for suffix, view in _views(chart):
                contents |= {folder / f"{name}{suffix}.{kind}": drawn for kind, drawn in _drawn(view).items()}
            contents[folder / f"{name}.csv"] = chart.numbers.csv().encode()
    _warn([str(each.message) for each in heard])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in contents:
            if path.exists() and not _ours(path):
                raise ConfigError(
                    f"{path} exists and is no figure of a report; expected a new folder, or figures to replace"
                )
        for path, content in contents.items():
            write_atomic(path, content)
    except OSError as error:
        raise ConfigError(f"{folder}: figures cannot be written ({reason(error)}); expected a folder") from None
    return [*contents]


def _warn(messages: Sequence[str]) -> None:
    """Warn of what matplotlib has warned of: once of each thing, and in one line of all letters that its font lacks."""
    absent = dict.fromkeys(chr(int(code)) for each in messages for code in re.findall(r"^Glyph (\d+) ", each))
    if absent:
        font = STYLE["font.family"]
        text = f"figures show boxes for {' '.join(absent)}, which their font ({font}) lacks; expected other letters"
        warnings.warn(text, stacklevel=3)
    for text in dict.fromkeys(each for each in messages if not each.startswith("Glyph ")):
        warnings.warn(f"figures: {text}", stacklevel=3)


def _ours(path: Path) -> bool:
    """Whether a file is a figure that this module wrote, or a table beside one."""
    figure = path.with_suffix(".svg") if path.suffix == ".csv" else path
    return figure.exists() and MAKER.encode() in figure.read_bytes()


def _names(page: Page) -> list[str]:
    """The names of the files of all charts: those of a data set's section have its name instead of the number."""
    places: dict[str, str] = {}
    for section in page.sections:
        slug = re.sub(r"[^a-zA-Z0-9]+", "-", section.title).strip("-")
        places[section.name] = slug if slug and slug not in places.values() else section.name
    return [
        chart.name.replace(section.name, places[section.name], 1)
        if chart.name.startswith(f"{section.name}-")
        else chart.name
        for section in page.sections
        for chart in section.blocks
        if isinstance(chart, Chart)
    ]


View = tuple[list[Change], Change]
"""The traces and the layout of a figure, as plotly writes them in JSON."""


def _views(chart: Chart) -> Iterator[tuple[str, View]]:
    """The figures of a chart, each with what its file's name ends in: nothing, or the choice of one switch."""
    first = [switch.options[0] for switch in chart.switches]
    choices = [("", first)]
    for place, switch in enumerate(chart.switches):
        for option in switch.options[1:]:
            suffix = "-" + re.sub(r"[^a-z0-9]+", "-", option.label.lower())
            choices.append((suffix, [*first[:place], option, *first[place + 1 :]]))
    plain = chart.plain()
    for suffix, options in choices:
        data, layout = plain["data"], plain["layout"]
        for option in options:
            changes = [*option.data, *[{}] * (len(data) - len(option.data))]
            data = [_merged(trace, change) for trace, change in zip(data, changes, strict=True)]
            layout = _merged(layout, option.layout)
        yield suffix, (data, layout)


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> Change:
    """A part of a plotly figure with a change, as ``charts.js`` merges them."""
    changed = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in change.items()
    }
    return {**base, **changed}


def _drawn(view: View) -> dict[str, bytes]:
    """A figure as the content of a file of each kind."""
    contents = {}
    with matplotlib.rc_context(STYLE):
        shown = _figure(*view)
        for kind, metadata in METADATA.items():
            content = io.BytesIO()
            shown.savefig(content, format=kind, metadata=metadata)
            contents[kind] = content.getvalue()
    return contents


def _figure(data: Sequence[Change], layout: Change) -> Figure:
    traces = [trace for trace in data if trace.get("visible") != "legendonly" and len(trace["x"])]
    places = {axis: _categories(traces, layout, axis) for axis in "xy"}
    shown = Figure(layout="constrained")
    axes = shown.subplots()
    handles = [handle for trace in traces if (handle := _draw(axes, trace, places)) is not None]
    room = {"x": 30 if places["y"] else 52, "y": 30}
    for axis in "xy":
        values = [] if places[axis] else [float(value) for trace in traces for value in trace[axis]]
        _set_axis(axes, axis, layout[f"{axis}axis"], places[axis] or values, room[axis])
    if layout["yaxis"].get("scaleanchor"):
        axes.set_aspect("equal", adjustable="datalim")
    lines = _legend(shown, handles) if layout["showlegend"] else 0
    rows = sum(_text(label).count("\n") + 1 for label in places["y"].values())
    shown.set_size_inches(WIDTH, (0.7 + 0.17 * rows if rows else 2.1) + 0.14 * lines)
    return shown


def _legend(shown: Figure, handles: Sequence[Line2D]) -> int:
    """Put the legend above the chart, where it hides no curve. The result is its height in lines."""
    longest = max((len(line) for each in handles for line in str(each.get_label()).split("\n")), default=0)
    columns = 1 if longest > 24 else 2 if longest > 13 else 3
    shown.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2, handlelength=3)
    heights = [str(each.get_label()).count("\n") + 1 for each in handles]
    return -(-sum(heights) // columns)


def _categories(traces: Sequence[Change], layout: Change, axis: str) -> dict[str, str]:
    """The values of an axis of words, in order, each with its label; empty for an axis of numbers."""
    about = layout[f"{axis}axis"]
    values = [value for trace in traces for value in trace[axis]]
    if about.get("type") != "category" and not any(isinstance(value, str) for value in values):
        return {}
    ordered = dict.fromkeys([*about.get("categoryarray", ()), *map(str, values)])
    labels = dict(zip(about.get("tickvals", ()), about.get("ticktext", ()), strict=True))
    return {value: labels.get(value, value) for value in ordered}


def _set_axis(axes: Axes, axis: str, about: Change, shown: Mapping[str, str] | Sequence[float], room: int) -> None:
    """Title, scale, marks and limits of an axis that shows words, by value, or numbers.

    ``room`` is for how many letters of its title a line has room.
    """
    drawn, limits = (axes.xaxis, axes.set_xlim) if axis == "x" else (axes.yaxis, axes.set_ylim)
    drawn.set_label_text("\n".join(textwrap.wrap(about["title"].get("text", ""), room, break_on_hyphens=False)))
    if about.get("type") == "log":
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        drawn.set_minor_locator(NullLocator())
        drawn.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    if isinstance(shown, Mapping):
        drawn.set_ticks(range(len(shown)), [_text(label) for label in shown.values()])
        limits(-0.6, len(shown) - 0.4)
        drawn.grid(visible=False)
    elif "tickvals" in about:
        drawn.set_ticks(about["tickvals"], about["ticktext"])
    elif about.get("type") == "log" and max(shown) > 8 * min(shown):
        drawn.set_major_locator(LogLocator(subs=(1, 2, 5) if max(shown) < 1000 * min(shown) else (1,)))
    else:
        whole = all(value.is_integer() for value in shown)
        drawn.set_major_locator(MaxNLocator(6, integer=whole, steps=(1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)))
    if "range" in about:
        limits(*about["range"])
    elif about.get("rangemode") == "tozero":
        limits(0)
    if about.get("autorange") == "reversed":
        drawn.set_inverted(True)
    if about.get("zeroline"):
        (axes.axvline if axis == "x" else axes.axhline)(0, color="0.4", linewidth=0.8, zorder=1)


def _draw(axes: Axes, trace: Change, categories: Mapping[str, Mapping[str, str]]) -> Line2D | None:
    """Draw a trace. The result is its sign in the legend, or ``None`` where it has none."""
    x, y = (_numbers(trace[axis], categories[axis]) for axis in "xy")
    if trace["type"] == "bar":
        bars = axes.barh(y, x, height=0.5, color=_colour(trace["marker"]["color"]))
        axes.bar_label(bars, fmt="%.3g", padding=2)
        axes.margins(x=0.12)
        return None
    if trace.get("fill") == "toself":
        axes.fill(x, y, color=_colour(trace["fillcolor"]), linewidth=0, zorder=1)
        return None
    mode, line, marker = trace["mode"].split("+"), trace.get("line", {}), trace.get("marker", {})
    for axis in "xy":
        error = trace.get(f"error_{axis}")
        if error:
            reach = [error.get("arrayminus", error["array"]), error["array"]]
            look: dict[str, Any] = {"ecolor": _colour(error["color"]), "elinewidth": 0.9, "capsize": 1.5, "zorder": 2}
            axes.errorbar(x, y, fmt="none", **{**look, f"{axis}err": reach})
    marked = "markers" in mode or "symbol" in marker
    colour = _colour(marker.get("color") or line.get("color"))
    edge = marker.get("line", {})
    thin = marker.get("symbol") == "line-ns-open"
    (drawn,) = axes.plot(
        x,
        y,
        color=colour,
        linestyle=LINES[line.get("dash", "solid")] if "lines" in mode else "none",
        linewidth=1.2,
        marker=MARKERS[marker.get("symbol", "circle")] if marked else "none",
        markersize=PIXEL * marker.get("size", 6),
        markeredgecolor=_colour(edge["color"]) if "color" in edge else colour,
        markeredgewidth=0.9 if thin or "color" in edge else 0,
        markevery=max(1, len(x) // MARKS) if "lines" in mode else None,
        alpha=marker.get("opacity"),
        label=_text(trace.get("name", "")),
        zorder=3,
    )
    for at, text in enumerate(trace["text"] if "text" in mode else ()):
        offset = (3, -9 if at % 2 else 4)  # neighbours lie on both sides of the line
        axes.annotate(_text(text), (x[at], y[at]), xytext=offset, textcoords="offset points", color=colour)
    return drawn if trace.get("showlegend", True) else None


def _numbers(values: Sequence[Any], categories: Mapping[str, str]) -> list[float]:
    places = {value: float(place) for place, value in enumerate(categories)}
    return [places[str(value)] if categories else float(value) for value in values]


def _text(label: str) -> str:
    """A label of the page in lines that fit a column."""
    return "\n".join(line for part in label.split("<br>") for line in textwrap.wrap(part, 44, break_on_hyphens=False))


@cache
def _colour(name: str) -> tuple[float, float, float] | tuple[float, float, float, float] | str:
    """A colour of the page, as it is in light mode; ``name`` is that of a CSS variable: ``var(--c1)``."""
    if name == "var(--paper)":
        return PAPER
    style = (resources.files("perfedrec.report") / "assets" / "page.css").read_text(encoding="utf-8")
    found = re.search(rf"{re.escape(name[4:-1])}: ([^;]+);", style)
    assert found is not None, name
    if found[1].startswith("#"):
        return found[1]
    red, green, blue, share = map(float, re.findall(r"[\d.]+", found[1]))
    return red / 255, green / 255, blue / 255, share
