"""Charts of a comparison: validation accuracy of all methods over their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from plotly.graph_objects import Scatter

from perfedrec.report.compared import Compared, hover_text
from perfedrec.report.page import Change, Chart, Option, Switch, Table
from perfedrec.report.style import broken, figure, metric_name, rangemode, rounded, scale_of, spent, titled

SHOWN = 8  # curves that are shown at first; a click in the legend shows the others

Columns = dict[str, list[float]]
"""Values by round: the columns of :func:`.style.spent`, each metric, and each metric's deviation as ``METRIC sd``."""


def curves_chart(name: str, methods: Sequence[Compared], metrics: Sequence[str], reference: str | None) -> Chart | None:
    """Validation metrics of all methods over their runs: means over seeds, with a band of one standard deviation.

    The best methods and the reference are shown at first. ``None`` where no method has been evaluated during a run.
    """
    ordered = sorted(methods, key=lambda method: method.place)
    curves = [(method, found) for method in ordered if (found := curve_of(method, metrics)) is not None]
    if not curves:
        return None
    best = sorted(curves, key=lambda each: -each[0].test[metrics[0]]["mean"])[:SHOWN]
    visible = {method.label for method, _ in best} | {method.label for method, _ in curves if method.label == reference}
    axes = _axes([columns for _, columns in curves])
    across = [
        Option(axis, _along(curves, axis, scale), titled("xaxis", title)) for axis, (scale, title) in axes.items()
    ]
    upwards = [
        Option(metric_name(each), _upwards(curves, each), titled("yaxis", f"validation {metric_name(each)}"))
        for each in metrics
    ]
    traces = []
    for place, (method, columns) in enumerate(curves):
        pair = slice(2 * place, 2 * place + 2)
        traces += _traces(method, columns, method.label in visible, across[0].data[pair], upwards[0].data[pair])
    mode = rangemode(value for _, columns in curves for value in columns[metrics[0]])
    upright = f"validation {metric_name(metrics[0])}"
    shown = figure(traces, axes["round"][1], upright, showlegend=True, yaxis_rangemode=mode)
    rows = [
        [method.label, *(f"{columns[key][at]:.5g}" for key in ("round", *metrics))]
        for method, columns in curves
        for at in range(len(columns["round"]))
    ]
    return Chart(
        f"{name}-curves",
        "Accuracy on validation data over the run",
        _text(len(methods), len(curves), len(visible)),
        shown,
        Table("Validation metrics, means over seeds", ("method", "round", *map(metric_name, metrics)), rows),
        (Switch("Against", across), Switch("Metric", upwards)),
        height="tall",
    )


def _text(methods: int, curves: int, visible: int) -> str:
    text = "Means over seeds, with a band of one standard deviation."
    if visible < curves:
        text += f" At first {visible} of {curves} methods are shown, the best among them; click the legend for others."
    if curves < methods:
        text += " Methods that are fitted in one step have no curve."
    return text


def _axes(curves: Sequence[Columns]) -> dict[str, tuple[float, str]]:
    """By name of a column: what its values are divided by, and the title of the axis. Columns of zeros are left out."""
    axes = {}
    for axis in ("round", "bytes up", "bytes down", "seconds"):
        largest = max(columns[axis][-1] for columns in curves)
        if largest or axis == "round":
            axes[axis] = scale_of(axis, largest)
    if any(columns["round"][0] <= 0 for columns in curves):
        axes["round"] = (1.0, f"{axes['round'][1]} (0 and below: before it)")
    return axes


def _along(curves: Sequence[tuple[Compared, Columns]], axis: str, scale: float) -> list[Change]:
    """The x values of band and curve of each method."""
    changes: list[Change] = []
    for _, columns in curves:
        x = [each / scale for each in columns[axis]]
        drawn = axis == "round" or columns[axis][-1] > 0  # a method that sends nothing has no place on an axis of bytes
        changes += [{"x": rounded(x + x[::-1]) if drawn else []}, {"x": rounded(x) if drawn else []}]
    return changes


def _upwards(curves: Sequence[tuple[Compared, Columns]], metric: str) -> list[Change]:
    """The y values of band and curve of each method."""
    changes: list[Change] = []
    for _, columns in curves:
        mean, sd = columns[metric], columns[f"{metric} sd"]
        high = [each + one for each, one in zip(mean, sd, strict=True)]
        low = [each - one for each, one in zip(mean, sd, strict=True)]
        changes += [{"y": rounded(high + low[::-1])}, {"y": rounded(mean)}]
    return changes


def _traces(
    method: Compared, columns: Columns, visible: bool, x: Sequence[Change], y: Sequence[Change]
) -> list[Scatter]:
    """The band and the curve of a method; ``x`` and ``y`` hold the values of both."""
    shared = {"legendgroup": method.label, "visible": True if visible else "legendonly"}
    band = Scatter(
        **x[0],
        **y[0],
        **shared,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=method.band,
        hoverinfo="skip",
        showlegend=False,
    )
    curve = Scatter(
        **x[1],
        **y[1],
        **shared,
        mode="lines" if len(columns["round"]) > 1 else "markers",
        name=broken(method.label, 40),
        line={"color": method.colour, "width": 2, "dash": method.dash},
        marker={"color": method.colour, "symbol": method.symbol, "size": 9},
        customdata=[int(each) for each in columns["round"]],
        hovertemplate="%{y:.4f}<extra>" + hover_text(method.label) + ", round %{customdata}</extra>",
    )
    return [band, curve]


def curve_of(method: Compared, metrics: Sequence[str]) -> Columns | None:
    """What a method had spent and reached in each evaluated round: means over seeds, and deviations of the metrics.

    Only rounds that all seeds have evaluated are taken. ``None`` where there is no such round.
    """
    runs = [found for found in _evaluated(method, metrics) if found]
    if not runs:
        return None
    rounds = sorted(set.intersection(*(set(each) for each in runs)))
    if not rounds:
        return None
    found = {key: [fmean(each[number][key] for each in runs) for number in rounds] for key in runs[0][rounds[0]]}
    for metric in metrics:
        values = [[each[number][metric] for each in runs] for number in rounds]
        found[f"{metric} sd"] = [stdev(each) if len(each) > 1 else 0.0 for each in values]
    return found


def _evaluated(method: Compared, metrics: Sequence[str]) -> list[Mapping[int, Mapping[str, float]]]:
    """For each run: its evaluated rounds by number, with what had been spent by then and the metrics."""
    runs: list[Mapping[int, Mapping[str, float]]] = []
    for run in method.runs:
        columns = spent(run.history, run.n_phases, method.users)
        runs.append(
            {
                entry.report.round + 1 - run.n_phases: {
                    **{axis: column[place] for axis, column in columns.items()},
                    **{metric: entry.valid[metric] for metric in metrics},
                }
                for place, entry in enumerate(run.history)
                if entry.valid and metrics[0] in entry.valid and entry.report.phase != "fit"
            }
        )
    return runs
