"""Commands work where the locale is not UTF-8, and print question marks for what cannot be printed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale for ASCII, in which Python may not choose UTF-8 by itself."""


def run(folder: Path, *words: str | bytes, code: int = 0) -> tuple[bytes, bytes]:
    """What a command prints, in a process of its own: standard output and standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | ASCII
    command = [sys.executable, "-m", "perfedrec", *words]
    done = subprocess.run(command, capture_output=True, cwd=folder, env=environment)
    assert done.returncode == code, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    assert max(done.stdout + done.stderr) < 128
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in UTF-8 with ids that are not in ASCII: eight users, and Zoë's neighbours."""
    path = tmp_path_factory.mktemp("ids") / "ratings.csv"
    rows = [f"Zoë{user},ïtem{(user + item) % 12}" for user in range(8) for item in range(6)]
    path.write_text("\n".join(["user,item", *rows]), encoding="utf-8")
    return path


def test_tables_with_long_words_are_printed(tmp_path: Path) -> None:
    out, _ = run(tmp_path, "config", "keys")
    assert b"model.embedding_dim" in out


def test_data_are_read_as_utf8_and_written_as_utf8(data: Path, tmp_path: Path) -> None:
    words = ("--data", str(data), "--algorithm", "popularity", "--output", "run")
    run(tmp_path, "train", *words)
    run(tmp_path, "recommend", "--run", "run", "--all-users", "--output", "lists.csv")
    lists = (tmp_path / "lists.csv").read_text(encoding="utf-8")
    assert {line.split(",")[0] for line in lists.splitlines()[1:]} == {f"Zoë{user}" for user in range(8)}
    out, _ = run(tmp_path, "node", "init", "--store", "node.db", "--catalogue", str(catalogue(tmp_path)))
    assert out.startswith(b"node.db: 12 items")
    out, _ = run(tmp_path, "node", "import", str(data), "--store", "node.db")
    assert out.startswith(b"48 new interactions, 8 new users")


def catalogue(folder: Path) -> Path:
    path = folder / "items.txt"
    path.write_text("\n".join(f"ïtem{item}" for item in range(12)), encoding="utf-8")
    return path


def test_a_word_that_cannot_be_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    _, err = run(tmp_path, "recommend", "--run", "run", "--user", "Zoë".encode(), code=2)
    assert err.startswith(
        b"error: the word Zo? cannot be read; expected text in ascii, or a locale with UTF-8, such as"
    )
    assert err.count(b"\n") == 1
