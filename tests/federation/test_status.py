"""How a run is, from its files, and the alerts: on runs that are written by hand, and on one of a real coordinator."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.federation.conftest import Federation
from tests.federation.written import FINISHED, NOW, line, rejection, stood_out, write_run
from typer.testing import CliRunner

from perfedrec.cli import app, watching
from perfedrec.core.errors import CheckpointError
from perfedrec.federation.status import earlier, home, look, newest, runs_in
from perfedrec.runs.folder import RunFolder

DOCUMENT = Path(__file__).parents[2] / "docs" / "deployment.md"
DAY = 86400.0


@contextmanager
def coordinated(folder: Path) -> Iterator[None]:
    """Hold the lock that a coordinator holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def seen(folder: Path, **changes: Any) -> dict[str, Any]:
    """A new run with these changes, with a coordinator."""
    with coordinated(write_run(folder, **changes)):
        return look(folder, NOW + 1)


def test_a_run_in_progress(tmp_path: Path) -> None:
    rounds = [line(0), line(1), line(2, clients=30), line(3, valid=None)]
    without = [rejection("n1", 2, "late"), rejection("n2", 3, "away"), rejection("n0", 3, "late", "no\nanswer\x1b[2J")]
    told = {"rounds_done": 4, "epsilon": 2.5, "epsilon_planned": 8.0}
    view = seen(tmp_path / "run", history=rounds, rejections=without, away=["n2"], figures=told)
    assert (view["state"], view["method"], view["run"]) == ("running", "perfedrec_pp", "name of run")
    assert (view["done"], view["planned"], view["phases"], view["place"]) == (4, 22, 2, "round 2/20")
    assert [each["name"] for each in view["history"]] == ["phase 1", "phase 2", "round 1", "round 2"]
    assert view["totals"] == {"seconds": 6.0, "bytes_up": 1000 + 2000 + 3000 + 4000, "bytes_down": 200_000}
    assert view["accuracy"] == {
        "metric": "recall@20",
        "last": pytest.approx(0.12),
        "best": pytest.approx(0.12),
        "best_round": "round 1",
        "test": None,
    }
    assert view["privacy"] | {"claim": ""} == {"claim": "", "spent": 2.5, "planned": 8.0, "delta": 1e-5}
    states = {each["name"]: (each["state"], each["users"], each["without"]) for each in view["nodes"]}
    assert states == {
        "n0": ("missed", 16, {"late": 1}),
        "n1": ("here", 16, {"late": 1}),
        "n2": ("away", 16, {"away": 1}),
    }
    # What a node has written cannot move the cursor of a terminal.
    assert view["nodes"][0]["detail"] == "round 2: late: no answer [2J"
    assert view["nodes"][1]["detail"] == "round 1: late: what it was"
    assert json.loads(json.dumps(view)) == view


def test_a_node_that_is_refused_while_the_run_waits_for_others(tmp_path: Path) -> None:
    known = {"service": False, "users": None, "refused": None}
    refused = {"reason": "version", "detail": "this node runs version 0.1"}
    nodes = {"n0": known, "n1": known | {"refused": refused}, "n2": known}
    view = seen(
        tmp_path / "run", state="waiting", why="1 node and 16 users are present", users=None, nodes=nodes, away=["n2"]
    )
    assert (view["state"], view["why"], view["users"]) == ("waiting", "1 node and 16 users are present", None)
    assert [each["state"] for each in view["nodes"]] == ["here", "refused", "away"]
    assert view["nodes"][1]["detail"] == "version: this node runs version 0.1"
    assert [each["name"] for each in view["alerts"]] == ["NodeDisagrees"]


def test_a_coordinator_that_is_gone_is_noticed(tmp_path: Path) -> None:
    """It was killed: the file still says that the run is in progress."""
    folder = write_run(tmp_path / "run", history=[line(0)])
    assert look(folder, NOW)["state"] == "gone"
    assert [each["name"] for each in look(folder, NOW)["alerts"]] == ["ProcessGone"]
    with coordinated(folder):
        assert look(folder, NOW)["state"] == "running"
        for _ in range(3):  # to look does not take the lock away
            assert look(folder, NOW)["state"] == "running"
    with RunFolder(folder).locked():
        assert look(folder, NOW)["state"] == "running"


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    view = look(write_run(tmp_path / "run", "finished", [line(n) for n in range(22)], result=FINISHED), NOW + 100 * DAY)
    assert (view["state"], view["place"], view["accuracy"]["test"]) == ("finished", "round 20/20", 0.3)
    assert {each["name"]: each["state"] for each in view["nodes"]} == {
        "n0": "has the model",
        "n1": "has the model",
        "n2": "without the model",
    }
    assert view["privacy"]["claim"] == FINISHED["privacy"]["claim"]
    assert view["privacy"]["spent"] == 7.9
    assert view["alerts"] == []


BAD = ("shape", "size", "keys", "users", "range", "malformed", "not finite")
ALERTS: dict[str, dict[str, Any]] = {
    "NoRounds": {"figures": {"last_round_timestamp_seconds": NOW - 180}},
    "FewClients": {"history": [line(n, clients=31) for n in range(3)]},
    "RoundAborted": {"history": [line(0), line(1, clients=0, aborted="too few clients")]},
    "NodeLate": {
        "history": [line(n) for n in range(20)],
        "rejections": [rejection("n1", n, "late") for n in range(10)],
    },
    "NodeUnvouched": {"rejections": [rejection("n1", 0, "unvouched")]},
    "CertificateExpires": {
        "figures": {"certificate_expiry_timestamp_seconds": [{"certificate": "ca.crt", "value": NOW + 29 * DAY}]}
    },
    "SuperLinkRestarted": {"figures": {"superlink_restarts_total": 1}},
    "EpsilonAbovePlan": {"figures": {"epsilon": 8.1, "epsilon_planned": 8.0}},
    "NodeAway": {"away": ["n2"]},
    "NodeOverLimit": {"history": [line(0)], "rejections": [rejection("n1", 0, "limit")]},
    "NodeHeld": {"apart": {"n1": {"state": "held", "why": "it claims 130 users"}}},
    "NodeStandsOut": {
        "history": [line(n) for n in range(12)],
        "unusual": [stood_out("n1", n) for n in (2, 5, 11)],
    },
}
QUIET: dict[str, dict[str, Any]] = {
    "NoRounds": {"figures": {"last_round_timestamp_seconds": NOW - 179}},
    "FewClients": {"history": [line(0, clients=32), line(1, clients=31), line(2, clients=31)]},
    "RoundAborted": {"history": [line(0, clients=0, aborted="too few"), *(line(n) for n in range(1, 11))]},
    "NodeLate": {"history": [line(n) for n in range(20)], "rejections": [rejection("n1", n, "late") for n in range(9)]},
    "NodeUnvouched": {"history": [line(n) for n in range(11)], "rejections": [rejection("n1", 0, "unvouched")]},
    "CertificateExpires": {
        "figures": {"certificate_expiry_timestamp_seconds": [{"certificate": "ca.crt", "value": NOW + 31 * DAY}]}
    },
    "EpsilonAbovePlan": {"figures": {"epsilon": 8.0, "epsilon_planned": 8.0}},
    "NodeOverLimit": {"history": [line(n) for n in range(11)], "rejections": [rejection("n1", 0, "limit")]},
    "NodeHeld": {"apart": {"n1": {"state": "new", "why": "it is new"}, "n2": {"state": "excluded", "why": "so"}}},
    "NodeStandsOut": {
        "history": [line(n) for n in range(12)],
        "unusual": [
            *(stood_out("n1", n) for n in (1, 5, 11)),  # the first one is too long ago
            *(stood_out("n0", n) for n in (9, 10, 11)),
            stood_out("n2", 11),
            *(stood_out("n2", n, "state", "is excluded") for n in (9, 10)),
        ],
        "apart": {"n0": {"state": "excluded", "why": "so"}},
    },
}


@pytest.mark.parametrize("name", ALERTS)
def test_alerts(name: str, tmp_path: Path) -> None:
    """Each alert holds at its limit, alone, and not beside it."""
    assert [each["name"] for each in seen(tmp_path / "bad", **ALERTS[name])["alerts"]] == [name]
    assert seen(tmp_path / "good", **QUIET.get(name, {}))["alerts"] == []


@pytest.mark.parametrize(
    ("name", "reasons"), [("BrokenOrHostileNode", BAD), ("NodeDisagrees", ("version", "catalogue", "policy", "noise"))]
)
def test_alerts_of_reasons(name: str, reasons: tuple[str, ...], tmp_path: Path) -> None:
    for number, reason in enumerate(reasons):
        found = seen(tmp_path / str(number), history=[line(0)], rejections=[rejection("n1", 0, reason)])["alerts"]
        assert [each["name"] for each in found] == [name]
        assert "n1 " in found[0]["text"]
        assert f"{reason}: what it was" in found[0]["text"]


def test_a_node_that_misses_three_rounds_in_a_row_is_away(tmp_path: Path) -> None:
    """Also where the SuperLink still counts it as connected."""
    rounds, late = [line(n) for n in range(4)], [rejection("n1", n, "late") for n in range(1, 4)]
    assert [each["text"] for each in seen(tmp_path / "a", history=rounds, rejections=late)["alerts"]] == [
        "n1 was missing in the last 3 rounds."
    ]
    assert seen(tmp_path / "b", history=rounds, rejections=late[:2])["alerts"] == []


def test_nodes_that_do_not_count_and_what_stood_out(tmp_path: Path) -> None:
    apart = {"n1": {"state": "excluded", "why": "too\x1b large"}, "n2": {"state": "new", "why": "it is new"}}
    lines = [stood_out("n1", 2, text="ten\ntimes"), stood_out("n1", 3, "state", "is excluded (decision 4): too large")]
    view = seen(tmp_path / "run", history=[line(n) for n in range(4)], apart=apart, unusual=lines, away=["n2"])
    assert [(each["state"], each["detail"]) for each in view["nodes"]] == [
        ("here", ""),
        ("excluded", "too  large"),
        ("new", "it is new; it is not connected"),
    ]
    assert view["unusual"][0] == {"nodes": ["n1"], "statistic": "norm", "text": "ten times", "round": 2} | {
        "name": "round 1"
    }
    assert view["keys"] == "/home/fed/keys"
    assert view["alerts"] == []
    shown = CliRunner().invoke(app, ["federation", "watch", str(tmp_path / "run"), "--once"])
    for text in (
        "what stood out",
        "ten times",
        "is excluded (decision 4)",
        "perfedrec federation nodes /home/fed/keys",
    ):
        assert text in shown.output
    gone = look(write_run(tmp_path / "over", "finished", apart=apart, result=FINISHED))
    assert [each["state"] for each in gone["nodes"]] == ["has the model", "has the model", "without the model"]


def test_of_groups_that_stand_out_the_nodes_are_named_that_were_in_most_of_them(tmp_path: Path) -> None:
    lines = [
        {**stood_out("n1", n), "nodes": nodes}
        for n, nodes in ((8, ["n0", "n1"]), (9, ["n1", "n2"]), (10, ["n1", "n0"]), (11, ["n0", "n1", "n2"]))
    ]
    rounds = [line(n) for n in range(12)]
    found = seen(tmp_path / "run", history=rounds, unusual=lines)["alerts"]
    assert [each["text"] for each in found] == ["n1 was in 4 of the 4 groups that stood out."]
    assert seen(tmp_path / "few", history=rounds, unusual=lines[:2])["alerts"] == []


def test_alerts_have_the_names_of_the_rules_in_the_documentation() -> None:
    """All that a coordinator's files tell; two rules are about what nodes alone know."""
    rules = set(re.findall(r"- alert: (\w+)", DOCUMENT.read_text(encoding="utf-8")))
    assert rules - {"NotConnected", "ModelOld"} == {*ALERTS, "BrokenOrHostileNode", "NodeDisagrees", "ProcessGone"}


def test_runs_of_a_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new", "run")):
        write_run(tmp_path / name, "finished", [line(0)], result=FINISHED)
        os.utime(tmp_path / name / "name", (NOW + number, NOW + number))
    (tmp_path / "notes").mkdir()
    assert [each.name for each in runs_in(tmp_path)] == ["run", "new", "old"]
    assert runs_in(tmp_path / "old") == runs_in(tmp_path)
    assert newest(tmp_path) == tmp_path / "run"
    assert newest(tmp_path / "old") == tmp_path / "old"
    assert home(tmp_path / "old") == home(tmp_path) == tmp_path
    assert [each["name"] for each in earlier(tmp_path, tmp_path / "run")] == ["new", "old"]
    assert earlier(tmp_path, tmp_path / "run")[0]["accuracy"]["best"] == pytest.approx(0.1)
    (tmp_path / "old" / "metrics.jsonl").write_text('{"no": "round"}\n')
    assert [each["name"] for each in earlier(tmp_path, tmp_path / "run")] == ["new"]
    with pytest.raises(
        CheckpointError, match=r"old: status.json, metrics.jsonl, .* cannot read \(it has no \"round\"\)"
    ):
        look(tmp_path / "old")
    for wrong, message in (("notes", "has no run of a coordinator"), ("nowhere", "no such folder")):
        with pytest.raises(CheckpointError, match=message):
            newest(tmp_path / wrong)
    with pytest.raises(CheckpointError, match="not a coordinator's run; expected the folder of serve --output"):
        look(tmp_path / "notes")


def test_a_run_of_a_version_that_wrote_no_status(finished: Federation) -> None:
    assert not (finished.folder / "status.json").exists()
    view, summary = look(finished.folder), RunFolder(finished.folder).summary()
    assert (view["state"], view["users"], view["method"]) == ("finished", 80, summary.algorithm)
    assert view["done"] == view["planned"] == len(RunFolder(finished.folder).history())
    assert view["place"] == "round 3/3"
    assert [each["state"] for each in view["nodes"]] == ["has the model"] * 2
    assert view["accuracy"]["test"] == summary.test[view["accuracy"]["metric"]]
    assert view["privacy"]["claim"] == summary.privacy["claim"]


def test_the_command_shows_a_run_once_and_needs_neither_torch_nor_flower(tmp_path: Path) -> None:
    runner = CliRunner()
    folder = write_run(tmp_path / "run", "finished", [line(n) for n in range(22)], result=FINISHED)
    shown = runner.invoke(app, ["federation", "watch", str(folder), "--once"])
    assert shown.exit_code == 0, shown.output
    for text in (
        "perfedrec_pp  run name of run  finished  round 20/20",
        "without the model",
        "40 of 40",
        "test 0.3000",
    ):
        assert text in shown.output
    script = "import sys; from perfedrec.cli import app; app(sys.argv[1:], standalone_mode=False); "
    script += "assert not {'torch', 'flwr', 'numpy', 'polars'} & sys.modules.keys()"
    words = ["federation", "watch", str(tmp_path), "--json"]  # ends by itself: the run is over
    told = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == look(folder)
    refused = runner.invoke(app, ["federation", "watch"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "expected either the FOLDER of a run or --coordinator" in refused.stderr


def test_without_a_terminal_a_line_is_printed_whenever_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"epsilon": 2.5, "epsilon_planned": 8.0}
    first = seen(tmp_path / "first", history=[line(0), line(1), line(2)], figures=told)
    second = seen(tmp_path / "second", history=[line(n) for n in range(4)], away=["n2"], figures=told)
    last = look(write_run(tmp_path / "last", "finished", [line(n) for n in range(22)], result=FINISHED))
    views, printed = [second, second, last], list[str]()

    def sleep(seconds: float) -> None:
        printed.append(capsys.readouterr().out)  # what is there while the run lasts

    monkeypatch.setattr("perfedrec.cli.watching.time.sleep", sleep)
    watching._watch(lambda: views.pop(0) if printed else first, 2.0, once=False, as_json=False)
    assert [*printed, capsys.readouterr().out] == [
        "running  round 1/20  nodes: 3 here  recall@20 0.1200, best 0.1200 in round 1  6.0 kB up, 150.0 kB down  "
        "epsilon 2.5 of 8\n",
        "running  round 2/20  nodes: 2 here, 1 away  recall@20 0.1300, best 0.1300 in round 2  "
        "10.0 kB up, 200.0 kB down  epsilon 2.5 of 8  NodeAway: n2 is not connected.\n",
        "",
        "finished  round 20/20  nodes: 2 has the model, 1 without the model  "
        "recall@20 0.3100, best 0.3100 in round 20, test 0.3000  253.0 kB up, 1.1 MB down  epsilon 7.9 of 7.9\n",
    ]
