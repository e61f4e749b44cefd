"""How the run of a coordinator is, from the files in its folder: nobody is asked, and nothing but these files is read.

This is the one source of ``perfedrec federation watch``, of the operator's page and of their alerts. The ``figures``
have the names and values that Prometheus reads.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from perfedrec.core.errors import CheckpointError, reason
from perfedrec.federation.alerts import alerts
from perfedrec.runs.files import CONFIG, HISTORY, NAME, REJECTIONS, RESULT, STATUS, UNUSUAL, has_coordinator, read_lines
from perfedrec.runs.progress import place, round_name

View = dict[str, Any]
"""Plain values by name, as JSON has them."""

MOST = 50
"""The most earlier runs that are listed."""

OVER = ("finished", "stopped", "failed", "gone")
"""States of a run that no process plays."""


def home(folder: Path) -> Path:
    """The folder that runs are in: the ``folder`` itself, or the one around it if it is a run.

    Raises :class:`CheckpointError` where there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected the folder of a run, or one with several runs in it")
    return folder.absolute().parent if _is_run(folder) else folder.absolute()


def runs_in(folder: Path) -> list[Path]:
    """The runs of coordinators that are in a folder, or beside it if it is one of them itself; newest first."""
    inside = home(folder)
    found = {each: _began(each) for each in inside.iterdir() if each.is_dir() and _is_run(each)}
    return sorted(found, key=lambda each: (-found[each], each.name))


def newest(folder: Path) -> Path:
    """The run in a folder: the folder itself, or the newest run in it. Raises :class:`CheckpointError` where there is
    none."""
    found = [folder] if folder.is_dir() and _is_run(folder) else runs_in(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: has no run of a coordinator; expected the folder of serve --output, or one with several in it"
        )
    return found[0]


def look(folder: Path, now: float | None = None) -> View:
    """How the run in a folder is, at a time in seconds since 1970 (default: now).

    Raises :class:`CheckpointError` where the folder is not that of a coordinator's run.
    """
    if not folder.is_dir() or not _is_run(folder):
        raise CheckpointError(f"{folder}: not a coordinator's run; expected the folder of serve --output")
    try:
        return _look(folder, time.time() if now is None else now)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {STATUS}, {HISTORY}, {REJECTIONS} or {RESULT} has what this version cannot read "
            f"({reason(error)}); expected what perfedrec wrote there"
        ) from None


def _look(folder: Path, now: float) -> View:
    status, result, config = _read(folder / STATUS), _read(folder / RESULT), _config(folder)
    phases = int(status.get("phases") or result.get("prelude") or 0)
    history = [_round(line, phases) for line in read_lines(folder / HISTORY)]
    written = read_lines(folder / REJECTIONS)
    without = [_rejection(each, phases) for each in [*_unwritten(status, written), *written]]
    unusual = [_unusual(each, phases) for each in read_lines(folder / UNUSUAL)]
    figures, done = status.get("figures", {}), len(history)
    planned = int(figures.get("rounds_planned", phases + config.get("run", {}).get("rounds", 0)))
    state, why = _state(folder, status, result)
    view = {
        "folder": str(folder),
        "run": status.get("run") or _text(folder / NAME),
        "state": state,
        "why": why,
        "method": status.get("method") or config.get("algorithm", ""),
        "began": _began(folder),
        "written": status.get("written") or _changed(folder),
        "done": done,
        "planned": planned,
        "phases": phases,
        "place": place(done, planned, phases, history[-1]["phase"] if history else ""),
        "users": result.get("users") or status.get("users"),
        "history": history,
        "without": without,
        "unusual": unusual,
        "keys": status.get("keys", ""),
        "totals": {name: sum(each[name] for each in history) for name in ("seconds", "bytes_up", "bytes_down")},
        "accuracy": _accuracy(status, result, config, history),
        "privacy": _privacy(status, result),
        "figures": figures,
    }
    view["nodes"] = _nodes(status, result, view)
    view["alerts"] = [asdict(each) for each in alerts(view, now)]
    return view


def earlier(folder: Path, run: Path) -> list[View]:
    """The runs in a ``folder`` (see :func:`runs_in`) but one, newest first and at most :data:`MOST`: each as a part of
    what :func:`look` gives. Runs that cannot be read are left out."""
    found = []
    for each in [each for each in runs_in(folder) if each != run.absolute()][:MOST]:
        with suppress(CheckpointError):
            found.append(_brief(each, *((each / name).stat().st_mtime_ns for name in _files(each))))
    return found


@lru_cache(maxsize=4 * MOST)
def _brief(run: Path, *changed: int) -> View:
    """A run in one line. It is read once for each time at which its files were ``changed``."""
    view = look(run)
    names = ("run", "state", "method", "began", "place", "users", "totals", "accuracy", "privacy")
    return {**{name: view[name] for name in names}, "name": run.name}


def _files(run: Path) -> list[str]:
    return [name for name in (STATUS, RESULT, HISTORY, NAME) if (run / name).exists()]


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a coordinator's run: such runs have a name, or wait for nodes."""
    return (folder / NAME).is_file() or (folder / STATUS).is_file()


def _read(path: Path) -> View:
    """The object in a file that is written whole; nothing where it is missing or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _config(folder: Path) -> View:
    try:
        return tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _began(folder: Path) -> float:
    """When a run was set up, in seconds since 1970: its configuration is written once for each start."""
    path = next((each for name in (NAME, CONFIG, STATUS) if (each := folder / name).exists()), folder)
    return path.stat().st_mtime


def _changed(folder: Path) -> float:
    found = [(folder / name).stat().st_mtime for name in (RESULT, HISTORY, NAME) if (folder / name).exists()]
    return max(found, default=folder.stat().st_mtime)


def _round(line: Mapping[str, Any], phases: int) -> View:
    names = ("round", "phase", "cohort", "clients", "aborted", "seconds", "bytes_up", "bytes_down", "valid")
    return {**{name: line.get(name) for name in names}, "name": round_name(line["round"], phases)}


def _unwritten(status: View, written: Sequence[View]) -> list[View]:
    """Nodes that were refused since the last round: they are written down with the next one."""
    known = {each.get("node") for each in written if each.get("phase") == "registration"}
    refused = {name: about["refused"] for name, about in status.get("nodes", {}).items() if about["refused"]}
    return [
        {"node": name, "round": -1, "phase": "registration", **why}
        for name, why in refused.items()
        if name not in known
    ]


def _rejection(line: Mapping[str, Any], phases: int) -> View:
    """A line of ``rejections.jsonl``. What a node has written is shown to people, so control characters are removed."""
    told = {name: _printable(str(line.get(name, ""))) for name in ("node", "reason", "detail", "phase")}
    return {**told, "round": int(line["round"]), "name": round_name(line["round"], phases)}


def _unusual(line: Mapping[str, Any], phases: int) -> View:
    """A line of ``unusual.jsonl``."""
    nodes = [_printable(str(each)) for each in line["nodes"]]
    told = {"nodes": nodes, "statistic": str(line["statistic"]), "text": _printable(str(line["text"]))}
    return {**told, "round": int(line["round"]), "name": round_name(line["round"], phases)}


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _state(folder: Path, status: View, result: View) -> tuple[str, str]:
    """The state of a run, and the reason where it has one. A process that was killed could not write it down."""
    state, why = status.get("state", "finished" if result else "running"), status.get("why", "")
    if state in ("waiting", "running") and not has_coordinator(folder):
        return "gone", "its process was ended from outside"
    return state, why


def _accuracy(status: View, result: View, config: View, history: Sequence[View]) -> View:
    """The metric that selects the best round: its last and best value, and that of the test."""
    metric = status.get("metric") or config.get("run", {}).get("select_by", "recall@20")
    values = [(each["valid"][metric], each["name"]) for each in history if metric in (each["valid"] or {})]
    best = max(values, key=lambda each: each[0], default=(None, None))
    return {
        "metric": metric,
        "last": values[-1][0] if values else None,
        "best": best[0],
        "best_round": best[1],
        "test": result.get("test", {}).get(metric),
    }


def _privacy(status: View, result: View) -> View:
    block, figures = result.get("privacy", {}), status.get("figures", {})
    return {
        "claim": block.get("claim") or status.get("protection", ""),
        "spent": figures.get("epsilon", block.get("epsilon_coordinator")),
        "planned": figures.get("epsilon_planned", block.get("epsilon_coordinator")),
        "delta": block.get("delta", status.get("delta")),
    }


def _nodes(status: View, result: View, view: View) -> list[View]:
    """The registered nodes by name; of a run without status.json, those that its files name."""
    figures, without = view["figures"], view["without"]
    connected = {each["node"]: bool(each["value"]) for each in figures.get("node_connected", ())}
    having = result.get("nodes_with_model")
    named = sorted({*(having or ()), *(each["node"] for each in without)})
    known = status.get("nodes") or {name: {"users": None, "refused": None} for name in named}
    found = []
    for name, about in known.items():
        own = [each for each in without if each["node"] == name]
        refused = next((each for each in own if each["phase"] == "registration"), None)
        state, detail = "here" if connected.get(name) else "away", ""
        if (apart := about.get("apart")) is not None and view["state"] != "finished":
            absent = "; it is not connected" if view["state"] not in OVER and not connected.get(name) else ""
            state, detail = apart["state"], _printable(apart["why"]) + absent
        elif refused is not None and about["users"] is None:
            state, detail = "refused", f"{refused['reason']}: {refused['detail']}"
        elif view["state"] == "finished" and not about.get("service"):
            state = "has the model" if name in (having or ()) else "without the model"
        elif view["state"] in OVER:
            state = "not known"
        elif own and own[-1]["round"] == view["done"] - 1 and state == "here":
            state = "missed"
        if not detail and own:
            detail = f"{own[-1]['name']}: {own[-1]['reason']}: {own[-1]['detail']}"
        reasons = dict(sorted(Counter(each["reason"] for each in own).items()))
        found.append({"name": name, "state": state, "users": about["users"], "detail": detail, "without": reasons})
    return found
