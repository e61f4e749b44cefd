"""Folders of coordinators' runs as they are in the middle and at the end, written without a federation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOW = 1_800_000_000.0
"""Seconds since 1970: when the last round of these runs ended."""


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A line of ``metrics.jsonl``: round ``number`` of a run with two phases."""
    phase = ("degrees", "spectral")[number] if number < 2 else "train"
    round_ = {"round": number, "phase": phase, "cohort": 40, "clients": 40, "loss": None, "aborted": None}
    sent = {"bytes_up": 1000 * (number + 1), "bytes_up_max": 900, "bytes_down": 50_000, "seconds": 1.5}
    return {**round_, **sent, "valid": {"recall@20": 0.1 + number / 100, "users": 38.0}, **changes}


def rejection(node: str, number: int, reason: str, detail: str = "what it was", phase: str = "train") -> dict[str, Any]:
    """A line of ``rejections.jsonl``."""
    return {"node": node, "round": number, "phase": phase, "reason": reason, "detail": detail, "clients": 10}


def stood_out(node: str, number: int, statistic: str = "norm", text: str = "ten times as large") -> dict[str, Any]:
    """A line of ``unusual.jsonl``."""
    about = {"phase": "train", "value": 10.0, "median": 1.0, "z": 7.7}
    return {"round": number, "nodes": [node], "statistic": statistic, "text": text, **about}


def write_run(
    folder: Path,
    state: str = "running",
    history: Sequence[Mapping[str, Any]] = (),
    rejections: Sequence[Mapping[str, Any]] = (),
    away: Sequence[str] = (),
    result: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    unusual: Sequence[Mapping[str, Any]] = (),
    apart: Mapping[str, Mapping[str, str]] | None = None,
    **more: Any,
) -> Path:
    """A run of nodes n0, n1 and n2 with 16 users each, 20 rounds of training after two phases. ``apart``
    are those that do not count. ``more`` are entries of ``status.json``."""
    folder.mkdir(parents=True)
    nodes = ("n0", "n1", "n2")
    known = {
        "rounds_planned": 22,
        "rounds_done": len(history),
        "last_round_timestamp_seconds": NOW,
        "deadline_seconds": 60.0,
        "superlink_restarts_total": 0,
        "node_connected": [{"node": name, "value": name not in away} for name in nodes],
        "certificate_expiry_timestamp_seconds": [{"certificate": "server.pem", "value": NOW + 300 * 86400}],
    }
    status = {
        "format": 1,
        "state": state,
        "why": "",
        "written": NOW,
        "run": f"name of {folder.name}",
        "method": "perfedrec_pp",
        "phases": 2,
        "metric": "recall@20",
        "users": 48,
        "protection": "no individual upload is visible; no DP guarantee",
        "delta": 1e-5,
        "keys": "/home/fed/keys",
        "nodes": {
            name: {"service": False, "users": 16, "refused": None}
            | ({"apart": apart[name]} if apart and name in apart else {})
            for name in nodes
        },
        **more,
        "figures": {**known, **(figures or {})},
    }
    (folder / "name").write_text(f"name of {folder.name}")
    (folder / "config.toml").write_text('algorithm = "perfedrec_pp"\n[run]\nrounds = 20\nselect_by = "recall@20"\n')
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in history))
    if rejections:
        (folder / "rejections.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rejections))
    if unusual:
        (folder / "unusual.jsonl").write_text("".join(json.dumps(each) + "\n" for each in unusual))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


FINISHED: Mapping[str, Any] = {
    "algorithm": "perfedrec_pp",
    "prelude": 2,
    "best_round": 19,
    "users": 48,
    "nodes_with_model": ["n0", "n1"],
    "test": {"recall@20": 0.3, "users": 38.0},
    "communication": {"bytes_up": 1.0, "bytes_down": 1.0, "uploads": 1.0},
    "privacy": {
        "claim": "user-level DP against the coordinator: epsilon 7.9",
        "epsilon_coordinator": 7.9,
        "delta": 1e-5,
    },
}
"""The content of ``result.json``."""
