"""The results of a comparison: the figures of every run, means and deviations over seeds, significance over users."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import polars as pl

from perfedrec.compare.bench import Bench, Cell, Target
from perfedrec.compare.cells import cost
from perfedrec.compare.schema import (
    CellEntry,
    ComparisonEntry,
    DataEntry,
    ParametersEntry,
    PrivacySummary,
    ReachedEntry,
    Results,
    Spread,
    SummaryEntry,
    TargetSummary,
)
from perfedrec.data import Dataset
from perfedrec.evaluation.significance import adjusted, compare
from perfedrec.runs.config import open_data
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.result import popularity
from perfedrec.runs.summary import FULL

FORMAT = 1


def collect(bench: Bench, failed: Mapping[str, str]) -> Results:
    """The content of ``results.json`` (see docs/bench.md), from all finished runs.

    ``failed`` holds the error of each run that failed, by the name of its cell.
    """
    file = bench.file
    cells = [_cell(bench, cell, failed) for cell in bench.cells()]
    return {
        "format": FORMAT,
        "seeds": list(file.seeds),
        "vary": file.vary,
        "metric": file.metric,
        "reference": file.reference,
        "protocol": FULL,
        "target": None if file.target is None else {"metric": file.target.metric, "value": file.target.value},
        "data": {name: _data(bench, name, dataset) for name, dataset in bench.datasets.items()},
        "cells": cells,
        "summary": [line for name in file.data for line in _summaries(bench, name, cells)],
    }


def _data(bench: Bench, name: str, dataset: Dataset) -> DataEntry:
    """A data set. Where seeds vary its split, sizes are those of the first, and popularity is the mean over all."""
    others = bench.file.seeds[1:] if bench.n_splits(name) > 1 else ()
    parts = (dataset, *(open_data(bench.file.settings(name, seed)) for seed in others))
    figures = [popularity(each, bench.cutoffs) for each in parts]
    return {
        "users": dataset.n_users,
        "items": dataset.n_items,
        "interactions": dataset.train.n_interactions,
        "fingerprint": dataset.fingerprint,
        "popularity": {key: fmean(each[key] for each in figures) for key in figures[0]},
        "splits": bench.n_splits(name),
        "chance": dataset.notes.chance,
        "notes": dataset.notes.lines(),
    }


def _cell(bench: Bench, cell: Cell, failed: Mapping[str, str]) -> CellEntry:
    found: CellEntry = {
        "label": cell.label,
        "data": cell.data,
        "seed": cell.seed,
        "folder": cell.folder.relative_to(bench.output).as_posix(),
        "algorithm": cell.config.algorithm,
        "finished": cell.finished,
        "error": failed.get(cell.name),
    }
    if not cell.finished:
        return found
    summary, history = RunFolder(cell.folder).summary(), RunFolder(cell.folder).history()
    target, seconds = bench.file.target, cost(cell.folder)
    found["protocol"] = FULL
    found["test"] = summary.test
    found["protocol_sampled"] = summary.protocols.get("test_sampled")
    found["test_sampled"] = summary.test_sampled
    found["valid"] = summary.valid
    found["best_round"] = summary.best_round
    found["prelude"] = summary.n_phases
    found["rounds"] = len(history)
    found["communication"] = summary.communication
    found["target"] = None if target is None else reached(history, target)
    found["parameters"] = parameters(cell.folder / "model")
    found["privacy"] = {"profile": bench.profiles[cell.label], **summary.privacy}
    found["seconds"], found["cpu_seconds"] = seconds.get("seconds"), seconds.get("cpu_seconds")
    return found


def reached(history: Iterable[Entry], target: Target) -> ReachedEntry | None:
    """What a run had spent when its validation figure reached the target; ``None`` where it never did.

    These are rounds (pre-training included), bytes up and down, uploads, and seconds of computation.
    """
    spent: ReachedEntry = {"rounds": 0.0, "bytes_up": 0.0, "bytes_down": 0.0, "uploads": 0.0, "seconds": 0.0}
    for entry in history:
        spent["rounds"] += 1
        spent["bytes_up"] += entry.report.bytes_up
        spent["bytes_down"] += entry.report.bytes_down
        spent["uploads"] += entry.report.clients if entry.report.bytes_up else 0
        spent["seconds"] += entry.seconds
        if entry.valid is not None and entry.valid.get(target.metric, -math.inf) >= target.value:
            return spent
    return None


def parameters(model: Path) -> ParametersEntry:
    """How many floating-point numbers a stored model has.

    Counted apart: those of the server (or of the centralised method), and those that stay with the clients, the moments
    of their optimisers included.
    """
    return {"server": _floats(model / "state.safetensors"), "clients": _floats(model / "memory.safetensors")}


def _floats(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:  # safetensors: 8 bytes with the length of a JSON header, then the header
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(each["shape"]) for name, each in header.items() if each.get("dtype", "").startswith("F"))


def _summaries(bench: Bench, data: str, cells: Sequence[CellEntry]) -> list[SummaryEntry]:
    """One entry for each method on a data set, with its comparison to the reference."""
    runs = {
        label: {each["seed"]: each for each in cells if (each["label"], each["data"]) == (label, data)}
        for label in bench.labels
    }
    entries: list[SummaryEntry] = []
    for label, of_label in runs.items():
        finished = [each for each in of_label.values() if each["finished"]]
        entry: SummaryEntry = {
            "label": label,
            "data": data,
            "n": len(finished),
            "missing": len(of_label) - len(finished),
            "algorithm": bench.configs[label, data].algorithm,
            "seedless": bench.seedless(label, data),
        }
        if finished:
            _add_means(entry, finished)
            entry["comparison"] = _comparison(bench, label, data, runs)
        entries.append(entry)
    compared = [found for entry in entries if (found := entry.get("comparison")) is not None]
    for comparison, p in zip(compared, adjusted([each["p"] for each in compared]), strict=True):
        comparison["p_adjusted"] = p
    return entries


def _comparison(
    bench: Bench, label: str, data: str, runs: Mapping[str, Mapping[int, CellEntry]]
) -> ComparisonEntry | None:
    """A method against the reference, over the seeds that both have finished. The one run of a method that takes no
    seed counts for every seed."""
    reference, metric = bench.file.reference, bench.file.metric
    if reference is None or label == reference:
        return None

    def run_of(name: str, seed: int) -> CellEntry:
        own = runs[name]
        return next(iter(own.values())) if bench.seedless(name, data) else own[seed]

    both = [(run_of(label, seed), run_of(reference, seed)) for seed in bench.file.seeds]
    shared = [pair for pair in both if all(run["finished"] for run in pair)]
    ours, theirs = (by_user([bench.output / pair[side]["folder"] for pair in shared], metric) for side in (0, 1))
    if not shared or ours.height < 2:
        return None
    joined = ours.join(theirs, on="user", how="inner", suffix=" of reference", maintain_order="left")
    found = compare(joined[metric].to_numpy(), joined[f"{metric} of reference"].to_numpy())
    return {
        "metric": metric,
        "reference": reference,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "users": found.users,
    }


def _add_means(entry: SummaryEntry, finished: Sequence[CellEntry]) -> None:
    """Add the means and standard deviations over seeds of all figures of the finished runs."""
    first = finished[0]
    for part in ("test", "test_sampled", "valid"):
        if first[part]:
            entry[part] = _metrics(finished, part)
    entry["protocol"], entry["protocol_sampled"] = first["protocol"], first["protocol_sampled"]
    entry["parameters"] = first["parameters"]
    sent = [each["communication"] for each in finished]
    entry["uploads_per_client"] = spread(each["uploads_per_client"] if each["bytes_up"] else 0.0 for each in sent)
    entry["bytes"] = spread(each["bytes_up"] + each["bytes_down"] for each in sent)
    entry["seconds"] = _known(each["seconds"] for each in finished)
    entry["cpu_seconds"] = _known(each["cpu_seconds"] for each in finished)
    entry["target"] = _target(finished)
    entry["privacy"] = _privacy(first)


def _metrics(finished: Sequence[CellEntry], part: Literal["test", "test_sampled", "valid"]) -> dict[str, Spread]:
    values = [found for each in finished if (found := each[part]) is not None]
    return {name: spread(each[name] for each in values) for name in values[0] if "@" in name}


def _known(values: Iterable[float | None]) -> Spread | None:
    known = [each for each in values if each is not None]
    return spread(known) if known else None


def _target(finished: Sequence[CellEntry]) -> TargetSummary:
    spent = [found for each in finished if (found := each["target"])]
    summary: TargetSummary = {"reached": len(spent), "of": len(finished)}
    if spent:
        for name in ("rounds", "bytes_up", "bytes_down", "uploads", "seconds"):
            summary[name] = spread(each[name] for each in spent)
    return summary


def _privacy(cell: CellEntry) -> PrivacySummary:
    found = cell["privacy"]
    return {
        "profile": found.get("profile"),
        "claim": found["claim"],
        "epsilon_coordinator": found.get("epsilon_coordinator"),
        "delta": found.get("delta"),
    }


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation (of a sample; ``None`` for a single value)."""
    known = list(values)
    return {"mean": fmean(known), "sd": stdev(known) if len(known) > 1 else None}


def by_user(folders: Sequence[Path], metric: str) -> pl.DataFrame:
    """Columns ``user`` and ``metric`` (each user's mean over the runs in ``folders``), users in ascending order."""
    frames = [
        pl.read_parquet(folder / "test_users.parquet", columns=["user", metric])
        for folder in folders
        if (folder / "test_users.parquet").exists()
    ]
    if not frames:
        return pl.DataFrame(schema={"user": pl.String, metric: pl.Float64})
    return pl.concat(frames).group_by("user").agg(pl.col(metric).mean()).sort("user")
