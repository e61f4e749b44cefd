"""The part of a report that is about a federation: its nodes, and the rounds that went on without some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from perfedrec.core.counted import counted
from perfedrec.report.page import Block, Prose, Table, Tile, Tiles
from perfedrec.report.style import metric_name
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.summary import Summary


def nodes(run: RunFolder) -> list[Block]:
    """The nodes of a federation, and its rounds that were not as planned."""
    summary = run.summary()
    having = summary.nodes_with_model or []
    tiles = [
        Tile("Users", f"{summary.users or 0:,}", "who took part, on their nodes"),
        Tile("Nodes with the model", str(len(having)), ", ".join(having) or "none was connected at the end"),
    ]
    told = (
        "Interactions, losses and the figures of single users stay on the nodes. To evaluate the model on data that "
        f"you have: perfedrec evaluate --run {run.path} --data FILE."
    )
    return [Tiles(tiles), *_without(run.rejections()), *_aborted(run.history()), Prose(told)]


def figures(summary: Summary) -> list[Block]:
    """The test metrics, which are sums over the nodes' users."""
    if not summary.test:
        return [Prose("No figure was opened: too few users hold out items, or the nodes were not asked for figures.")]
    rows = [[metric_name(name), f"{value:.4f}"] for name, value in summary.test.items() if name != "users"]
    return [
        Table(
            "Test metrics of the best round; full ranking of all items unseen in training",
            ("metric", "this run"),
            rows,
            note=f"Means over the {counted(round(summary.test['users']), 'user who holds', 'users who hold')} out "
            "items. Only the sums "
            "over all of "
            "them were opened, so that there are no intervals.",
        )
    ]


def _without(rejections: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The nodes that rounds went on without."""
    times = Counter((str(each["node"]), str(each["reason"])) for each in rejections)
    if not times:
        return [Prose("No round went on without a node.")]
    details = {(str(each["node"]), str(each["reason"])): str(each["detail"]) for each in rejections}
    rows = [[node, reason, str(count), details[node, reason]] for (node, reason), count in sorted(times.items())]
    return [Table("Rounds that went on without a node", ("node", "reason", "rounds", "last detail"), rows, 2)]


def _aborted(history: Sequence[Entry]) -> list[Block]:
    """The rounds whose sum was not opened."""
    found = [entry.report for entry in history if entry.report.aborted]
    if not found:
        return []
    why = "; ".join(dict.fromkeys(str(each.aborted) for each in found))
    return [Prose(f"{counted(len(found), 'round')} ended without a sum: {why}.")]
