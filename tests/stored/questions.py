"""Questions about files that a version of perfedrec stored, asked on the command line.

``make.sh`` puts them to the version that wrote the files, and stores the answers in ``expected.json``;
``test_stored.py`` puts them to this version. The working directory has ``data/``, because one run names it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typer.testing import CliRunner

from perfedrec.cli import app

K, MORE = 5, 3
"""Length of the lists; rounds by which a run is continued."""

USERS = {"newcomer": ("ann", "bob", "eve"), "home": ("8", "9", "ann"), "secure": ("0", "2"), "paper": ("0", "2")}
"""Users of the nodes' files."""

NOT_RESUMED = ("fedmf-secure",)
"""Runs that only the version that wrote them continues."""

STUDY = "synthetic:users=24,items=20,clusters=2,interactions_per_user=5,seed=2"

Answers = dict[str, Any]


def ask(*words: object) -> str:
    """What a command prints. Raises :class:`AssertionError` where it fails."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def lists(command: Sequence[object], users: Sequence[str]) -> Answers:
    """The list of each user by columns, by a ``command`` that takes the option ``--user``."""
    found = {user: json.loads(ask(*command, "--user", user, "--k", K, "--json"))["items"] for user in users}
    return {user: {name: [row[name] for row in rows] for name in rows[0]} for user, rows in found.items()}


def of_run(run: Path) -> Answers:
    """Lists of two users of a run, and its metrics."""
    users = ("u00", "u07") if run.name == "pp-attributes" else ("0", "7")
    parts = ("test", "valid")
    return {
        "lists": lists(["recommend", "--run", run], users),
        "metrics": {
            part: json.loads(ask("evaluate", "--run", run, "--part", part, "--json"))["metrics"] for part in parts
        },
    }


def resumed(run: Path) -> Answers:
    """Continue a run. Returns its rounds, and the answers of the model that it ends with."""
    phases = json.loads((run / "result.json").read_text())["prelude"]
    rounds = len((run / "metrics.jsonl").read_text().splitlines()) - phases + MORE
    ask("train", "--resume", "--output", run, "--quiet", "--rounds", rounds)
    result = json.loads((run / "result.json").read_text())
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {"best_round": result["best_round"], "losses": [line["loss"] for line in history]}
    return {"rounds": rounds, **found, **of_run(run)}


def of_store(store: Path) -> Answers:
    """What is in a node's file, and lists of its users."""
    status = json.loads(ask("node", "status", "--store", store, "--json"))
    for changing in ("store", "bytes", "schema"):
        del status[changing]
    status["model"].pop("age_seconds")
    return {"status": status, "lists": lists(["node", "recommend", "--store", store], USERS[store.stem])}


def of_model(model: Path, store: Path) -> Answers:
    """Lists of a new user in a new node's file with a model from a file."""
    ask("node", "init", "--store", store, "--model", model)
    db = sqlite3.connect(store, isolation_level=None)
    db.execute("UPDATE node SET secret = zeroblob(32)")  # it is random, and lists follow from it
    db.close()
    ask("node", "add", "ann", *(["i01", "i03"] if model.stem == "pp-attributes" else ["3", "5"]), "--store", store)
    return lists(["node", "recommend", "--store", store], ["ann"])


def of_study(study: Path, trials: int = 2) -> Answers:
    """The best of a study's trials."""
    words = ["tune", "--data", STUDY, "--algorithm", "fedmf", "--trials", trials, "--rounds", 2, "--seed", 1]
    words += ["--output", study, "--json"]
    for option in ("model.embedding_dim=4", "selection.n_clients_per_round=12", "run.device=cpu", "run.threads=1"):
        words += ["--set", option]
    words += ["--set", "run.evaluate_every=1", "--set", "run.select_by=ndcg@10"]
    found: Answers = json.loads(ask(*words))
    del found["output"]
    return found


def answers(stored: Path, scratch: Path) -> Answers:
    """All answers about the files in the folder ``stored``, each about a copy in ``scratch``."""

    def each(folder: str, question: Callable[[Path], Answers]) -> Answers:
        found = {}
        for source in sorted((stored / folder).iterdir()):
            target = scratch / source.name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            found[source.name] = question(target)
        return found

    def of_whole_run(run: Path) -> Answers:
        first = of_run(run)
        return first if run.name in NOT_RESUMED else {**first, "resumed": resumed(run)}

    shutil.copytree(stored / "tune", scratch / "tune")
    return {
        "runs": each("runs", of_whole_run),
        "node": each("node", of_store),
        "models": each("models", lambda model: of_model(model, model.with_suffix(".node"))),
        "tune": of_study(scratch / "tune"),
    }


def short(answer: Any) -> Any:
    """An answer with numbers of nine digits, enough for all numbers of single precision."""
    if isinstance(answer, Mapping):
        return {name: short(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [short(value) for value in answer]
    return float(f"{answer:.9g}") if isinstance(answer, float) else answer


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)
    with TemporaryDirectory() as place:
        print(json.dumps(short(answers(folder, Path(place))), separators=(",", ":")))
