"""perfedrec node serve as a process: its options, its end, and what is left after kill -9 under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from perfedrec import Node
from perfedrec.cli import app
from perfedrec.runtimes.node import Store

ITEMS = 400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.node"
    Store.create(path, np.array([f"i{number}" for number in range(ITEMS)], dtype=object)).close()
    return path


class UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self.path))

    def ask(self, method: str, address: str, body: object = None) -> Any:
        given = None if body is None else json.dumps(body)
        self.request(method, address, given, {"content-type": "application/json"})
        return json.loads(self.getresponse().read())


@contextmanager
def serving(*options: object) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process of the command, and the lines that it has printed before it answers."""
    command = [sys.executable, "-m", "perfedrec", "node", "serve", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [process.stdout.readline() for _ in range(1 if "--unix" in options else 2)]
        finally:
            process.kill()


def test_kill_9_under_load_loses_nothing_that_was_confirmed(path: Path, tmp_path: Path) -> None:
    place, confirmed, enough = tmp_path / "s", list[tuple[str, str]](), threading.Event()
    with serving("--store", path, "--unix", place) as (process, lines):
        assert lines == [f"{path}: answers at {place}; Ctrl-C ends it\n"]

        def load(user: str) -> None:
            asking = UnixConnection(place)
            for number in range(ITEMS):
                try:
                    answer = asking.ask("POST", f"/users/{user}/interactions", {"items": [f"i{number}"]})
                except (OSError, HTTPException, ValueError):
                    return
                assert answer == {"changed": 1}
                confirmed.append((user, f"i{number}"))
                if len(confirmed) >= 80:
                    enough.set()

        threads = [threading.Thread(target=load, args=(user,)) for user in ("ann", "bob", "cas")]
        for thread in threads:
            thread.start()
        assert enough.wait(120)
        process.kill()
        for thread in threads:
            thread.join()
        assert process.wait() == -signal.SIGKILL
    assert len(confirmed) < 3 * ITEMS  # it was killed under load
    with Node.open(path) as node:
        kept = {(user, each["item"]) for user in node.users() for each in node.items_of(user)}
        assert set(confirmed) <= kept
        assert len(kept) <= len(confirmed) + 3  # each thread had one question that was not answered
    with serving("--store", path, "--unix", place) as (process, _), Node.open(path) as beside:
        asking = UnixConnection(place)
        beside.add("dan", "i7")
        assert [each["item"] for each in asking.ask("GET", "/users/dan/interactions")["items"]] == ["i7"]
        assert asking.ask("POST", "/users/dan/interactions", {"items": ["i8"]}) == {"changed": 1}
        assert [each["item"] for each in beside.items_of("dan")] == ["i7", "i8"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not place.exists()


def test_the_token_stands_in_a_file_or_is_printed(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    with serving("--store", path, "--port", 0, "--token-file", file) as (process, lines):
        address = lines[0].split(" answers at ")[1].partition(";")[0]
        assert lines[1] == f"token: in {file}\n"
        token = file.read_text().strip()
        for given, status in ((token, 200), (f"{token}x", 401)):
            asking = HTTPConnection(address.removeprefix("http://"))
            asking.request("GET", "/items/i0", headers={"Authorization": f"Bearer {given}"})
            assert asking.getresponse().status == status
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--unix", "{here}/s", "--port", "8100"], "--unix listens on no port and needs no token"),
        (["--port", "70000"], "--port 70000: expected a port"),
        (["--store", "{here}/b.node"], "b.node: no such file; make one with perfedrec node init"),
        (["--token-file", "{here}/a.node"], "holds no token"),
        (["--unix", "{here}/a.node"], "is no socket"),
    ],
)
def test_what_cannot_be_served_gets_one_line(path: Path, tmp_path: Path, options: list[str], words: str) -> None:
    command = ["node", "serve", "--store", str(path), *(each.format(here=tmp_path) for each in options)]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert words in done.stderr
    assert os.path.getsize(path) > 0
