"""What came out of a comparison: every run's figures, means and deviations over seeds, and significance over users."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import polars as pl

from perfedrec.compare.bench import Bench, Cell, Target
from perfedrec.compare.cells import cost
from perfedrec.evaluation.significance import adjusted, compare
from perfedrec.runs.training import FULL, SAMPLED, Entry, popularity, read_history, read_summary

FORMAT = 1


def collect(bench: Bench, failed: Mapping[str, str]) -> dict[str, Any]:
    """The content of ``results.json`` (see docs/bench.md), from all runs that are finished."""
    file = bench.file
    cells = [_cell(bench, cell, failed) for cell in bench.cells()]
    return {
        "format": FORMAT,
        "seeds": list(file.seeds),
        "metric": file.metric,
        "reference": file.reference,
        "protocol": FULL,
        "target": file.target and file.target.model_dump(),
        "data": {
            name: {
                "users": dataset.n_users,
                "items": dataset.n_items,
                "interactions": dataset.train.n_interactions,
                "fingerprint": dataset.fingerprint,
                "popularity": popularity(dataset),
            }
            for name, dataset in bench.datasets.items()
        },
        "cells": cells,
        "summary": [line for name in file.data for line in _summaries(bench, name, cells)],
    }


def _cell(bench: Bench, cell: Cell, failed: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
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
    summary, history = read_summary(cell.folder), read_history(cell.folder)
    negatives = cell.config.run.sampled_negatives
    return found | {
        "protocol": FULL,
        "test": summary["test"],
        "protocol_sampled": SAMPLED.format(negatives) if negatives else None,
        "test_sampled": summary["test_sampled"],
        "valid": summary["valid"],
        "best_round": summary["best_round"],
        "prelude": summary["prelude"],
        "rounds": len(history),
        "communication": summary["communication"],
        "target": bench.file.target and reached(history, bench.file.target),
        "parameters": parameters(cell.folder / "model"),
        "privacy": {"profile": bench.profiles[cell.label], **summary["privacy"]},
        **({"seconds": None, "cpu_seconds": None} | cost(cell.folder)),
    }


def reached(history: Iterable[Entry], target: Target) -> dict[str, float] | None:
    """Rounds (pre-training included), bytes up and down, uploads and seconds of computation until a validation figure
    was reached; ``None`` where it never was."""
    spent = {"rounds": 0.0, "bytes_up": 0.0, "bytes_down": 0.0, "uploads": 0.0, "seconds": 0.0}
    for entry in history:
        spent["rounds"] += 1
        spent["bytes_up"] += entry.report.bytes_up
        spent["bytes_down"] += entry.report.bytes_down
        spent["uploads"] += entry.report.clients if entry.report.bytes_up else 0
        spent["seconds"] += entry.seconds
        if entry.valid is not None and entry.valid.get(target.metric, -math.inf) >= target.value:
            return spent
    return None


def parameters(model: Path) -> dict[str, int]:
    """Floating-point numbers of a stored model: those that the server (or the centralised method) holds, and those that
    stay with the clients, their optimisers' moments included."""
    return {"server": _floats(model / "state.safetensors"), "clients": _floats(model / "memory.safetensors")}


def _floats(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:  # a header of JSON after its length in 8 bytes
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(each["shape"]) for name, each in header.items() if each.get("dtype", "").startswith("F"))


def _summaries(bench: Bench, data: str, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a method on a data set, with its comparison to the reference."""
    entries, reference, metric = [], bench.file.reference, bench.file.metric
    runs = {
        label: {each["seed"]: each for each in cells if (each["label"], each["data"]) == (label, data)}
        for label in bench.labels
    }
    for label, of_label in runs.items():
        finished = [each for each in of_label.values() if each["finished"]]
        entry: dict[str, Any] = {
            "label": label,
            "data": data,
            "n": len(finished),
            "missing": len(of_label) - len(finished),
        }
        entry["algorithm"] = bench.configs[label, data].algorithm
        if finished:
            entry |= _means(finished)
            entry["comparison"] = None
            if reference is not None and label != reference:
                shared = [seed for seed in of_label if of_label[seed]["finished"] and runs[reference][seed]["finished"]]
                ours, theirs = (
                    by_user([bench.output / runs[name][seed]["folder"] for seed in shared], metric)
                    for name in (label, reference)
                )
                if shared and ours.height > 1:
                    joined = ours.join(theirs, on="user", how="inner", suffix=" of reference", maintain_order="left")
                    found = compare(joined[metric].to_numpy(), joined[f"{metric} of reference"].to_numpy())
                    entry["comparison"] = {"metric": metric, "reference": reference, **asdict(found)}
        entries.append(entry)
    compared = [entry["comparison"] for entry in entries if entry.get("comparison")]
    for comparison, p in zip(compared, adjusted([each["p"] for each in compared]), strict=True):
        comparison["p_adjusted"] = p
    return entries


def _means(finished: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over seeds of all that is a number."""
    first = finished[0]
    found: dict[str, Any] = {
        part: {name: spread(each[part][name] for each in finished) for name in first[part] if name != "users"}
        for part in ("test", "test_sampled", "valid")
        if first[part]
    }
    found |= {name: first[name] for name in ("protocol", "protocol_sampled", "parameters")}
    sent = [each["communication"] for each in finished]
    found["uploads_per_client"] = spread(each["uploads_per_client"] if each["bytes_up"] else 0.0 for each in sent)
    found["bytes"] = spread(
        each["communication"]["bytes_up"] + each["communication"]["bytes_down"] for each in finished
    )
    for name in ("seconds", "cpu_seconds"):
        known = [each[name] for each in finished if each[name] is not None]
        found[name] = spread(known) if known else None
    targets = [each["target"] for each in finished if each["target"]]
    found["target"] = {"reached": len(targets), "of": len(finished)}
    if targets:
        found["target"] |= {name: spread(each[name] for each in targets) for name in targets[0]}
    found["privacy"] = {
        name: first["privacy"].get(name) for name in ("profile", "claim", "epsilon_coordinator", "delta")
    }
    return found


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and standard deviation (of a sample; ``None`` for a single value)."""
    known = list(values)
    return {"mean": fmean(known), "sd": stdev(known) if len(known) > 1 else None}


def by_user(folders: Sequence[Path], metric: str) -> pl.DataFrame:
    """Columns ``user`` and ``metric``, its mean over runs, users ascending."""
    frames = [
        pl.read_parquet(folder / "test_users.parquet", columns=["user", metric])
        for folder in folders
        if (folder / "test_users.parquet").exists()
    ]
    if not frames:
        return pl.DataFrame(schema={"user": pl.String, metric: pl.Float64})
    return pl.concat(frames).group_by("user").agg(pl.col(metric).mean()).sort("user")
