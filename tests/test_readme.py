"""The example of the README runs as it is written, on a file of ratings."""

import re
from pathlib import Path

import pytest


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(example.splitlines()) <= 15
    lines = [f"u{user},i{(user * 3 + step * 7) % 40},5,{step}" for user in range(30) for step in range(8)]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,item,rating,timestamp", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - it is the example itself that is tested
    said = capsys.readouterr().out
    assert "recall@20" in said
    assert "u0" in said
