"""perfedrec node app and perfedrec tour as people call them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perfedrec import Node
from perfedrec.cli import app, pages
from perfedrec.federation import invented, tour
from perfedrec.runs.signals import InterruptedRunError


def test_the_page_is_for_the_browser_that_has_the_address_and_ends_with_ctrl_c(
    new_home: Callable[[Path], Path], tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    before = {each.name for each in tmp_path.iterdir()}
    command = [sys.executable, "-m", "perfedrec", "node", "app", "--store", str(home), "--no-open"]
    # A process that is started from a script could have been told to ignore Ctrl-C.
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert running.stdout is not None
    address = running.stdout.readline().removeprefix("open ").strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{40,}", address)
    assert "lets one browser in, once" in running.stdout.readline()
    me, other = (
        urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar())) for _ in ("me", "another user")
    )
    place = address.partition("?")[0]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        other.open(place, timeout=600)
    with me.open(address, timeout=600) as answer:
        assert "Who are you?" in answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        other.open(address, timeout=600)
    with me.open(f"{place}for-you?user=ann", timeout=600) as answer:
        assert "For you" in answer.read().decode()
    running.send_signal(signal.SIGINT)
    assert running.wait(600) == 0
    assert running.stdout.read() == ""
    assert {each.name for each in tmp_path.iterdir()} - before <= {"home.node-wal", "home.node-shm"}
    with Node.open(home) as node:
        assert "ann" in node.users()


def test_a_browser_is_opened_where_there_is_a_desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not pages._has_desktop()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert pages._has_desktop()


def test_a_tour_is_prepared_trained_and_opened_once_and_opened_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is played elsewhere, and takes a minute: here it is a function that leaves a result."""
    done, folder, runner = list[Any](), tmp_path / "tour", CliRunner()
    monkeypatch.setattr(tour, "HOMES", (4, 3, 3, 3))
    monkeypatch.setattr(tour, "ITEMS", 140)
    cover = invented.cover(0, 0)
    monkeypatch.setattr(invented, "cover", lambda item, genre: cover)
    monkeypatch.setattr(pages, "_serve", lambda store, port, show: done.append((store, port, show)))
    monkeypatch.chdir(tmp_path)

    def train(where: Path, reporter: Any, tell: Any) -> None:
        done.append("trained")
        if len(done) == 1:
            raise InterruptedRunError("stopped after round 1", signal.SIGINT)
        (where / "run").mkdir()
        (where / "run" / "result.json").write_text("{}")

    monkeypatch.setattr(tour, "train", train)
    stopped = runner.invoke(app, ["tour"])
    assert stopped.exit_code == 130
    assert stopped.stderr.strip().endswith("resume with perfedrec tour --output tour")
    opened = runner.invoke(app, ["tour", "--port", "0", "--no-open"])
    assert opened.exit_code == 0, opened.output
    assert "Ada lives in the home on this page" in opened.output
    home = Path("tour/nodes/n0/store.db")
    assert done == ["trained", "trained", (home, 0, False)]
    content = {each: each.stat().st_mtime_ns for each in folder.rglob("*") if each.is_file()}
    assert runner.invoke(app, ["tour"]).exit_code == 0
    assert done[3:] == [(home, 0, None)]
    assert {each: each.stat().st_mtime_ns for each in folder.rglob("*") if each.is_file()} == content
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused = runner.invoke(app, ["tour", "--output", "mine"])
    assert (refused.exit_code, refused.stderr) == (2, "error: mine is not empty; expected a new folder\n")
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]


def test_a_tour_has_one_process_that_makes_or_plays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tour.alone(Path("tour")):
        refused = CliRunner().invoke(app, ["tour"])
        with tour.alone(Path("other")):
            pass
    expected = "expected another --output, or the end of that one"
    line = f"error: another process is making or playing the tour in tour; {expected}\n"
    assert (refused.exit_code, refused.stderr, refused.stdout) == (2, line, "")
    with pytest.raises(OSError, match="full"), tour.alone(Path("tour")):
        raise OSError("full")
    with tour.alone(Path("tour")):
        assert os.listdir(tmp_path) == [".tour.lock"]
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["node", "app", "--store", str(tmp_path / "no.node")])
    assert missing.exit_code == 2
    assert missing.stderr.count("\n") == 1
