"""The names of the files of a run, and how its lines are read: without torch, for programs that only look at a run."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

CONFIG, ENVIRONMENT, RESULT = "config.toml", "environment.json", "result.json"
NAME, ITEMS, STATUS = "name", "items.txt", "status.json"
HISTORY, REJECTIONS, UNUSUAL = "metrics.jsonl", "rejections.jsonl", "unusual.jsonl"
CHECKPOINTS, MODEL = "checkpoints", "model"
BENCH = "bench.toml"
"""The file in the folder of a comparison that has every configuration in full."""

OLD_NAMES = {"given_up": "aborted"}
"""Fields of a line of the history that older versions wrote, and what they are called today."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of lines of JSON; a line that was cut off is left out. Nothing where there is no file."""
    found = list[dict[str, Any]]()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append({OLD_NAMES.get(str(name), str(name)): value for name, value in line.items()})
    return found


def has_coordinator(folder: Path) -> bool:
    """Whether a process of this machine is the coordinator of the run in a folder now: it holds a lock on it. To look
    takes the lock for a moment, for which :meth:`perfedrec.runs.folder.RunFolder.locked` waits."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
