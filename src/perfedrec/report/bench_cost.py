"""Charts of a comparison: test accuracy against what the best round had cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from plotly.graph_objects import Figure, Scatter

from perfedrec.report.bench_curves import SHOWN
from perfedrec.report.compared import Compared, hover_text
from perfedrec.report.page import Change, Chart, Option, Switch, Table
from perfedrec.report.style import broken, figure, metric_name, rangemode, rounded, scale_of, spent, titled

Costs = Mapping[str, Mapping[str, float]]
"""By label of a method: its costs by name."""


def cost_chart(name: str, methods: Sequence[Compared], metrics: Sequence[str], protocol: str) -> Chart | None:
    """Test metrics against the cost of the best round. ``None`` where no run has a cost."""
    costs = {method.label: _costs(method) for method in methods if method.runs}
    drawn = sorted((method for method in methods if costs.get(method.label)), key=lambda method: method.place)
    axes = _axes(costs, drawn)
    if not axes:
        return None
    names = {metric: f"test {metric_name(metric)}, {protocol}" for metric in metrics}
    across = [
        Option(axis, _along(costs, drawn, axis, scale), titled("xaxis", title)) for axis, (scale, title) in axes.items()
    ]
    upwards = [Option(metric_name(each), _upwards(drawn, each), titled("yaxis", names[each])) for each in metrics]
    silent = [method.label for method in drawn if "bytes up" not in costs[method.label]]
    note = (
        f" These send nothing and are shown for seconds only: {', '.join(silent)}." if silent and len(axes) > 1 else ""
    )
    return Chart(
        f"{name}-cost",
        "Accuracy against cost",
        f"Means over seeds; costs on a logarithmic axis.{note}",
        _figure(drawn, across[0].data, upwards[0].data, next(iter(axes.values()))[1], names[metrics[0]]),
        _table(costs, drawn, axes, metrics),
        (Switch("Against", across), Switch("Metric", upwards)),
        height="tall" if len(drawn) > SHOWN else "normal",
    )


def _axes(costs: Costs, drawn: Sequence[Compared]) -> dict[str, tuple[float, str]]:
    """By name of a cost that a method has: what its values are divided by, and the title of the axis."""
    axes = {}
    for axis in ("bytes up", "bytes down", "seconds"):
        if any(axis in costs[each.label] for each in drawn):
            scale, title = scale_of(axis, max(costs[each.label].get(axis, 0.0) for each in drawn))
            axes[axis] = (scale, f"{title}, until the best round")
    if "seconds" in axes:
        axes["seconds"] = (axes["seconds"][0], "processor seconds of the whole run, evaluation included")
    return axes


def _along(costs: Costs, drawn: Sequence[Compared], axis: str, scale: float) -> list[Change]:
    values = [costs[each.label].get(axis) for each in drawn]
    return [{"x": [] if each is None else rounded([each / scale])} for each in values]


def _upwards(drawn: Sequence[Compared], metric: str) -> list[Change]:
    return [{"y": rounded([each.test[metric]["mean"]])} for each in drawn]


def _figure(drawn: Sequence[Compared], x: Sequence[Change], y: Sequence[Change], across: str, upwards: str) -> Figure:
    traces = [
        Scatter(
            **x[place],
            **y[place],
            mode="markers",
            name=broken(method.label, 40),
            marker={"color": method.colour, "symbol": method.symbol, "size": 11},
            hovertemplate="%{y:.4f} for %{x:.4g}<extra>" + hover_text(method.label) + "</extra>",
        )
        for place, method in enumerate(drawn)
    ]
    mode = rangemode(value for each in y for value in each["y"])
    shown = figure(traces, across, upwards, showlegend=True, yaxis_rangemode=mode)
    shown.update_layout(xaxis={"type": "log"})
    return shown


def _table(
    costs: Costs, drawn: Sequence[Compared], axes: Mapping[str, tuple[float, str]], metrics: Sequence[str]
) -> Table:
    rows = []
    for method in drawn:
        row = [method.label]
        for axis, (scale, _) in axes.items():
            value = costs[method.label].get(axis)
            row.append("none" if value is None else f"{value / scale:.4g}")
        rows.append([*row, *(f"{method.test[metric]['mean']:.4f}" for metric in metrics)])
    header = ("method", *(title for _, title in axes.values()), *map(metric_name, metrics))
    return Table("Cost and test metrics", header, rows)


def _costs(method: Compared) -> dict[str, float]:
    """Mean bytes for each client until the best round, and processor seconds. A cost of zero is left out."""
    found: dict[str, list[float]] = {"bytes up": [], "bytes down": [], "seconds": []}
    for run in method.runs:
        columns = spent(run.history, run.n_phases, method.users)
        until_best = [place for place, number in enumerate(columns["round"]) if number <= run.best]
        for axis in ("bytes up", "bytes down"):
            if until_best and columns[axis][until_best[-1]]:
                found[axis].append(columns[axis][until_best[-1]])
        if run.seconds:
            found["seconds"].append(run.seconds)
    return {axis: fmean(values) for axis, values in found.items() if values}
