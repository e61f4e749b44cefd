"""Charts of a comparison: test accuracy of all methods, and their differences to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure, Scatter

from perfedrec.compare.schema import ComparisonEntry
from perfedrec.report.compared import ALPHA, Compared, height_of, significant, verdict
from perfedrec.report.page import Change, Chart, Option, Switch, Table
from perfedrec.report.style import COLOURS, broken, figure, metric_name, rangemode, rounded, titled


def accuracy_chart(name: str, methods: Sequence[Compared], metrics: Sequence[str], protocol: str) -> Chart:
    """Test metrics of all methods, the best by the first metric at the top."""
    ranked = sorted((each for each in methods if each.test), key=lambda each: each.test[metrics[0]]["mean"])
    axis = {metric: f"test {metric_name(metric)}, {protocol}" for metric in metrics}
    options = [Option(metric_name(each), _accuracy(ranked, each), titled("xaxis", axis[each])) for each in metrics]
    return Chart(
        f"{name}-accuracy",
        "Accuracy on test data",
        "The mean over seeds with its 95 % t interval over users, and each seed by itself.",
        _accuracy_figure(ranked, metrics[0], axis[metrics[0]]),
        _accuracy_table(ranked, metrics, protocol),
        (Switch("Metric", options),),
        height=height_of(len(ranked)),
    )


def _accuracy(ranked: Sequence[Compared], metric: str) -> list[Change]:
    """What the two traces show of a metric: each seed, and the means with their intervals."""
    means = [each.means.get(metric) for each in ranked]
    reach = [0.0 if each is None or each.high is None else each.high - each.value for each in means]
    centres = [each.test[metric]["mean"] for each in ranked]
    seeds = [run.test[metric] for each in ranked for run in each.runs]
    return [{"x": rounded(seeds)}, {"x": rounded(centres), "error_x": {"array": rounded(reach)}}]


def _accuracy_figure(ranked: Sequence[Compared], metric: str, title: str) -> Figure:
    labels = [each.label for each in ranked]
    seeds = [(each.label, run) for each in ranked for run in each.runs]
    of_seeds, of_means = _accuracy(ranked, metric)
    traces = [
        Scatter(
            x=of_seeds["x"],
            y=[label for label, _ in seeds],
            customdata=[run.seed for _, run in seeds],
            mode="markers",
            name="one seed",
            marker={"color": COLOURS[1], "size": 7, "symbol": "line-ns-open", "line": {"width": 1.5}},
            hovertemplate="%{x:.4f}<extra>%{y}, seed %{customdata}</extra>",
        ),
        Scatter(
            x=of_means["x"],
            y=labels,
            mode="markers",
            name="mean over seeds, 95 % interval over users",
            marker={"color": COLOURS[0], "size": 9},
            error_x={**of_means["error_x"], "type": "data", "color": COLOURS[0], "thickness": 1.5, "width": 4},
            hovertemplate="%{x:.4f} ± %{error_x.array:.4f}<extra>%{y}</extra>",
        ),
    ]
    shown = figure(traces, title, "", xaxis_rangemode=rangemode(of_means["x"]))
    shown.update_layout(yaxis={"type": "category", "categoryorder": "array", "categoryarray": labels, **_ticks(labels)})
    return shown


def _ticks(labels: Sequence[str]) -> dict[str, Any]:
    """The labels of an axis of methods."""
    return {"tickvals": list(labels), "ticktext": [broken(label, 24) for label in labels]}


def _accuracy_table(ranked: Sequence[Compared], metrics: Sequence[str], protocol: str) -> Table:
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
    return Table(f"Test metrics, {protocol}", header, rows)


def difference_chart(
    name: str, methods: Sequence[Compared], metric: str, reference: str, protocol: str
) -> Chart | None:
    """Differences to the reference with their intervals; those with a significant adjusted p-value are filled."""
    found = [(each.label, each.comparison) for each in methods if each.comparison]
    if not found:
        return None
    ranked = sorted(found, key=lambda each: each[1]["difference"])
    traces = [
        _difference_trace([each for each in ranked if significant(each[1]) == sure], sure) for sure in (True, False)
    ]
    shown = figure(traces, f"test {metric_name(metric)} over {reference}, {protocol}", "")
    shown.update_layout(
        xaxis={"zeroline": True, "zerolinecolor": "var(--soft)", "zerolinewidth": 1.5},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": [label for label, _ in ranked]}
        | _ticks([label for label, _ in ranked]),
    )
    rows = [
        [
            label,
            verdict(each),
            *(f"{value:+.4f}" for value in (each["difference"], each["low"], each["high"])),
            *(f"{value:.4f}" for value in (each["p"], each["p_adjusted"])),
        ]
        for label, each in reversed(ranked)
    ]
    header = ("method", f"against {reference}", "difference", "95 % from", "to", "p", "p, adjusted")
    return Chart(
        f"{name}-difference",
        f"Differences to {reference}",
        "Means over users, after each user's metric is averaged over the seeds that both methods finished; 95 % "
        "intervals. Filled: the difference is significant by a paired permutation test, with p-values adjusted after "
        "Benjamini and Yekutieli for all methods.",
        shown,
        Table(f"Differences in test {metric_name(metric)}, {protocol}", header, rows, text=2),
        height=height_of(len(ranked)),
    )


def _difference_trace(own: Sequence[tuple[str, ComparisonEntry]], sure: bool) -> Scatter:
    """The methods whose difference is significant (``sure``), or those whose difference is not."""
    found = [each for _, each in own]
    return Scatter(
        x=rounded([each["difference"] for each in found]),
        y=[label for label, _ in own],
        customdata=[f"{each['p_adjusted']:.4f}" for each in found],
        mode="markers",
        name=f"adjusted p below {ALPHA:g}" if sure else "no difference shown",
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
