"""Charts of a comparison: an option that methods have with several values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from plotly.graph_objects import Scatter

from perfedrec.compare.tables import with_deviation
from perfedrec.report.compared import Compared, hover_text
from perfedrec.report.page import Change, Chart, Option, Switch, Table
from perfedrec.report.style import COLOURS, DASHES, SYMBOLS, figure, metric_name, rounded, titled

Points = dict[str, list[tuple[str, Compared]]]
"""By method: the values of the option, each with the method that has it."""

_SWEPT = re.compile(r"(?P<method>.+) (?P<key>[\w.]+)=(?P<value>[^ ]+)")


def sweep_charts(name: str, methods: Sequence[Compared], metrics: Sequence[str], protocol: str) -> list[Chart]:
    """A chart for each option that a method has with several values, found by labels ``METHOD key=value``."""
    swept: dict[str, Points] = {}
    for compared in methods:
        match = _SWEPT.fullmatch(compared.label)
        if match and compared.test:
            swept.setdefault(match["key"], {}).setdefault(match["method"], []).append((match["value"], compared))
    charts: list[Chart] = []
    for key, points in swept.items():
        several = {method: each for method, each in points.items() if len(each) > 1}
        if several:
            charts.append(_sweep_chart(f"{name}-sweep-{len(charts)}", key, several, metrics, protocol))
    return charts


def _sweep_chart(name: str, key: str, points: Points, metrics: Sequence[str], protocol: str) -> Chart:
    numbers = _numbers(points)
    if numbers is not None:
        points = {method: sorted(each, key=lambda point: numbers[point[0]]) for method, each in points.items()}
    axis = {metric: f"test {metric_name(metric)}, {protocol}" for metric in metrics}
    options = [Option(metric_name(each), _upwards(points, each), titled("yaxis", axis[each])) for each in metrics]
    traces = []
    for place, ((method, values), first) in enumerate(zip(points.items(), options[0].data, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        traces.append(
            Scatter(
                x=[value if numbers is None else numbers[value] for value, _ in values],
                y=first["y"],
                error_y={**first["error_y"], "type": "data", "color": colour, "thickness": 1.5, "width": 5},
                mode="lines+markers",
                name=method,
                line={"color": colour, "width": 2, "dash": DASHES[place % len(DASHES)]},
                marker={"color": colour, "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9},
                hovertemplate="%{y:.4f} ± %{error_y.array:.4f}<extra>" + hover_text(method) + f", {key} %{{x}}</extra>",
            )
        )
    shown = figure(traces, key, axis[metrics[0]], showlegend=True)
    shown.update_layout(xaxis=_ticks(numbers))
    rows = [
        [method, value, *(with_deviation(each.test[metric]) for metric in metrics)]
        for method, values in points.items()
        for value, each in values
    ]
    return Chart(
        name,
        f"{key} with several values",
        "Test metrics: means over seeds with their standard deviation.",
        shown,
        Table(f"Test metrics by {key}, {protocol}", ("method", key, *map(metric_name, metrics)), rows),
        (Switch("Metric", options),),
    )


def _upwards(points: Points, metric: str) -> list[Change]:
    """The y values of each method, with their deviations."""
    changes: list[Change] = []
    for values in points.values():
        found = [each.test[metric] for _, each in values]
        deviations = rounded([each["sd"] or 0.0 for each in found])
        changes.append({"y": rounded([each["mean"] for each in found]), "error_y": {"array": deviations}})
    return changes


def _numbers(points: Points) -> dict[str, float] | None:
    """The values as numbers, by their text; ``None`` where one of them is not a number."""
    try:
        return {value: float(value) for values in points.values() for value, _ in values}
    except ValueError:
        return None


def _ticks(numbers: Mapping[str, float] | None) -> Change:
    """The x axis: categories, or numbers; on a logarithmic scale where they are positive and span a factor of 8."""
    if numbers is None:
        return {"type": "category"}
    marks = sorted(set(numbers.values()))
    logarithmic = marks[0] > 0 and marks[-1] >= 8 * marks[0]
    return {
        "type": "log" if logarithmic else "linear",
        "tickvals": marks,
        "ticktext": [f"{each:g}" for each in marks],
    }
