"""What all charts share: colours, symbols, axes and units.

Colours are CSS variables, which ``assets/page.css`` defines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from plotly.basedatatypes import BaseTraceType
from plotly.graph_objects import Figure

from perfedrec.evaluation.ranking import cutoffs_of
from perfedrec.report.page import Change
from perfedrec.runs.folder import Entry

COLOURS = tuple(f"var(--c{number})" for number in range(1, 7))
BANDS = tuple(f"var(--b{number})" for number in range(1, 7))
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
NAMES = {"recall": "Recall", "ndcg": "NDCG", "hr": "Hit rate", "mrr": "MRR", "precision": "Precision"}
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
FEW = 12  # up to this number of rounds, an axis has a mark for each


def plotted(names: Iterable[str]) -> tuple[str, ...]:
    """The metrics that charts show, of those with these ``names``: NDCG and recall, long lists first."""
    return tuple(f"{kind}@{k}" for k in reversed(cutoffs_of(names)) for kind in ("ndcg", "recall"))


def metric_name(metric: str) -> str:
    """The name of a metric as a reader sees it: ``NDCG@20`` for ``ndcg@20``."""
    name, _, k = metric.partition("@")
    return f"{NAMES.get(name, name.capitalize())}@{k}"


def figure(traces: Sequence[BaseTraceType], x: str, y: str, **layout: Any) -> Figure:
    """A figure in the style of the page, with axes titled ``x`` and ``y``; ``layout`` goes to plotly as it is."""
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--rule)",
        "zerolinecolor": "var(--rule)",
        "zeroline": False,
        "automargin": True,
    }
    drawn = Figure(list(traces))
    drawn.update_layout(
        template="none",
        font={
            "family": "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, sans-serif",
            "color": "var(--ink)",
        },
        paper_bgcolor="var(--paper)",
        plot_bgcolor="var(--paper)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "var(--soft)", "activecolor": "var(--ink)"},
        margin={"l": 48, "r": 12, "t": 12, "b": 40},
        hoverlabel={"bgcolor": "var(--raised)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemwidth": 30},
        showlegend=len(traces) > 1,
        xaxis={**axis, "title": {"text": x, "standoff": 10, "font": {"size": 13}}},
        yaxis={**axis, "title": {"text": y, "standoff": 10, "font": {"size": 13}}},
    )
    drawn.update_layout(**layout)
    return drawn


def broken(label: str, width: int) -> str:
    """A label in lines of at most ``width`` characters, so that a long one leaves room for the chart on a phone."""
    return "<br>".join(textwrap.wrap(label, width)) or label


def rangemode(values: Iterable[float]) -> str:
    """The range of an axis: what the values need, and from 0 where there is only one value to see."""
    return "normal" if len(set(values)) > 1 else "tozero"


def titled(axis: str, text: str) -> Change:
    """The change of a layout that gives an axis another title."""
    return {axis: {"title": {"text": text}}}


def along(text: str, values: Sequence[float]) -> Change:
    """The change of a layout whose x axis has ``values`` and the title ``text``.

    An axis of few rounds gets a mark for each round.
    """
    few = text.startswith("round") and max(values) - min(values) <= FEW
    return {"xaxis": {"title": {"text": text}, **({"dtick": 1} if few else {})}}


def rounded(values: Sequence[float]) -> list[float]:
    """Values with the 5 digits that a chart can show, which keeps the file small."""
    return [float(f"{each:.5g}") for each in values]


def spent(history: Sequence[Entry], n_phases: int, users: int) -> dict[str, list[float]]:
    """What a run had spent after each of its rounds, summed over the rounds so far.

    Columns: ``round`` (its number; 0 and below are before training), ``bytes up`` and ``bytes down`` (means over all
    ``users`` clients), and ``seconds`` of computation. ``n_phases`` is the number of rounds before training.
    """
    found: dict[str, list[float]] = {"round": [], "bytes up": [], "bytes down": [], "seconds": []}
    up = down = seconds = 0.0
    for entry in history:
        up, down = up + entry.report.bytes_up / users, down + entry.report.bytes_down / users
        seconds += entry.seconds
        for name, value in zip(found, (entry.report.round + 1 - n_phases, up, down, seconds), strict=True):
            found[name].append(float(value))
    return found


def scale_of(name: str, largest: float) -> tuple[float, str]:
    """The number to divide a column of :func:`spent` by, and the title of its axis after that.

    ``largest`` is the largest value of the column; it decides between kB, MB and GB.
    """
    if not name.startswith("bytes"):
        return 1.0, {"round": "round of training", "seconds": "seconds of computation, without evaluation"}[name]
    divisor, unit = next(((size, unit) for size, unit in UNITS if largest >= size), (1.0, "bytes"))
    return divisor, f"{unit} {'sent' if name == 'bytes up' else 'received'} by a client, on average"


def axes_of(columns: dict[str, list[float]]) -> dict[str, tuple[str, list[float]]]:
    """The title and the scaled values of each column of :func:`spent`; columns of bytes only where bytes were sent."""
    axes = {}
    for name, values in columns.items():
        if values and (values[-1] or not name.startswith("bytes")):
            divisor, title = scale_of(name, values[-1])
            before = " (0 and below: before it)" if name == "round" and values[0] <= 0 else ""
            axes[name] = (title + before, [each / divisor for each in values])
    return axes
