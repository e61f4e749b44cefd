"""The command line as people use it: real files in, tables and files out, one line for each mistake."""

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from perfedrec.cli import app

runner = CliRunner()
FEW = ["--rounds", "3", "--set", "model.embedding_dim=8", "--set", "selection.n_clients_per_round=16", "--quiet"]


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """String ids, two groups of users that like two groups of items."""
    lines = ["user,item,rating,timestamp"]
    for user in range(30):
        for step in range(8):
            item = (user % 2) * 20 + (user * 3 + step * 5) % 20
            lines.append(f"u{user},i{item},{3 + step % 3},{1000 + step}")
    file = tmp_path / "ratings.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_train_evaluate_and_recommend_on_a_file_with_string_ids(ratings: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = runner.invoke(app, ["train", "--data", str(ratings), "--output", str(run), "--json", *FEW])
    assert trained.exit_code == 0, trained.output
    summary = json.loads(trained.stdout)
    evaluated = json.loads(runner.invoke(app, ["evaluate", "--run", str(run), "--json"]).stdout)
    assert evaluated["metrics"] == summary["test"]
    assert summary["communication"]["uploads"] == sum(
        json.loads(line)["clients"] for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    one = json.loads(runner.invoke(app, ["recommend", "--run", str(run), "--user", "u3", "--k", "4", "--json"]).stdout)
    assert [row["rank"] for row in one["items"]] == [1, 2, 3, 4]
    file = tmp_path / "lists.parquet"
    assert runner.invoke(app, ["recommend", "--run", str(run), "--all-users", "--output", str(file)]).exit_code == 0
    lists = pl.read_parquet(file)
    assert lists.columns == ["user", "item", "rank", "score"]
    assert lists["user"].n_unique() == 30
    shown = runner.invoke(app, ["recommend", "--run", str(run), "--user", "u3", "--k", "4"]).stdout
    assert one["items"][0]["item"] in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--data", "missing.csv"], "missing.csv"),
        (["train", "--data", "{ratings}", "--set", "run.round=3"], "did you mean run.rounds"),
        (["train", "--data", "{ratings}", "--preset", "papr"], "paper"),
        (["train", "--resume"], "config.toml"),
        (["train", "--data", "{binary}"], "{binary}"),
        (["train", "--data", "{empty}"], "{empty}"),
        (["evaluate", "--run", "nowhere"], "nowhere"),
        (["recommend", "--run", "nowhere", "--user", "1"], "nowhere"),
        (["recommend", "--run", "nowhere"], "--user"),
        (["data", "info", "{binary}"], "{binary}"),
        (["config", "show", "nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(
    arguments: list[str], said: str, ratings: Path, tmp_path: Path
) -> None:
    names = {"ratings": ratings, "binary": tmp_path / "binary.csv", "empty": tmp_path / "empty.csv"}
    names["binary"].write_bytes(b"\x00\xff\xfe\x01" * 50)
    names["empty"].write_bytes(b"")
    output = tmp_path / "run"
    filled = [each.format(**names) for each in arguments]
    if filled[0] == "train":
        filled += ["--output", str(output), "--quiet"]
    result = runner.invoke(app, filled)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said.format(**names) in result.stderr
    assert not output.exists()


def test_a_folder_that_is_not_empty_is_left_alone(ratings: Path, tmp_path: Path) -> None:
    before = ratings.read_bytes()
    result = runner.invoke(app, ["train", "--data", str(ratings), "--output", str(tmp_path), *FEW])
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ratings.csv"]
    assert ratings.read_bytes() == before


def test_data_info_and_prepare(ratings: Path, tmp_path: Path) -> None:
    facts = json.loads(runner.invoke(app, ["data", "info", str(ratings), "--json"]).stdout)
    assert facts["users"] == 30
    folder = tmp_path / "prepared"
    assert runner.invoke(app, ["data", "prepare", str(ratings), "--output", str(folder)]).exit_code == 0
    assert runner.invoke(app, ["train", "--data", str(folder), "--output", str(tmp_path / "r"), *FEW]).exit_code == 0


def test_config_commands(tmp_path: Path) -> None:
    shown = runner.invoke(app, ["config", "show", "paper"])
    file = tmp_path / "paper.toml"
    file.write_text(shown.stdout)
    assert runner.invoke(app, ["config", "show", str(file)]).stdout == shown.stdout
    assert "clusters" in runner.invoke(app, ["config", "list"]).stdout
    assert runner.invoke(app, ["config", "keys"]).exit_code == 0
    assert runner.invoke(app, ["--version"]).stdout.strip()
