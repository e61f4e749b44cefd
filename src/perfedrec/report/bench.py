"""The report of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
from markupsafe import Markup

from perfedrec.compare import tables
from perfedrec.compare.results import FORMAT, by_user
from perfedrec.core.errors import CheckpointError, reason
from perfedrec.report import bench_charts as charts
from perfedrec.report.bench_charts import Line, Record, verdict
from perfedrec.report.page import Block, Code, Page, Pairs, Prose, Section, Table, Tile, Tiles
from perfedrec.report.statistics import mean_of
from perfedrec.report.style import PLOTTED, metric_name
from perfedrec.runs.training import read_history


def bench_page(folder: Path) -> Page:
    """The report of a comparison's folder. Raises :class:`CheckpointError` where it cannot be read."""
    results = _read(folder)
    metrics = tuple(dict.fromkeys((results["metric"], *PLOTTED)))
    parts = {data: _lines(folder, results, data, metrics) for data in results["data"]}
    sections = [Section("overview", "Overview", _overview(results, parts))]
    for place, (data, lines) in enumerate(parts.items()):
        sections.append(Section(f"data-{place}", data, _of_data(f"data-{place}", results, data, lines, metrics)))
    sections.append(Section("set-up", "Runs and set-up", _set_up(folder, results)))
    n_methods = len({each["label"] for each in results["summary"]})
    names = " and ".join([", ".join([*parts][:-1]), [*parts][-1]] if len(parts) > 1 else parts)
    lead = (
        f"{n_methods} methods, each with {len(results['seeds'])} seeds, compared by test "
        f"{metric_name(results['metric'])} under {results['protocol']}. Validation data chose each run's best round; "
        "the test data were looked at once for it."
    )
    return Page("perfedrec report of a comparison", f"{n_methods} methods on {names}", lead, sections)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form = results["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged comparison: {path.name} cannot be read ({reason(error)})") from None
    if form != FORMAT:
        raise CheckpointError(f"{path}: written in format {form}; expected format {FORMAT}")
    return results


def _lines(folder: Path, results: dict[str, Any], data: str, metrics: tuple[str, ...]) -> list[Line]:
    """All methods on a data set that have finished runs, popularity included."""
    users, found, places = results["data"][data]["users"], [], _places(results)
    for summary in tables.rows(results, data):
        if "test" not in summary:
            continue
        cells = [
            each
            for each in results["cells"]
            if (each["label"], each["data"]) == (summary["label"], data) and each["finished"]
        ]
        runs = [
            Record(
                seed=each["seed"],
                test=each["test"],
                history=read_history(folder / each["folder"]),
                n_phases=each["prelude"],
                best=each["best_round"],
                seconds=each["cpu_seconds"],
            )
            for each in cells
        ]
        try:
            frames = {metric: by_user([folder / each["folder"] for each in cells], metric) for metric in metrics}
        except (OSError, pl.exceptions.PolarsError) as error:
            raise CheckpointError(f"{folder}: damaged run of {summary['label']} on {data}: {error}") from None
        means = {metric: mean_of(frame[metric].to_numpy()) for metric, frame in frames.items() if frame.height}
        found.append(Line(summary["label"], places.get(summary["label"], len(places)), users, summary, runs, means))
    return found


def _places(results: dict[str, Any]) -> dict[str, int]:
    """An order of the methods for colours and legends, the same on all data sets: those with curves first, and among
    them the best first, so that those that are looked at most differ most."""
    metric, ranks = results["metric"], {each["label"]: [0.0] for each in results["summary"]}
    for data in results["data"]:
        lines = [each for each in results["summary"] if each["data"] == data and "test" in each]
        lines.sort(key=lambda each: -float(each["test"][metric]["mean"]))
        for rank, each in enumerate(lines):
            ranks[each["label"]].append(rank)
    followed = {each["label"] for each in results["cells"] if each["finished"] and each["rounds"] > 1}
    ordered = sorted(ranks, key=lambda label: (label not in followed, fmean(ranks[label][1:] or [len(ranks)])))
    return {label: place for place, label in enumerate(ordered)}


def _overview(results: dict[str, Any], parts: dict[str, list[Line]]) -> list[Block]:
    metric, cells = results["metric"], results["cells"]
    finished = sum(each["finished"] for each in cells)
    seeds = ", ".join(map(str, results["seeds"]))
    tiles = [
        Tile("Runs finished", f"{finished} of {len(cells)}"),
        Tile("Data sets", str(len(parts)), ", ".join(parts)),
        Tile("Seeds", str(len(results["seeds"])), seeds),
    ]
    blocks: list[Block] = [Tiles(tiles)]
    rows = []
    for data, lines in parts.items():
        if not lines:
            continue
        best = max(lines, key=lambda each: float(each.test[metric]["mean"]))
        about = results["data"][data]
        popular = f"{about['popularity'].get(metric, 0.0):.4f}"
        sizes = [f"{about[name]:,}" for name in ("users", "items", "interactions")]
        rows.append([data, best.label, tables.with_deviation(best.test[metric]), popular, *sizes])
    if rows:
        name = f"test {metric_name(metric)}, {results['protocol']}"
        header = ("data set", "highest", name, "popularity", "users", "items", "training interactions")
        note = (
            "The highest of several figures flatters its method; the tables of each data set tell what is apart from "
        )
        blocks.append(
            Table("Data sets, and the method with the highest mean over seeds", header, rows, 2, note + "chance.")
        )
    return blocks


def _of_data(name: str, results: dict[str, Any], data: str, lines: list[Line], metrics: tuple[str, ...]) -> list[Block]:
    about = results["data"][data]
    blocks: list[Block] = [
        Prose(
            f"{about['users']:,} users, {about['items']:,} items, {about['interactions']:,} training interactions. "
            f"Protocol: {results['protocol']}."
        )
    ]
    if not lines:
        return [*blocks, Prose("No run is finished.")]
    protocol, reference = results["protocol"], results["reference"]
    blocks.append(charts.accuracy_chart(name, lines, metrics, protocol))
    if reference is not None:
        difference = charts.difference_chart(name, lines, results["metric"], reference, protocol)
        blocks += [] if difference is None else [difference]
    blocks += _tables(results, data, lines)
    found = [charts.curves_chart(name, lines, metrics, reference), charts.cost_chart(name, lines, metrics, protocol)]
    blocks += [chart for chart in found if chart is not None]
    return blocks + list(charts.sweep_charts(name, lines, metrics, protocol))


def _tables(results: dict[str, Any], data: str, lines: list[Line]) -> list[Block]:
    """The table of the comparison in two: accuracy with significance, and cost."""
    metric, reference, means = results["metric"], results["reference"], {each.label: each.means for each in lines}
    columns, summaries = tables.columns(results), tables.rows(results, data)
    ranked = [each for each in columns if each.rank is not None]
    accuracy = []
    for summary, row in zip(summaries, tables.cells(ranked, summaries), strict=True):
        mean = means.get(summary["label"], {}).get(metric)
        figures = [Markup("<strong>{}</strong>").format(text) if best else text for text, best in row]
        extra = ["none" if mean is None else mean.interval()]
        words = [str(summary["label"])]
        if reference is not None:
            comparison = summary.get("comparison")
            own = summary["label"] == reference
            words.append("the reference" if own else verdict(comparison))
            extra.append("none" if comparison is None else f"{comparison['p_adjusted']:.4f}")
        accuracy.append([*words, *figures, *extra])
    header = ["method", *([] if reference is None else [f"against {reference}"]), *(each.head for each in ranked)]
    header.append(f"{metric_name(metric)}, 95 % interval over users")
    header += [] if reference is None else ["p, adjusted"]
    compared = {"method", *(each.head for each in ranked)}
    cost = [each for each in columns if each.head not in compared and not _compares(each.head, results)]
    spending = [[str(line["label"]), *(each.show(line) for each in cost)] for line in summaries]
    note = (
        "Means and standard deviations over seeds; the best of a column in bold. Verdicts are by the adjusted p-value, "
    )
    return [
        Table(
            f"Test metrics on {data}",
            header,
            accuracy,
            1 if reference is None else 2,
            note + f"at {charts.ALPHA:g}." if reference is not None else "Means and standard deviations over seeds.",
        ),
        Table(f"What it takes on {data}", ["method", *(each.head for each in cost)], spending),
    ]


def _compares(head: str, results: dict[str, Any]) -> bool:
    """Whether a column is about the reference, which the report tells in its own words."""
    return results["reference"] is not None and (head == "p, adjusted" or head.startswith(f"{results['metric']} over "))


def _set_up(folder: Path, results: dict[str, Any]) -> list[Block]:
    cells = results["cells"]
    blocks: list[Block] = []
    missing = [each for each in cells if not each["finished"]]
    if missing:
        rows = [[each["label"], each["data"], str(each["seed"]), each["error"] or "not run yet"] for each in missing]
        blocks.append(Table("Runs that are not finished", ("method", "data", "seed", "why"), rows, text=4))
    metric = results["metric"]
    rows = [
        [
            each["label"],
            each["data"],
            str(each["seed"]),
            str(each["best_round"]),
            f"{each['valid'].get(metric, 0.0):.4f}" if each["valid"] else "none",
            f"{each['test'][metric]:.4f}" if metric in each["test"] else "none",
            "none" if each["cpu_seconds"] is None else f"{each['cpu_seconds']:.1f}",
        ]
        for each in cells
        if each["finished"]
    ]
    name = metric_name(metric)
    header = ("method", "data", "seed", "best round", f"validation {name}", f"test {name}", "processor seconds")
    note = "The folder of a run is runs/METHOD/DATA/seed-N; perfedrec report on it tells more."
    blocks.append(Table(f"All finished runs, {results['protocol']}", header, rows, 2, note, folded=True))
    where = next((folder / each["folder"] / "environment.json" for each in cells if each["finished"]), None)
    if where is not None and where.exists():
        found = json.loads(where.read_text(encoding="utf-8"))
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        blocks.append(Pairs([("packages", packages), ("Python", found["python"]), ("platform", found["platform"])]))
    path = folder / "bench.toml"
    if path.exists():
        blocks.append(Code("Every configuration in full, as bench.toml", path.read_text(encoding="utf-8")))
    return blocks
