"""The commands behind published figures run as the documents say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_accuracy_under_privacy_is_measured_beside_floor_and_ceiling() -> None:
    data = "synthetic:users=80,items=60,clusters=3,interactions_per_user=8"
    command = [sys.executable, "benchmarks/private.py", "--data", data, "--dim", "4", "--seeds", "0", "--copies", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = {line["figure"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert list(found) == ["popularity", "without noise", "epsilon 8", "epsilon 8, ratios"]
    assert found["popularity"]["users"] == found["epsilon 8"]["users"] == 240
    ratio = found["epsilon 8"]["value"] / found["without noise"]["value"]
    assert abs(found["epsilon 8, ratios"]["of_noiseless"] - ratio) < 0.001


def test_repairs_of_secure_sums_are_compared() -> None:
    data = "synthetic:users=600,items=600,clusters=3,interactions_per_user=8"
    only = ["by item", "rows of 5 contributors", "random basis", "rank 32"]
    command = [sys.executable, "benchmarks/secure.py", "--data", data, "--rounds", "3", "--only", *only]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = {line["candidate"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert list(found) == only
    exposed = {name: line["attacks"]["users exposed"]["value"] for name, line in found.items()}
    assert exposed.pop("by item") > 5
    assert set(exposed.values()) == {0}
    sent = {name: line["bytes_up_a_round"] for name, line in found.items()}
    assert sent["by item"] == sent["rows of 5 contributors"] > 10 * sent["random basis"] > 10 * sent["rank 32"]
    assert all(line["valid_ndcg@20"] > 0 for line in found.values())


def test_personalisation_is_measured_on_planted_data() -> None:
    command = [sys.executable, "benchmarks/personalisation.py", "--only", "facets", "--seeds", "0", "--rounds", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([*command, "--small"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *lines, seconds = map(json.loads, run.stdout.splitlines())
    found = {line["variant"]: line for line in lines}
    assert list(found) == [
        "nothing personal",
        "own rows",
        "clusters from round 41",
        "clusters",
        "clusters, learning rate 1",
        "clusters and own rows (preset)",
        "the same, learned weights",
    ]
    plain = found.pop("nothing personal")
    figures = ("valid recall@20", "recall@20", "ndcg@20")
    same = {name for name, line in found.items() if all(line[each] == plain[each] for each in figures)}
    assert same == {"clusters from round 41"}  # which have not begun after twelve rounds
    assert found["clusters from round 41"]["difference"] == 0
    assert seconds["data"] == "facets"


def test_this_build_is_held_against_an_earlier_one() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no history of the repository here")
    data = "synthetic:users=200,items=400"
    command = [
        sys.executable,
        "benchmarks/speed.py",
        "--data",
        data,
        "--threads",
        "1",
        "--rounds",
        "3",
        "--warm-up",
        "1",
    ]
    only = ["--only", "recommended", "--against"]
    run = subprocess.run([*command, *only, "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = map(json.loads, run.stdout.splitlines())
    assert (found["work"], found["threads"], found["rounds"]) == ("recommended", 1, 3)
    names = (
        "processor_ms",
        "processor_ratio",
        "processor_ratio_of_means",
        "wall_ms",
        "wall_ratio",
        "wall_ratio_of_means",
    )
    assert all(found[name] > 0 for name in (*names, "peak_mb", "peak_ratio"))
    unknown = subprocess.run([*command, *only, "nobody"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "--against nobody" in unknown.stderr
