"""The charts of a comparison, each about one data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from plotly.graph_objects import Scatter

from perfedrec.compare.tables import with_deviation
from perfedrec.report.page import Chart, Height, Option, Switch, Table
from perfedrec.report.statistics import Mean
from perfedrec.report.style import (
    BANDS,
    COLOURS,
    DASHES,
    SYMBOLS,
    figure,
    metric_name,
    rounded,
    scale_of,
    spent,
    titled,
)
from perfedrec.runs.training import Entry

SHOWN = 8  # curves at once; the others are a click away in the legend
ALPHA = 0.05


@dataclass(frozen=True)
class Record:
    """A finished run of a method: its seed, test metrics and history, and the processor seconds of its processes."""

    seed: int
    test: dict[str, float]
    history: Sequence[Entry]
    n_phases: int
    best: int
    seconds: float | None


@dataclass(frozen=True)
class Line:
    """A method on a data set of n ``users``: its ``summary`` in results.json, its runs, and means over users; ``place``
    among the methods gives it its colour and symbol."""

    label: str
    place: int
    users: int
    summary: dict[str, Any]
    runs: Sequence[Record]
    means: dict[str, Mean]

    @property
    def test(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.summary.get("test", {})
        return found

    @property
    def colour(self) -> str:
        return COLOURS[self.place % len(COLOURS)]

    @property
    def band(self) -> str:
        return BANDS[self.place % len(BANDS)]

    @property
    def dash(self) -> str:
        return DASHES[self.place // len(COLOURS) % len(DASHES)]

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.place % len(SYMBOLS)]


def accuracy_chart(name: str, lines: Sequence[Line], metrics: Sequence[str], protocol: str) -> Chart:
    """Test metrics of all methods, the best by the first metric on top."""
    ranked = sorted((each for each in lines if each.test), key=lambda each: each.test[metrics[0]]["mean"])
    labels = [each.label for each in ranked]
    seeds = [(each.label, run) for each in ranked for run in each.runs]

    def values(metric: str) -> list[dict[str, Any]]:
        means = [each.means.get(metric) for each in ranked]
        reach = [0.0 if each is None or each.high is None else each.high - each.value for each in means]
        centres = [each.test[metric]["mean"] for each in ranked]
        return [
            {"x": rounded([run.test[metric] for _, run in seeds])},
            {"x": rounded(centres), "error_x": {"array": rounded(reach)}},
        ]

    first = values(metrics[0])
    traces = [
        Scatter(
            x=first[0]["x"],
            y=[label for label, _ in seeds],
            customdata=[run.seed for _, run in seeds],
            mode="markers",
            name="one seed",
            marker={"color": COLOURS[1], "size": 7, "symbol": "line-ns-open", "line": {"width": 1.5}},
            hovertemplate="%{x:.4f}<extra>%{y}, seed %{customdata}</extra>",
        ),
        Scatter(
            x=first[1]["x"],
            y=labels,
            mode="markers",
            name="mean over seeds, 95 % interval over users",
            marker={"color": COLOURS[0], "size": 9},
            error_x={**first[1]["error_x"], "type": "data", "color": COLOURS[0], "thickness": 1.5, "width": 4},
            hovertemplate="%{x:.4f} ± %{error_x.array:.4f}<extra>%{y}</extra>",
        ),
    ]
    axis = {metric: f"test {metric_name(metric)}, {protocol}" for metric in metrics}
    shown = figure(traces, axis[metrics[0]], "", xaxis_rangemode="tozero")
    shown.update_layout(yaxis={"type": "category", "categoryorder": "array", "categoryarray": labels})
    options = [Option(metric_name(each), values(each), titled("xaxis", axis[each])) for each in metrics]
    header = ["method"]
    for metric in metrics:
        header += [metric_name(metric), "95 % interval"]
    rows = []
    for each in reversed(ranked):
        row = [each.label]
        for metric in metrics:
            mean = each.means.get(metric)
            row += [f"{each.test[metric]['mean']:.4f}", "none" if mean is None else mean.interval()]
        rows.append(row)
    return Chart(
        f"{name}-accuracy",
        "Accuracy on test data",
        "Means over seeds with 95 % t intervals over users, and every seed by itself.",
        shown,
        Table(f"Test metrics, {protocol}", header, rows),
        (Switch("Metric", options),),
        height=_height(len(labels)),
    )


def difference_chart(name: str, lines: Sequence[Line], metric: str, reference: str, protocol: str) -> Chart | None:
    """Differences to the reference with their intervals, those apart from chance by the adjusted p-value filled."""
    ranked = sorted(
        (each for each in lines if each.summary.get("comparison")),
        key=lambda each: float(each.summary["comparison"]["difference"]),
    )
    if not ranked:
        return None
    labels, traces = [each.label for each in ranked], []
    for sure, title in ((True, f"adjusted p below {ALPHA:g}"), (False, "not apart from chance")):
        own = [each for each in ranked if significant(each.summary["comparison"]) == sure]
        found = [each.summary["comparison"] for each in own]
        traces.append(
            Scatter(
                x=rounded([each["difference"] for each in found]),
                y=[each.label for each in own],
                customdata=[f"{each['p_adjusted']:.4f}" for each in found],
                mode="markers",
                name=title,
                marker={
                    "color": COLOURS[0] if sure else "var(--paper)",
                    "size": 10,
                    "symbol": "circle",
                    "line": {"color": COLOURS[0], "width": 1.75},
                },
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": rounded([each["high"] - each["difference"] for each in found]),
                    "arrayminus": rounded([each["difference"] - each["low"] for each in found]),
                    "color": COLOURS[0],
                    "thickness": 1.5,
                    "width": 4,
                },
                hovertemplate="%{x:+.4f}, adjusted p %{customdata}<extra>%{y}</extra>",
            )
        )
    shown = figure(traces, f"test {metric_name(metric)} over {reference}, {protocol}", "")
    shown.update_layout(
        xaxis={"zeroline": True, "zerolinecolor": "var(--soft)", "zerolinewidth": 1.5},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": labels},
    )
    rows = []
    for each in reversed(ranked):
        found = each.summary["comparison"]
        figures = [f"{found[key]:+.4f}" for key in ("difference", "low", "high")]
        rows.append([each.label, verdict(found), *figures, *(f"{found[key]:.4f}" for key in ("p", "p_adjusted"))])
    header = ("method", f"against {reference}", "difference", "95 % from", "to", "p", "p, adjusted")
    return Chart(
        f"{name}-difference",
        f"Differences to {reference}",
        "Over users, each with the mean over the seeds that both finished; 95 % intervals. Filled: apart from chance, "
        "by a paired permutation test with p-values adjusted after Benjamini and Yekutieli for all methods.",
        shown,
        Table(f"Differences in test {metric_name(metric)}, {protocol}", header, rows, text=2),
        height=_height(len(labels)),
    )


def significant(comparison: dict[str, Any]) -> bool:
    """Whether a method differs from the reference by more than chance."""
    return bool(comparison["p_adjusted"] < ALPHA)


def verdict(comparison: dict[str, Any] | None) -> str:
    """The outcome of a comparison in words."""
    if comparison is None:
        return "none"
    if not significant(comparison):
        return "no difference shown"
    return "better" if comparison["difference"] > 0 else "worse"


def curves_chart(name: str, lines: Sequence[Line], metrics: Sequence[str], reference: str | None) -> Chart | None:
    """Validation metrics of all methods along their runs: means over seeds, with a band of one standard deviation."""
    ordered = sorted(lines, key=lambda line: line.place)
    followed = [(line, found) for line in ordered if (found := _followed(line, metrics)) is not None]
    if not followed:
        return None
    best = sorted(followed, key=lambda each: -each[0].test[metrics[0]]["mean"])[:SHOWN]
    open_lines = {line.label for line, _ in followed if line.label == reference} | {line.label for line, _ in best}
    axes = {}
    for axis in ("round", "bytes up", "bytes down", "seconds"):
        largest = max(found[axis][-1] for _, found in followed)
        if largest or axis == "round":
            axes[axis] = scale_of(axis, largest)
    if any(found["round"][0] <= 0 for _, found in followed):
        axes["round"] = (1.0, f"{axes['round'][1]} (0 and below: before it)")

    def along(axis: str) -> list[dict[str, Any]]:
        changes: list[dict[str, Any]] = []
        for _, found in followed:
            x = [each / axes[axis][0] for each in found[axis]]
            drawn = axis == "round" or found[axis][-1] > 0  # who sends nothing has no place on an axis of bytes
            changes += [{"x": rounded(x + x[::-1]) if drawn else []}, {"x": rounded(x) if drawn else []}]
        return changes

    def upwards(metric: str) -> list[dict[str, Any]]:
        changes: list[dict[str, Any]] = []
        for _, found in followed:
            mean, sd = found[metric], found[f"{metric} sd"]
            high = [each + one for each, one in zip(mean, sd, strict=True)]
            low = [each - one for each, one in zip(mean, sd, strict=True)]
            changes += [{"y": rounded(high + low[::-1])}, {"y": rounded(mean)}]
        return changes

    x, y, traces = along("round"), upwards(metrics[0]), []
    for place, (line, found) in enumerate(followed):
        shared = {"legendgroup": line.label, "visible": True if line.label in open_lines else "legendonly"}
        traces += [
            Scatter(
                **x[2 * place],
                **y[2 * place],
                **shared,
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=line.band,
                hoverinfo="skip",
                showlegend=False,
            ),
            Scatter(
                **x[2 * place + 1],
                **y[2 * place + 1],
                **shared,
                mode="lines" if len(found["round"]) > 1 else "markers",
                name=line.label,
                line={"color": line.colour, "width": 2, "dash": line.dash},
                marker={"color": line.colour, "symbol": line.symbol, "size": 9},
                customdata=[int(each) for each in found["round"]],
                hovertemplate="%{y:.4f}<extra>" + _plain(line.label) + ", round %{customdata}</extra>",
            ),
        ]
    shown = figure(traces, axes["round"][1], f"validation {metric_name(metrics[0])}", showlegend=True)
    shown.update_layout(yaxis_rangemode="tozero")
    rows = [
        [line.label, *(f"{found[key][at]:.5g}" for key in ("round", *metrics))]
        for line, found in followed
        for at in range(len(found["round"]))
    ]
    hidden = len(followed) - len(open_lines)
    more = f" {len(open_lines)} are shown, the best first; {hidden} are a click away in the legend." if hidden else ""
    missing = " Methods that are fitted at once have no curve." if len(followed) < len(lines) else ""
    return Chart(
        f"{name}-curves",
        "Accuracy on validation data over the run",
        f"Means over seeds, with a band of one standard deviation.{more}{missing}",
        shown,
        Table("Validation metrics, means over seeds", ("method", "round", *map(metric_name, metrics)), rows),
        (
            Switch("Against", [Option(axis, along(axis), titled("xaxis", axes[axis][1])) for axis in axes]),
            Switch(
                "Metric",
                [
                    Option(metric_name(each), upwards(each), titled("yaxis", f"validation {metric_name(each)}"))
                    for each in metrics
                ],
            ),
        ),
        height="tall",
    )


def _followed(line: Line, metrics: Sequence[str]) -> dict[str, list[float]] | None:
    """Means over seeds of what each evaluated round had cost and reached, over the rounds that all seeds evaluated."""
    runs = []
    for run in line.runs:
        columns = spent(run.history, run.n_phases, line.users)
        seen = {
            entry.report.round + 1 - run.n_phases: {
                **{axis: column[place] for axis, column in columns.items()},
                **{metric: entry.valid[metric] for metric in metrics},
            }
            for place, entry in enumerate(run.history)
            if entry.valid and metrics[0] in entry.valid and entry.report.phase != "fit"
        }
        if seen:
            runs.append(seen)
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


def cost_chart(name: str, lines: Sequence[Line], metrics: Sequence[str], protocol: str) -> Chart | None:
    """Test metrics against what the best round had cost."""
    costs = {line.label: _costs(line) for line in lines if line.runs}
    drawn = sorted((line for line in lines if costs.get(line.label)), key=lambda line: line.place)
    axes = [axis for axis in ("bytes up", "bytes down", "seconds") if any(axis in costs[each.label] for each in drawn)]
    if not drawn or not axes:
        return None
    scales = {}
    for axis in axes:
        largest = max(costs[each.label].get(axis, 0.0) for each in drawn)
        scales[axis] = scale_of(axis, largest)
    titles = {axis: f"{title}, until the best round" for axis, (_, title) in scales.items()}
    titles["seconds"] = "processor seconds of the whole run, evaluation included"

    def along(axis: str) -> list[dict[str, Any]]:
        values = [costs[each.label].get(axis) for each in drawn]
        return [{"x": [] if each is None else rounded([each / scales[axis][0]])} for each in values]

    def upwards(metric: str) -> list[dict[str, Any]]:
        return [{"y": rounded([each.test[metric]["mean"]])} for each in drawn]

    x, y = along(axes[0]), upwards(metrics[0])
    traces = [
        Scatter(
            **x[place],
            **y[place],
            mode="markers",
            name=line.label,
            marker={"color": line.colour, "symbol": line.symbol, "size": 11},
            hovertemplate="%{y:.4f} for %{x:.4g}<extra>" + _plain(line.label) + "</extra>",
        )
        for place, line in enumerate(drawn)
    ]
    axis_names = {metric: f"test {metric_name(metric)}, {protocol}" for metric in metrics}
    shown = figure(traces, titles[axes[0]], axis_names[metrics[0]], showlegend=True)
    shown.update_layout(xaxis={"type": "log"})
    rows = []
    for line in drawn:
        row = [line.label]
        for axis in axes:
            value = costs[line.label].get(axis)
            row.append("none" if value is None else f"{value / scales[axis][0]:.4g}")
        rows.append([*row, *(f"{line.test[metric]['mean']:.4f}" for metric in metrics)])
    nothing = [line.label for line in drawn if "bytes up" not in costs[line.label]]
    quiet = f" Sending nothing, and so shown for seconds alone: {', '.join(nothing)}." if nothing else ""
    return Chart(
        f"{name}-cost",
        "Accuracy against cost",
        f"Means over seeds; costs on a logarithmic axis.{quiet if len(axes) > 1 else ''}",
        shown,
        Table("Cost and test metrics", ("method", *(titles[axis] for axis in axes), *map(metric_name, metrics)), rows),
        (
            Switch("Against", [Option(axis, along(axis), titled("xaxis", titles[axis])) for axis in axes]),
            Switch(
                "Metric",
                [Option(metric_name(each), upwards(each), titled("yaxis", axis_names[each])) for each in metrics],
            ),
        ),
        height="tall" if len(drawn) > SHOWN else "normal",
    )


def _costs(line: Line) -> dict[str, float]:
    """Mean bytes a client until the best round, and processor seconds; what there was none of is left out."""
    found: dict[str, list[float]] = {"bytes up": [], "bytes down": [], "seconds": []}
    for run in line.runs:
        columns = spent(run.history, run.n_phases, line.users)
        upto = [place for place, number in enumerate(columns["round"]) if number <= run.best]
        for axis in ("bytes up", "bytes down"):
            if upto and columns[axis][upto[-1]]:
                found[axis].append(columns[axis][upto[-1]])
        if run.seconds:
            found["seconds"].append(run.seconds)
    return {axis: fmean(values) for axis, values in found.items() if values}


_SWEPT = re.compile(r"(?P<method>.+) (?P<key>[\w.]+)=(?P<value>[^ ]+)")


def sweep_charts(name: str, lines: Sequence[Line], metrics: Sequence[str], protocol: str) -> list[Chart]:
    """A chart for each option that a method has in several values, as labels ``method key=value`` tell."""
    swept: dict[str, dict[str, list[tuple[str, Line]]]] = {}
    for line in lines:
        match = _SWEPT.fullmatch(line.label)
        if match and line.test:
            swept.setdefault(match["key"], {}).setdefault(match["method"], []).append((match["value"], line))
    charts: list[Chart] = []
    for key, methods in swept.items():
        methods = {method: each for method, each in methods.items() if len(each) > 1}
        if methods:
            charts.append(_sweep_chart(f"{name}-sweep-{len(charts)}", key, methods, metrics, protocol))
    return charts


def _sweep_chart(
    name: str, key: str, methods: dict[str, list[tuple[str, Line]]], metrics: Sequence[str], protocol: str
) -> Chart:
    numbers = {value: _number(value) for points in methods.values() for value, _ in points}
    numeric = all(each is not None for each in numbers.values())
    if numeric:
        methods = {
            method: sorted(points, key=lambda point: numbers[point[0]] or 0.0) for method, points in methods.items()
        }
    positive = [each for each in numbers.values() if each is not None and each > 0]
    logarithmic = numeric and len(positive) == len(numbers) and max(positive) >= 8 * min(positive)

    def values(metric: str) -> list[dict[str, Any]]:
        changes = []
        for points in methods.values():
            found = [line.test[metric] for _, line in points]
            sds = rounded([each["sd"] or 0.0 for each in found])
            changes.append({"y": rounded([each["mean"] for each in found]), "error_y": {"array": sds}})
        return changes

    traces = []
    for place, ((method, points), first) in enumerate(zip(methods.items(), values(metrics[0]), strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        traces.append(
            Scatter(
                x=[numbers[value] if numeric else value for value, _ in points],
                y=first["y"],
                error_y={**first["error_y"], "type": "data", "color": colour, "thickness": 1.5, "width": 5},
                mode="lines+markers",
                name=method,
                line={"color": colour, "width": 2, "dash": DASHES[place % len(DASHES)]},
                marker={"color": colour, "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9},
                hovertemplate="%{y:.4f} ± %{error_y.array:.4f}<extra>" + _plain(method) + f", {key} %{{x}}</extra>",
            )
        )
    axis = {metric: f"test {metric_name(metric)}, {protocol}" for metric in metrics}
    shown = figure(traces, key, axis[metrics[0]], showlegend=True)
    ticks: dict[str, Any] = {"type": "category"}
    if numeric:
        marks = sorted({each for each in numbers.values() if each is not None})
        ticks = {
            "type": "log" if logarithmic else "linear",
            "tickvals": marks,
            "ticktext": [f"{each:g}" for each in marks],
        }
    shown.update_layout(xaxis=ticks)
    rows = [
        [method, value, *(with_deviation(line.test[metric]) for metric in metrics)]
        for method, points in methods.items()
        for value, line in points
    ]
    return Chart(
        name,
        f"{key} in several values",
        "Test metrics, means over seeds with their standard deviation.",
        shown,
        Table(f"Test metrics by {key}, {protocol}", ("method", key, *map(metric_name, metrics)), rows),
        (Switch("Metric", [Option(metric_name(each), values(each), titled("yaxis", axis[each])) for each in metrics]),),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(label: str) -> str:
    """A label that a hover text takes as it is."""
    return label.replace("<", "&lt;").replace("%", "&#37;")


def _height(rows: int) -> Height:
    return "short" if rows < 5 else "normal" if rows < 11 else "tall" if rows < 19 else "huge"
