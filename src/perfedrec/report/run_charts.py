"""The charts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from plotly.graph_objects import Bar, Scatter

from perfedrec.core.counted import counted
from perfedrec.core.types import RoundReport
from perfedrec.evaluation.ranking import cutoffs_of
from perfedrec.report.page import Change, Chart, Option, Switch, Table
from perfedrec.report.statistics import Group
from perfedrec.report.style import (
    COLOURS,
    SYMBOLS,
    along,
    figure,
    metric_name,
    plotted,
    rangemode,
    rounded,
    scale_of,
    titled,
)
from perfedrec.runs.folder import Entry
from perfedrec.runs.progress import round_name, size

Axes = Mapping[str, tuple[str, list[float]]]
"""The axes that a chart can be drawn along: by name a title and the value of each round. See ``style.axes_of``."""


def learning_curve(history: Sequence[Entry], axes: Axes, best: int, n_phases: int) -> Chart | None:
    """Validation metrics over the run, with a mark at round ``best``.

    ``n_phases`` is the number of rounds before training. ``None`` where no round was evaluated.
    """
    seen = [place for place, entry in enumerate(history) if entry.valid and cutoffs_of(entry.valid)]
    if not seen:
        return None
    names = plotted(history[seen[-1]].valid or ())
    shown = _metric(history, seen, names[0])
    rounds = [history[place].report.round + 1 - n_phases for place in seen]
    top = [place for place, number in zip(seen, rounds, strict=True) if number == best]
    across = [
        Option(
            label, [{"x": rounded([values[place] for place in places])} for places in (seen, top)], along(title, values)
        )
        for label, (title, values) in axes.items()
    ]
    upwards = [
        Option(
            metric_name(name),
            [{"y": rounded(_metric(history, places, name))} for places in (seen, top)],
            titled("yaxis", f"validation {metric_name(name)}"),
        )
        for name in names
    ]
    called = [round_name(history[place].report.round, n_phases) for place in seen]
    traces = _learning_traces(across[0].data, upwards[0].data, called, round_name(best + n_phases - 1, n_phases))
    return Chart(
        "curve",
        "Accuracy on validation data",
        f"{len(seen)} of {counted(len(history), 'round was', 'rounds were')} evaluated. The round with the best "
        "validation figure is the one "
        "that is tested.",
        figure(traces, axes["round"][0], f"validation {metric_name(names[0])}", yaxis_rangemode=rangemode(shown)),
        _learning_table(history, axes, seen, called, names),
        (Switch("Against", across), Switch("Metric", upwards)),
    )


def _metric(history: Sequence[Entry], places: Sequence[int], name: str) -> list[float]:
    """A validation metric of the entries at ``places``, which were evaluated."""
    return [(history[place].valid or {})[name] for place in places]


def _learning_traces(x: Sequence[Change], y: Sequence[Change], called: Sequence[str], best: str) -> list[Scatter]:
    """The curve, and a mark at the best round, with the names of rounds."""
    hover = "%{y:.4f}<extra>%{customdata}</extra>"
    curve = Scatter(
        **x[0],
        **y[0],
        customdata=called,
        hovertemplate=hover,
        mode="lines+markers",
        name="validation",
        line={"color": COLOURS[0], "width": 2},
        marker={"size": 5},
    )
    mark = Scatter(
        **x[1],
        **y[1],
        customdata=[best],
        hovertemplate=hover,
        mode="markers",
        name=f"best, {best}",
        marker={
            "color": COLOURS[1],
            "size": 11,
            "symbol": "diamond",
            "line": {"color": "var(--paper)", "width": 1.5},
        },
    )
    return [curve, mark]


def _learning_table(
    history: Sequence[Entry], axes: Axes, seen: Sequence[int], called: Sequence[str], names: Sequence[str]
) -> Table:
    costs = {title: values for label, (title, values) in axes.items() if label != "round"}
    metrics = {name: _metric(history, seen, name) for name in names}
    rows = [
        [
            name.removeprefix("round "),
            *(f"{values[place]:.4g}" for values in costs.values()),
            *(f"{values[at]:.4f}" for values in metrics.values()),
        ]
        for at, (place, name) in enumerate(zip(seen, called, strict=True))
    ]
    header = ["round", *costs, *map(metric_name, names)]
    return Table("Validation metrics of the rounds that were evaluated", header, rows)


def loss_curve(history: Sequence[Entry], axes: Axes) -> Chart | None:
    """The clients' training loss over the run; ``None`` where fewer than two rounds have a loss."""
    seen = [place for place, entry in enumerate(history) if entry.report.loss is not None]
    if len(seen) < 2:
        return None
    losses = rounded([history[place].report.loss or 0.0 for place in seen])
    x = {label: rounded([values[place] for place in seen]) for label, (_, values) in axes.items()}
    trace = Scatter(
        x=x["round"],
        y=losses,
        mode="lines",
        name="loss",
        line={"color": COLOURS[2], "width": 1.75},
        hovertemplate="%{y:.4f}<extra></extra>",
    )
    across = [Option(label, [{"x": x[label]}], along(title, x[label])) for label, (title, _) in axes.items()]
    rows = [[f"{x['round'][place]:.0f}", f"{loss:.4f}"] for place, loss in enumerate(losses)]
    return Chart(
        "loss",
        "Training loss",
        "The mean over the clients of a round and their interactions. It shows whether training works, not how good "
        "the recommendations are.",
        figure([trace], axes["round"][0], "loss", yaxis_rangemode=rangemode(losses)),
        Table("Training loss by round", ("round", "loss"), rows),
        (Switch("Against", across),),
    )


def activity_chart(groups: Sequence[Group], overall: Mapping[str, float]) -> Chart:
    """Test accuracy by the number of training interactions of a user.

    ``overall`` holds the mean of each metric over all test users.
    """
    names = list(plotted(groups[0].means))
    upwards = [
        Option(metric_name(name), _group_values(groups, overall, name), titled("yaxis", metric_name(name)))
        for name in names
    ]
    shown = figure(
        _group_traces(groups, upwards[0].data),
        "training interactions of a user",
        metric_name(names[0]),
        yaxis_rangemode="tozero",
        xaxis_type="category",
    )
    header = ["training interactions", "users"]
    for name in names:
        header += [metric_name(name), "95 % interval"]
    rows = []
    for group in groups:
        row = [group.label, str(group.users)]
        for name in names:
            row += [f"{group.means[name].value:.4f}", group.means[name].interval()]
        rows.append(row)
    return Chart(
        "activity",
        "Accuracy by activity",
        "Test users in quartiles of the number of their training interactions, with 95 % t intervals over the users of "
        "a group.",
        shown,
        Table("Test metrics by number of training interactions", header, rows),
        (Switch("Metric", upwards),),
    )


def _group_values(groups: Sequence[Group], overall: Mapping[str, float], name: str) -> list[Change]:
    means = [group.means[name] for group in groups]
    reach = [0.0 if each.high is None else each.high - each.value for each in means]
    own: Change = {"y": rounded([each.value for each in means]), "error_y": {"array": rounded(reach)}}
    return [own, {"y": [overall[name]] * len(groups)}]


def _group_traces(groups: Sequence[Group], y: Sequence[Change]) -> list[Scatter]:
    """A mark with its interval for each group, and a line for all test users."""
    labels = [f"{group.label}<br>({counted(group.users, 'user')})" for group in groups]
    bars = {"type": "data", "color": COLOURS[0], "thickness": 1.75, "width": 7}
    marks = Scatter(
        x=labels,
        y=y[0]["y"],
        error_y={**y[0]["error_y"], **bars},
        mode="markers",
        name="group",
        marker={"color": COLOURS[0], "size": 10},
        hovertemplate="%{y:.4f} ± %{error_y.array:.4f}<extra></extra>",
    )
    line = Scatter(
        x=labels,
        y=y[1]["y"],
        mode="lines",
        name="all test users",
        hovertemplate="%{y:.4f}<extra></extra>",
        line={"color": COLOURS[5], "width": 1.5, "dash": "dash"},
    )
    return [marks, line]


def cluster_map(users: pl.DataFrame, explained: Sequence[float]) -> Chart:
    """Users by the first two principal components of their vectors, in the colour of their cluster.

    ``users`` has the columns ``x``, ``y``, ``cluster`` and ``interactions``; ``explained`` [2] are the shares of
    variance of the two components.
    """
    known = users["cluster"].null_count() == 0
    groups = sorted(users["cluster"].unique().to_list()) if known else [None]
    traces, rows = [], []
    for place, group in enumerate(groups):
        own = users if group is None else users.filter(pl.col("cluster") == group)
        name = "users" if group is None else f"cluster {group + 1}"
        active = own["interactions"]
        traces.append(
            Scatter(
                x=[round(each, 3) for each in own["x"].to_list()],
                y=[round(each, 3) for each in own["y"].to_list()],
                customdata=active.to_list(),
                mode="markers",
                name=f"{name} ({own.height})",
                hovertemplate=f"{name}<br>%{{customdata}} training interactions<extra></extra>",
                marker={
                    "color": COLOURS[place % len(COLOURS)],
                    "symbol": SYMBOLS[place % len(SYMBOLS)],
                    "size": 5,
                    "opacity": 0.6,
                },
            )
        )
        centre = [f"{own[axis].to_numpy().mean():.3f}" for axis in ("x", "y")]
        rows.append([name, str(own.height), f"{np.median(active.to_numpy()):.0f}", *centre])
    titles = [f"component {place + 1} ({100 * share:.1f} % of variance)" for place, share in enumerate(explained)]
    shown = figure(traces, titles[0], titles[1], yaxis_scaleanchor="x", legend_itemsizing="constant", showlegend=known)
    return Chart(
        "map",
        "Users by taste",
        "The directions of the users' vectors in the best round, by their first two principal components"
        + (". The colour shows the cluster." if known else ". There were no clusters in that round."),
        shown,
        Table("Clusters on the map", ("", "users", "median interactions", "mean x", "mean y"), rows),
        height="tall",
    )


MOMENTS = {"start": "start", "pretrained": "pre-trained", "best": "best"}
"""The moments at which a run records its geometry, by key of diagnostics.json, with their names in the chart."""


def geometry_chart(notes: dict[str, dict[str, float]]) -> Chart:
    """Alignment and uniformity at the moments of a run that ``notes`` holds: see :data:`MOMENTS`."""
    moments = [moment for moment in MOMENTS if moment in notes]
    labels = [MOMENTS[each] for each in moments]
    for place in range(len(moments) - 1, 0, -1):  # moments in the same round share one label
        if notes[moments[place]]["round"] == notes[moments[place - 1]]["round"]:
            labels[place - 1], labels[place] = f"{labels[place - 1]}, {labels[place]}", ""
    traces = [
        Scatter(
            x=[round(notes[each]["alignment"], 4) for each in moments],
            y=[round(notes[each][f"uniformity_{side}"], 4) for each in moments],
            text=labels,
            customdata=[MOMENTS[each] for each in moments],
            name=side,
            mode="lines+markers" + ("+text" if side == "users" else ""),
            textposition="top right",
            cliponaxis=False,
            line={"color": COLOURS[place], "width": 1.5, "dash": "dot"},
            marker={"color": COLOURS[place], "size": 10, "symbol": SYMBOLS[place]},
            textfont={"color": COLOURS[place]},
            hovertemplate="%{customdata}<br>alignment %{x:.3f}, uniformity %{y:.3f}<extra>" + side + "</extra>",
        )
        for place, side in enumerate(("users", "items"))
    ]
    rows = [
        [
            MOMENTS[each],
            f"{notes[each]['round']:.0f}",
            *(f"{notes[each][name]:.3f}" for name in ("alignment", "uniformity_users", "uniformity_items")),
        ]
        for each in moments
    ]
    return Chart(
        "geometry",
        "Alignment and uniformity",
        "Alignment: how far apart a user and an item of its training data are. Uniformity: how evenly vectors are "
        "spread over the sphere. Lower is better for both. Look at both together: if all vectors were equal, alignment "
        "would be perfect.",
        figure(
            traces,
            "alignment (2: unrelated)",
            "uniformity (0: all coincide)",
            xaxis_range=[-0.15, 2.35],
            yaxis_range=[-4.4, min(0.3, max(max(t.y) for t in traces) + 0.7)],
        ),
        Table(
            "Alignment and uniformity of unit vectors (Wang and Isola, 2020)",
            ("moment", "round", "alignment", "uniformity, users", "uniformity, items"),
            rows,
        ),
    )


def communication_chart(history: Sequence[Entry], users: int) -> Chart | None:
    """Bytes sent in each phase, as means over all ``users`` clients. ``None`` where nothing was sent."""
    phases = list(dict.fromkeys(entry.report.phase for entry in history))
    reports = {phase: [entry.report for entry in history if entry.report.phase == phase] for phase in phases}
    sent = {
        "up": [sum(each.bytes_up for each in reports[phase]) / users for phase in phases],
        "down": [sum(each.bytes_down for each in reports[phase]) / users for phase in phases],
    }
    if not any(sent["up"]):
        return None
    options = [_direction(label, values) for label, values in sent.items()]
    bars = Bar(
        x=options[0].data[0]["x"],
        y=phases,
        orientation="h",
        name="bytes",
        marker={"color": COLOURS[0]},
        width=0.45,
        texttemplate="%{x:.3g}",
        textposition="auto",  # inside a bar where it fits: outside, a narrow screen cuts off the longest one's text
        textangle=0,
        insidetextfont={"color": "var(--paper)"},
        cliponaxis=False,
        hovertemplate="%{x:.4g}<extra>%{y}</extra>",
    )
    shown = figure([bars], options[0].layout["xaxis"]["title"]["text"], "phase", yaxis_autorange="reversed")
    rows = [_phase_row(phase, each, users) for phase, each in reports.items()]
    header = (
        "phase",
        "rounds",
        "uploads per client",
        "sent per client",
        "received per client",
        "bytes per upload",
        "largest upload",
    )
    return Chart(
        "bytes",
        "Communication by phase",
        "Bytes of the tensors in the messages: means over all clients, whether they took part or not.",
        shown,
        Table("Uploads and bytes by phase", header, rows),
        (Switch("Direction", options),),
        height="short" if len(phases) < 4 else "normal",
    )


def _direction(label: str, values: Sequence[float]) -> Option:
    divisor, title = scale_of(f"bytes {label}", max(values))
    return Option(label, [{"x": rounded([each / divisor for each in values])}], titled("xaxis", title))


def _phase_row(phase: str, reports: Sequence[RoundReport], users: int) -> list[str]:
    up, down = sum(each.bytes_up for each in reports), sum(each.bytes_down for each in reports)
    uploads = sum(each.clients for each in reports)
    return [
        phase,
        str(len(reports)),
        f"{uploads / users:.1f}",
        size(up / users),
        size(down / users),
        size(up / max(uploads, 1)),
        size(max(each.bytes_up_max for each in reports)),
    ]
