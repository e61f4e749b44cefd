"""The register of nodes: what its lines say together, and the command that shows it and decides."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.errors import ConfigError
from perfedrec.federation.members import EXCLUDED, HELD, MEMBER, NEW, Known, Register, fold

runner = CliRunner()


def keys(folder: Path, *names: str) -> Path:
    """A folder with public keys; nobody reads what is in them here."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.pub").write_text("a key")
    return folder


def seen(node: str, users: int = 12, waits: int = 0, key: str = "k") -> dict[str, Any]:
    return {"event": "seen", "node": node, "users": users, "waits": waits, "key": key}


def states(register: Register) -> dict[str, str]:
    return {name: each.state for name, each in register.nodes().items()}


def test_a_decision_holds_until_another_one_or_until_it_is_undone(tmp_path: Path) -> None:
    register = Register(keys(tmp_path / "keys", "a", "b", "service"))
    register.add(seen("a"), seen("b"))
    assert states(register) == {"a": MEMBER, "b": MEMBER}
    first = register.exclude("a", "ten times as large")
    assert register.nodes()["a"] == Known("a", EXCLUDED, "ten times as large", first, 12, 0, _time(register), "k")
    second = register.admit("a")
    assert states(register) == {"a": MEMBER, "b": MEMBER}
    register.undo(second)
    assert (register.nodes()["a"].state, register.nodes()["a"].decision) == (EXCLUDED, first)
    register.undo(first)
    assert (register.nodes()["a"].state, register.nodes()["a"].decision) == (MEMBER, None)
    # Another process reads the same, and nothing was removed.
    assert fold(Register(register.keys).lines()) == register.nodes()
    assert [each["event"] for each in register.lines()] == ["seen", "seen", "exclude", "admit", "undo", "undo"]
    for number, message in ((first, "is undone already"), (1, "1 is not a decision; .*3, 4"), (99, "99 is not")):
        with pytest.raises(ConfigError, match=message):
            register.undo(number)
    for name in ("c", "service", "../a"):
        with pytest.raises(ConfigError, match=r"has no node .*; expected one of a, b"):
            register.exclude(name)


def _time(register: Register) -> float:
    return float(register.lines()[0]["time"])


def test_a_new_node_counts_after_its_rounds_and_each_round_counts_once(tmp_path: Path) -> None:
    register = Register(keys(tmp_path / "keys", "a"))
    register.add(seen("a", waits=2))
    for number, (state, left) in ((3, (NEW, 1)), (3, (NEW, 1)), (4, (MEMBER, 0))):
        register.add({"event": "waited", "node": "a", "run": "r", "round": number})
        assert (register.nodes()["a"].state, register.nodes()["a"].left) == (state, left)
    register.add(seen("b", waits=2))
    assert register.nodes()["b"].why == "it is new: what it sends counts after 2 more rounds"
    register.admit("b")
    assert states(register)["b"] == MEMBER


def test_users_that_a_node_is_held_for_count_as_known_once_it_is_admitted(tmp_path: Path) -> None:
    register = Register(keys(tmp_path / "keys", "a"))
    number = register.add(seen("a"), {"event": "hold", "node": "a", "because": "130", "users": 130})[1]
    assert (states(register)["a"], register.nodes()["a"].users) == (HELD, 12)
    register.admit("a")
    assert (states(register)["a"], register.nodes()["a"].users) == (MEMBER, 130)
    register.undo(number + 1)
    assert states(register)["a"] == HELD
    register.undo(number)
    assert (states(register)["a"], register.nodes()["a"].users) == (MEMBER, 130)


def test_two_who_write_at_once_get_different_numbers(tmp_path: Path) -> None:
    folder = keys(tmp_path / "keys", *(f"n{number}" for number in range(8)))
    with ThreadPoolExecutor(4) as threads:
        numbers = list(threads.map(lambda name: Register(folder).exclude(name), [f"n{number}" for number in range(8)]))
    assert sorted(numbers) == list(range(1, 9))
    assert states(Register(folder)) == {f"n{number}": EXCLUDED for number in range(8)}


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"number": 2}', '{"number": 2, "time": 1, "node": "a", "event": "shrug"}', '"a"']
)
def test_a_register_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, bad: str) -> None:
    register = Register(keys(tmp_path / "keys", "a"))
    register.exclude("a")
    with open(register.path, "a", encoding="utf-8") as file:
        file.write(bad + "\n")
    with pytest.raises(ConfigError, match=r"nodes\.jsonl, line 2: cannot be read"):
        register.nodes()
    refused = runner.invoke(app, ["federation", "nodes", str(register.keys), "--admit", "a"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_a_half_written_last_line_is_named_with_what_to_do(tmp_path: Path) -> None:
    register = Register(keys(tmp_path / "keys", "a"))
    register.add(seen("a"))
    whole = register.path.read_bytes()
    register.path.write_bytes(whole + b'{"number": 2, "ti')
    with pytest.raises(ConfigError, match=r"nodes\.jsonl, line 2: the last line is half written.*delete that line"):
        register.nodes()
    register.path.write_bytes(whole)
    assert states(register) == {"a": MEMBER}


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perfedrec.federation import members

    register = Register(keys(tmp_path / "keys", "a"))
    register.exclude("a")
    before = register.path.read_bytes()

    class Short:
        def __init__(self, file: Any) -> None:
            self.file = file

        def fileno(self) -> int:
            return int(self.file.fileno())

        def write(self, content: bytes) -> int:
            return int(self.file.write(content[:7]))

    whole = members._write_whole
    monkeypatch.setattr(members, "_write_whole", lambda file, content: whole(Short(file), content))
    with pytest.raises(ConfigError, match=r"cannot be written .*the disk is full"):
        register.admit("a")
    assert register.path.read_bytes() == before


def test_the_command_shows_nodes_and_decisions_and_decides(tmp_path: Path) -> None:
    folder = keys(tmp_path / "keys", "a", "b", "service")
    Register(folder).add(seen("a", 1234))

    def nodes(*words: str, code: int = 0) -> str:
        result = runner.invoke(app, ["federation", "nodes", str(folder), *words])
        assert result.exit_code == code, result.output
        if code:
            assert result.stderr.count("\n") == 1
        return result.stderr if code else result.stdout

    assert "1,234" in nodes()
    assert "no decisions so far" in nodes()
    told = nodes("--exclude", "a", "--because", "large sums")
    assert told == "decision 2: a is excluded from the next round on (--undo 2 undoes it)\n"
    assert "large sums" in nodes()
    assert nodes("--undo", "2") == "decision 3: a is a member from the next round on\n"
    found = json.loads(nodes("--json"))
    assert [(each["name"], each["state"]) for each in found["nodes"]] == [("a", MEMBER), ("b", MEMBER)]
    assert [(each["event"], each["undone"]) for each in found["decisions"]] == [("exclude", 3), ("undo", None)]
    assert "undone by 3" in nodes()
    assert "expected one of --exclude, --admit and --undo" in nodes("--exclude", "a", "--undo", "2", code=2)
    assert "--because is the reason of a decision" in nodes("--because", "x", code=2)
    assert "has no node c" in nodes("--admit", "c", code=2)
    assert "decision 4: a is a member already: this changes nothing (--undo 4" in nodes("--admit", "a")
    empty = runner.invoke(app, ["federation", "nodes", str(tmp_path)])
    assert (empty.exit_code, "no public keys" in empty.stderr) == (2, True)
    assert f"perhaps {folder}" in " ".join(empty.stderr.split())
    missing = runner.invoke(app, ["federation", "nodes", str(tmp_path / "nothere")])
    assert (missing.exit_code, "nothere: no such folder" in missing.stderr) == (2, True)
    script = "import sys; from perfedrec.cli import app; app(sys.argv[1:], standalone_mode=False); "
    script += "assert not {'torch', 'flwr', 'numpy', 'polars'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script, "federation", "nodes", str(folder)], check=True, capture_output=True)
