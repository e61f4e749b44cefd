"""The charts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from plotly.graph_objects import Bar, Scatter

from perfedrec.report.page import Chart, Option, Switch, Table
from perfedrec.report.statistics import Group
from perfedrec.report.style import (
    COLOURS,
    PLOTTED,
    SYMBOLS,
    along,
    figure,
    metric_name,
    rounded,
    scale_of,
    titled,
)
from perfedrec.runs.progress import size
from perfedrec.runs.training import Entry


def learning_curve(
    history: Sequence[Entry], axes: Mapping[str, tuple[str, list[float]]], best: int, n_phases: int
) -> Chart | None:
    """Validation metrics over the run."""
    seen = [place for place, entry in enumerate(history) if entry.valid and PLOTTED[0] in entry.valid]
    if not seen:
        return None
    rounds = [history[place].report.round + 1 - n_phases for place in seen]
    top = [place for place, number in zip(seen, rounds, strict=True) if number == best]
    values = {name: [(history[place].valid or {})[name] for place in seen] for name in PLOTTED}

    def follow(values: Sequence[float]) -> list[dict[str, Any]]:
        return [{"x": rounded([values[place] for place in places])} for places in (seen, top)]

    def up(name: str) -> list[dict[str, Any]]:
        chosen = [(history[place].valid or {})[name] for place in top]
        return [{"y": rounded(values[name])}, {"y": rounded(chosen)}]

    first_x, first_y = follow(axes["round"][1]), up(PLOTTED[0])
    hover = "%{y:.4f}<extra>round %{customdata}</extra>"
    traces = [
        Scatter(
            **first_x[0],
            **first_y[0],
            customdata=rounds,
            hovertemplate=hover,
            mode="lines+markers",
            name="validation",
            line={"color": COLOURS[0], "width": 2},
            marker={"size": 5},
        ),
        Scatter(
            **first_x[1],
            **first_y[1],
            customdata=[best],
            hovertemplate=hover,
            mode="markers",
            name=f"best, round {best}",
            marker={
                "color": COLOURS[1],
                "size": 11,
                "symbol": "diamond",
                "line": {"color": "var(--paper)", "width": 1.5},
            },
        ),
    ]
    shown = figure(traces, axes["round"][0], f"validation {metric_name(PLOTTED[0])}", yaxis_rangemode="tozero")
    across = [Option(label, follow(each), along(title, each)) for label, (title, each) in axes.items()]
    upwards = [
        Option(metric_name(name), up(name), titled("yaxis", f"validation {metric_name(name)}")) for name in PLOTTED
    ]
    rows = [
        [
            str(number),
            *(f"{axes[label][1][place]:.4g}" for label in axes if label != "round"),
            *(f"{values[name][at]:.4f}" for name in PLOTTED),
        ]
        for at, (place, number) in enumerate(zip(seen, rounds, strict=True))
    ]
    header = ["round", *(title for label, (title, _) in axes.items() if label != "round"), *map(metric_name, PLOTTED)]
    return Chart(
        "curve",
        "Accuracy on validation data",
        f"{len(seen)} of {len(history)} rounds were evaluated. The best one, by validation, is what is tested.",
        shown,
        Table("Validation metrics of the rounds that were evaluated", header, rows),
        (Switch("Against", across), Switch("Metric", upwards)),
    )


def loss_curve(history: Sequence[Entry], axes: Mapping[str, tuple[str, list[float]]]) -> Chart | None:
    """The clients' training loss over the run."""
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
        "Mean over the clients of a round and their interactions: how training goes, not how well it recommends.",
        figure([trace], axes["round"][0], "loss", yaxis_rangemode="tozero"),
        Table("Training loss by round", ("round", "loss"), rows),
        (Switch("Against", across),),
    )


def activity_chart(groups: Sequence[Group], everybody: dict[str, float]) -> Chart:
    """Accuracy by how many training interactions users have."""
    names = [name for name in PLOTTED if name in groups[0].means]
    labels = [f"{group.label}<br>({group.users} users)" for group in groups]

    def values(name: str) -> list[dict[str, Any]]:
        means = [group.means[name] for group in groups]
        reach = [0.0 if each.high is None else each.high - each.value for each in means]
        own = {"y": rounded([each.value for each in means]), "error_y": {"array": rounded(reach)}}
        return [own, {"y": [everybody[name]] * len(groups)}]

    first = values(names[0])
    bars = {"type": "data", "color": COLOURS[0], "thickness": 1.75, "width": 7}
    traces = [
        Scatter(
            x=labels,
            y=first[0]["y"],
            error_y={**first[0]["error_y"], **bars},
            mode="markers",
            name="group",
            marker={"color": COLOURS[0], "size": 10},
            hovertemplate="%{y:.4f} ± %{error_y.array:.4f}<extra></extra>",
        ),
        Scatter(
            x=labels,
            y=first[1]["y"],
            mode="lines",
            name="all test users",
            hovertemplate="%{y:.4f}<extra></extra>",
            line={"color": COLOURS[5], "width": 1.5, "dash": "dash"},
        ),
    ]
    shown = figure(
        traces,
        "training interactions of a user",
        metric_name(names[0]),
        yaxis_rangemode="tozero",
        xaxis_type="category",
    )
    upwards = [Option(metric_name(name), values(name), titled("yaxis", metric_name(name))) for name in names]
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
        "Test users in quartiles of their training interactions, with 95 % t intervals over the users of a group.",
        shown,
        Table("Test metrics by number of training interactions", header, rows),
        (Switch("Metric", upwards),),
    )


def cluster_map(users: pl.DataFrame, explained: Sequence[float]) -> Chart:
    """Users by the first two principal components of their vectors, by cluster."""
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
        "Directions of the users' vectors in the best round, by their first two principal components"
        + (", in the colour of their cluster." if known else ". There were no clusters in that round."),
        shown,
        Table("Clusters on the map", ("", "users", "median interactions", "mean x", "mean y"), rows),
        height="tall",
    )


MOMENTS = {"start": "start", "pretrained": "pre-trained", "best": "best"}


def geometry_chart(notes: dict[str, dict[str, float]]) -> Chart:
    """Alignment and uniformity at the moments of a run that were noted."""
    moments = [moment for moment in MOMENTS if moment in notes]
    x, labels = [round(notes[each]["alignment"], 4) for each in moments], [MOMENTS[each] for each in moments]
    for place in range(len(moments) - 1, 0, -1):  # moments at one place have one label
        if notes[moments[place]]["round"] == notes[moments[place - 1]]["round"]:
            labels[place - 1], labels[place] = f"{labels[place - 1]}, {labels[place]}", ""
    traces = [
        Scatter(
            x=x,
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
        "spread over the sphere. Lower is better in both; neither says much alone, because vectors that all coincide "
        "are perfectly aligned.",
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
    """Bytes sent in each phase, per client."""
    phases = list(dict.fromkeys(entry.report.phase for entry in history))
    rows, columns = [], {"bytes_up": [0.0] * len(phases), "bytes_down": [0.0] * len(phases)}
    for place, phase in enumerate(phases):
        reports = [entry.report for entry in history if entry.report.phase == phase]
        up, down = sum(each.bytes_up for each in reports), sum(each.bytes_down for each in reports)
        uploads = sum(each.clients for each in reports)
        columns["bytes_up"][place], columns["bytes_down"][place] = up / users, down / users
        largest = max(each.bytes_up_max for each in reports)
        rows.append(
            [
                phase,
                str(len(reports)),
                f"{uploads / users:.1f}",
                size(up / users),
                size(down / users),
                size(up / max(uploads, 1)),
                size(largest),
            ]
        )
    if not any(columns["bytes_up"]):
        return None

    def option(name: str, label: str) -> Option:
        divisor, title = scale_of(f"bytes {label}", max(columns[name]))
        return Option(label, [{"x": rounded([each / divisor for each in columns[name]])}], titled("xaxis", title))

    options = [option("bytes_up", "up"), option("bytes_down", "down")]
    bars = Bar(
        x=options[0].data[0]["x"],
        y=phases,
        orientation="h",
        name="bytes",
        marker={"color": COLOURS[0]},
        width=0.45,
        texttemplate="%{x:.3g}",
        textposition="auto",  # in a bar that has room for it: outside, a phone cuts the longest one's off
        textangle=0,
        insidetextfont={"color": "var(--paper)"},
        cliponaxis=False,
        hovertemplate="%{x:.4g}<extra>%{y}</extra>",
    )
    shown = figure([bars], options[0].layout["xaxis"]["title"]["text"], "phase", yaxis_autorange="reversed")
    header = ("phase", "rounds", "uploads a client", "up a client", "down a client", "up an upload", "largest upload")
    return Chart(
        "bytes",
        "Communication by phase",
        "Bytes of the numbers in the messages, as means over all clients, whether they took part or not.",
        shown,
        Table("Uploads and bytes by phase", header, rows),
        (Switch("Direction", options),),
        height="short" if len(phases) < 4 else "normal",
    )
