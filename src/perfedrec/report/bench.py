"""The report of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import polars as pl
from markupsafe import Markup

from perfedrec.compare import tables
from perfedrec.compare.results import FORMAT, by_user
from perfedrec.compare.schema import Results, SummaryEntry
from perfedrec.core.counted import counted
from perfedrec.core.errors import CheckpointError, reason
from perfedrec.methods.registry import title
from perfedrec.report.bench_accuracy import accuracy_chart, difference_chart
from perfedrec.report.bench_cost import cost_chart
from perfedrec.report.bench_curves import curves_chart
from perfedrec.report.bench_sweep import sweep_charts
from perfedrec.report.compared import ALPHA, Compared, FinishedRun, verdict
from perfedrec.report.page import Block, Code, Page, Pairs, Prose, Section, Table, Tile, Tiles
from perfedrec.report.statistics import Mean, mean_of
from perfedrec.report.style import metric_name, plotted
from perfedrec.runs.folder import RunFolder


def bench_page(folder: Path) -> Page:
    """The report of a comparison's folder. Raises :class:`CheckpointError` where the folder cannot be read."""
    results = _read(folder)
    metrics = tuple(dict.fromkeys((results["metric"], *plotted(f"@{k}" for k in tables.lengths(results)))))
    parts = {data: _methods(folder, results, data, metrics) for data in results["data"]}
    sections = [Section("overview", "Overview", _overview(results, parts))]
    for place, (data, methods) in enumerate(parts.items()):
        sections.append(Section(f"data-{place}", data, _of_data(f"data-{place}", results, data, methods, metrics)))
    sections.append(Section("set-up", "Runs and set-up", _set_up(folder, results)))
    n_methods = len({each["label"] for each in results["summary"]})
    names = " and ".join([", ".join([*parts][:-1]), [*parts][-1]] if len(parts) > 1 else parts)
    lead = (
        f"{counted(n_methods, 'method')}, each with {counted(len(results['seeds']), 'seed')}, compared by test "
        f"{metric_name(results['metric'])} under {results['protocol']}. The best round of each run was chosen on "
        "validation data; the test data were used once, for that round."
    )
    return Page("perfedrec report of a comparison", f"{counted(n_methods, 'method')} on {names}", lead, sections)


def _read(folder: Path) -> Results:
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        form = results["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = "damaged comparison" if path.exists() else "comparison that has not ended (perfedrec bench continues it)"
        raise CheckpointError(f"{folder}: {kind}: {path.name} cannot be read ({reason(error)})") from None
    if form != FORMAT:
        raise CheckpointError(f"{path}: written in format {form}; expected format {FORMAT}")
    return _titled(cast(Results, results))


def _titled(results: Results) -> Results:
    """The results with the names of methods that papers write in its labels, unless two labels became one by that."""
    labels = {each["label"] for each in results["summary"]}
    if len({title(each) for each in labels}) < len(labels):
        return results
    reference = results["reference"]
    return {
        **results,
        "reference": reference and title(reference),
        "summary": [_renamed(each) for each in results["summary"]],
        "cells": [{**each, "label": title(each["label"])} for each in results["cells"]],
    }


def _renamed(line: SummaryEntry) -> SummaryEntry:
    comparison = line.get("comparison")
    if comparison is not None:
        comparison = {**comparison, "reference": title(comparison["reference"])}
    renamed: SummaryEntry = {**line, "label": title(line["label"])}
    return {**renamed, "comparison": comparison} if "comparison" in line else renamed


def _methods(folder: Path, results: Results, data: str, metrics: tuple[str, ...]) -> list[Compared]:
    """All methods that have finished runs on a data set, popularity included."""
    found, places = [], _places(results)
    for summary in tables.rows(results, data):
        if "test" in summary:
            label = summary["label"]
            runs, means = _runs(folder, results, label, data), _means(folder, results, label, data, metrics)
            place = places.get(label, len(places))
            found.append(Compared(label, place, results["data"][data]["users"], summary, runs, means))
    return found


def _runs(folder: Path, results: Results, label: str, data: str) -> list[FinishedRun]:
    return [
        FinishedRun(
            seed=each["seed"],
            test=each["test"],
            history=RunFolder(folder / each["folder"]).history(),
            n_phases=each["prelude"],
            best=each["best_round"],
            seconds=each["cpu_seconds"],
        )
        for each in results["cells"]
        if (each["label"], each["data"]) == (label, data) and each["finished"]
    ]


def _means(folder: Path, results: Results, label: str, data: str, metrics: tuple[str, ...]) -> dict[str, Mean]:
    """The metrics of a method averaged over users, each user's metric being its mean over seeds."""
    folders = [
        folder / each["folder"]
        for each in results["cells"]
        if (each["label"], each["data"]) == (label, data) and each["finished"]
    ]
    try:
        frames = {metric: by_user(folders, metric) for metric in metrics}
    except (OSError, pl.exceptions.PolarsError) as error:
        raise CheckpointError(f"{folder}: damaged run of {label} on {data}: {error}") from None
    return {metric: mean_of(frame[metric].to_numpy()) for metric, frame in frames.items() if frame.height}


def _places(results: Results) -> dict[str, int]:
    """The order of the methods for colours and legends, the same on all data sets.

    Methods with curves come first, and the best of them before the others: their colours then differ most, and these
    methods are looked at most.
    """
    metric, ranks = results["metric"], {each["label"]: [0.0] for each in results["summary"]}
    for data in results["data"]:
        lines = [each for each in results["summary"] if each["data"] == data and "test" in each]
        lines.sort(key=lambda each: -each["test"][metric]["mean"])
        for rank, each in enumerate(lines):
            ranks[each["label"]].append(rank)
    with_curves = {each["label"] for each in results["cells"] if each["finished"] and each["rounds"] > 1}
    ordered = sorted(ranks, key=lambda label: (label not in with_curves, fmean(ranks[label][1:] or [len(ranks)])))
    return {label: place for place, label in enumerate(ordered)}


def _overview(results: Results, parts: Mapping[str, Sequence[Compared]]) -> list[Block]:
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
    for data, methods in parts.items():
        if not methods:
            continue
        best = max(methods, key=lambda each: each.test[metric]["mean"])
        about = results["data"][data]
        popular = f"{about['popularity'].get(metric, 0.0):.4f}"
        sizes = [f"{size:,}" for size in (about["users"], about["items"], about["interactions"])]
        rows.append([data, best.label, tables.with_deviation(best.test[metric]), popular, *sizes])
    if rows:
        name = f"test {metric_name(metric)}, {results['protocol']}"
        header = ("data set", "highest", name, "popularity", "users", "items", "training interactions")
        note = (
            "The highest of several means is partly luck. The tables of each data set say which differences are more "
            "than chance."
        )
        blocks.append(Table("Data sets, and the method with the highest mean over seeds", header, rows, 2, note))
    return blocks


def _of_data(
    name: str, results: Results, data: str, methods: Sequence[Compared], metrics: tuple[str, ...]
) -> list[Block]:
    about = results["data"][data]
    blocks: list[Block] = [
        Prose(
            f"{counted(about['users'], 'user')}, {counted(about['items'], 'item')}, "
            f"{counted(about['interactions'], 'training interaction')}. "
            f"Protocol: {results['protocol']}."
        )
    ]
    if not methods:
        return [*blocks, Prose("No run has finished.")]
    protocol, reference = results["protocol"], results["reference"]
    blocks.append(accuracy_chart(name, methods, metrics, protocol))
    if reference is not None:
        difference = difference_chart(name, methods, results["metric"], reference, protocol)
        blocks += [] if difference is None else [difference]
    blocks += [_accuracy_table(results, data, methods), _cost_table(results, data)]
    found = [curves_chart(name, methods, metrics, reference), cost_chart(name, methods, metrics, protocol)]
    blocks += [chart for chart in found if chart is not None]
    return blocks + list(sweep_charts(name, methods, metrics, protocol))


def _accuracy_table(results: Results, data: str, methods: Sequence[Compared]) -> Table:
    """The columns of the comparison's table that have a best cell, with intervals, verdicts and adjusted p-values."""
    metric, reference, means = results["metric"], results["reference"], {each.label: each.means for each in methods}
    summaries, ranked = tables.rows(results, data), [each for each in tables.columns(results) if each.rank is not None]
    rows = []
    for summary, row in zip(summaries, tables.cells(ranked, summaries), strict=True):
        mean = means.get(summary["label"], {}).get(metric)
        figures = [Markup("<strong>{}</strong>").format(text) if best else text for text, best in row]
        interval = "none" if mean is None else mean.interval()
        if reference is None:
            rows.append([summary["label"], *figures, interval])
        else:
            rows.append([summary["label"], _verdict(summary, reference), *figures, interval, _adjusted(summary)])
    header = ["method", *([] if reference is None else [f"against {reference}"]), *(each.head for each in ranked)]
    header.append(f"{metric_name(metric)}, 95 % interval over users")
    header += [] if reference is None else ["p, adjusted"]
    note = " ".join([*tables.split_notes(results, data), f"Means and standard deviations over {tables.over(results)}"])
    if reference is None:
        return Table(f"Test metrics on {data}", header, rows, 1, f"{note}.")
    note += f"; the best of a column in bold. A verdict is by the adjusted p-value, at {ALPHA:g}."
    return Table(f"Test metrics on {data}", header, rows, 2, note)


def _verdict(summary: SummaryEntry, reference: str) -> str:
    return "the reference" if summary["label"] == reference else verdict(summary.get("comparison"))


def _adjusted(summary: SummaryEntry) -> str:
    comparison = summary.get("comparison")
    return "none" if comparison is None else f"{comparison['p_adjusted']:.4f}"


def _cost_table(results: Results, data: str) -> Table:
    """The other columns of the comparison's table, without those about the reference."""
    columns = [
        each
        for each in tables.columns(results)
        if each.head != "method" and each.rank is None and not _about_reference(each.head, results)
    ]
    rows = [[line["label"], *(each.show(line) for each in columns)] for line in tables.rows(results, data)]
    return Table(f"Cost of each method on {data}", ["method", *(each.head for each in columns)], rows)


def _about_reference(head: str, results: Results) -> bool:
    """Whether a column is about the reference; the accuracy table shows these figures in its own columns."""
    return results["reference"] is not None and (head == "p, adjusted" or head.startswith(f"{results['metric']} over "))


def _set_up(folder: Path, results: Results) -> list[Block]:
    blocks: list[Block] = []
    missing = [each for each in results["cells"] if not each["finished"]]
    if missing:
        rows = [[each["label"], each["data"], str(each["seed"]), each["error"] or "not run yet"] for each in missing]
        blocks.append(Table("Runs that have not finished", ("method", "data", "seed", "reason"), rows, text=4))
    blocks.append(_all_runs(results))
    finished = (folder / each["folder"] for each in results["cells"] if each["finished"])
    environment = next((each / "environment.json" for each in finished), None)
    if environment is not None and environment.exists():
        found = json.loads(environment.read_text(encoding="utf-8"))
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        blocks.append(Pairs([("packages", packages), ("Python", found["python"]), ("platform", found["platform"])]))
    path = folder / "bench.toml"
    if path.exists():
        blocks.append(Code("All configurations in full, as bench.toml", path.read_text(encoding="utf-8")))
    return blocks


def _best(number: int, n_phases: int) -> str:
    return str(number) if number > 0 or not n_phases else f"phase {number + n_phases} of {n_phases} before training"


def _all_runs(results: Results) -> Table:
    metric, name = results["metric"], metric_name(results["metric"])
    rows = [
        [
            each["label"],
            each["data"],
            str(each["seed"]),
            _best(each["best_round"], each["prelude"]),
            f"{each['valid'].get(metric, 0.0):.4f}" if each["valid"] else "none",
            f"{each['test'][metric]:.4f}" if metric in each["test"] else "none",
            "none" if each["cpu_seconds"] is None else f"{each['cpu_seconds']:.1f}",
        ]
        for each in results["cells"]
        if each["finished"]
    ]
    header = ("method", "data", "seed", "best round", f"validation {name}", f"test {name}", "processor seconds")
    note = "The folder of a run is runs/METHOD/DATA/seed-N; perfedrec report on it writes a report of this run."
    return Table(f"All finished runs, {results['protocol']}", header, rows, 2, note, folded=True)
