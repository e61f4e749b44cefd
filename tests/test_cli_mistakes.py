"""Mistakes in arguments: each is one line on the standard error and exit code 2, and nothing is lost or written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perfedrec.cli import app

runner = CliRunner()
SMALL = "--set model.embedding_dim=8 --set selection.n_clients_per_round=8 --rounds 1 --quiet"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of every kind."""
    folder = tmp_path_factory.mktemp("mistakes")
    lines = [f"u{user},i{(user * 3 + step * 5) % 20},{1 + step % 5}" for user in range(30) for step in range(6)]
    (folder / "ratings.csv").write_text("user,item,rating\n" + "\n".join(lines) + "\n")
    (folder / "items.txt").write_text("".join(f"i{number}\n" for number in range(20)))
    (folder / "bench.toml").write_text(f'[data.a]\npath = "{folder}/ratings.csv"\n[methods.popularity]\n')
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "lines.txt").write_text("some words\nand more\n")
    (folder / "list.json").write_text("[]")
    (folder / "wrong.toml").write_text("run = 1\ndata = 2\nmethods = 3\nspace = 4\n")
    (folder / "folder").mkdir()
    for command in (
        f"train --data {folder}/ratings.csv --output {folder}/run {SMALL}",
        f"node init --store {folder}/home.node --catalogue {folder}/items.txt",
        f"node export --run {folder}/run --output {folder}/served.model",
        f"federation certificates {folder}/certificates",
        f"federation key {folder}/keys/n0",
    ):
        done = runner.invoke(app, command.split())
        assert done.exit_code == 0, done.output
    return folder


FILES = ("missing", "empty", "binary", "lines.txt", "list.json", "wrong.toml", "folder", "ratings.csv/x", "x" * 300)
"""Files, folders and names that are mostly not what a command expects."""

RIGHT: dict[str, tuple[str, ...]] = {
    "train --config {} --data ratings.csv --output new --quiet": ("empty",),
    "serve --output new --certificates certificates --nodes keys --catalogue items.txt --config {}": ("empty",),
    "node init --store new --catalogue {}": ("lines.txt", "list.json", "wrong.toml"),
    "serve --output new --certificates certificates --nodes keys --catalogue {}": (
        "lines.txt",
        "list.json",
        "wrong.toml",
    ),
    "audit run --nodes {}": (),
    "train --data {} --output new --quiet": ("lines.txt", "wrong.toml"),
    "data info {}": ("lines.txt", "wrong.toml"),
    "data prepare {} --output new": ("lines.txt", "wrong.toml"),
    "config show {}": ("empty",),
}
"""What is right among :data:`FILES`: an empty configuration is one, items may have any names, and words may be
sequences of items."""

COMMANDS = [
    *RIGHT,
    "train --resume --output {}",
    "train --data ratings.csv --algorithm {}:Method --output new",
    "evaluate --run {}",
    "evaluate --run run --data {}",
    "recommend --run {} --user u1",
    "audit {}",
    "privacy report {}",
    "report {}",
    "bench {} --output new",
    "tune --data {} --output new --algorithm item_knn",
    "tune --data ratings.csv --output new --algorithm item_knn --space {}",
    "node status --store {}",
    "node import {} --store home.node",
    "node receive --store home.node --model {}",
    "node export --run {} --output new",
    "node run --store {} --coordinator h:1 --ca certificates/ca.crt --key keys/n0",
    "node run --store home.node --coordinator h:1 --ca certificates/ca.crt --key keys/n0 --bundle {}",
    "service run --coordinator h:1 --ca certificates/ca.crt --key keys/n0 --state {}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_file_is_one_line(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    before = contents(here)
    for name in FILES:
        if name not in RIGHT.get(command, ()):
            refused(command.format(name).split())
    assert contents(here) == before


@pytest.mark.parametrize(
    "command",
    [
        "recommend --run run --user u1 --k {}",
        "train --data ratings.csv --output new --rounds {}",
        "train --data ratings.csv --output new --set run.threads={}",
        "audit run --trials {}",
        "tune --data ratings.csv --algorithm item_knn --output new --trials {}",
        "privacy plan --epsilon {} --users 5000",
        "data prepare ratings.csv --output new --folds {}",
        "bench bench.toml --output new --processes {}",
        "node run --store home.node --coordinator h:1 --ca certificates/ca.crt --key keys/n0 --threads {}",
    ],
)
def test_a_wrong_number_is_one_line(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    before = contents(here)
    for number in ("-1", "many", "nan", "0.5.1", "-99999999999999999999"):
        refused(command.format(number).split())
    assert contents(here) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --data ratings.csv --output new --set run.threads=99999999999999999999", "run.threads: expected a num"),
        ("data prepare ratings.csv --output new --folds 99999999999999999999", "folds"),
        ("report run --output ratings.csv", "ratings.csv exists and is no report"),
        ("recommend --run run --all-users --output ratings.csv", "ratings.csv exists and holds no lists"),
        ("node export --run run --output ratings.csv", "ratings.csv exists and is no model"),
        ("data prepare ratings.csv --output run", "run"),
    ],
)
def test_nothing_is_lost(command: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    before = contents(here)
    assert message in refused(command.split())
    assert contents(here) == before


@pytest.mark.parametrize("command", ["train", "federation up", "tune"])
def test_an_unknown_option_that_is_a_key_of_the_data_is_named(command: str) -> None:
    for option, key in (("split", "split"), ("ratio", "ratio"), ("valid-from", "valid_from"), ("ties", "ties")):
        message = refused([*command.split(), f"--{option}", "x"])
        assert message.endswith(f"perfedrec {command} --help; expected --set data.{key}=...")
    assert "expected --set" not in refused([*command.split(), "--bogus", "x"])
    assert "expected --set" not in refused(["data", "info", "x", "--split", "ratio"])


def test_a_name_that_is_far_is_not_suggested() -> None:
    for command, option in (("recommend", "quiet"), ("train", "bogus")):
        assert refused([command, f"--{option}", "x"]).endswith(f"perfedrec {command} --help")


def test_ctrl_c_before_the_first_round_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(here)
    words = f"train --data ratings.csv --output new {SMALL}".split()
    for place, said in (
        ("perfedrec.runs.config.open_data", "error: interrupted\n"),
        ("perfedrec.runs.training.Rounds", "error: interrupted before the first checkpoint\n"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, interrupted)
            done = runner.invoke(app, words)
        assert (done.exit_code, done.stderr) == (130, said)
        assert not Path("new").exists()


def test_a_folder_with_runs_in_it_names_them(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bench/runs/mf/toy/seed-0", "bench/runs/mf/toy/seed-1", "several/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text("")
    (tmp_path / "bench" / "bench.toml").write_text("")
    for command in ("recommend --user u1 --run", "privacy report", "audit"):
        said = refused([*command.split(), "bench"])
        assert said.endswith(
            "bench: this is a folder of a comparison (perfedrec bench); expected that of a run, here "
            "bench/runs/mf/toy/seed-0, bench/runs/mf/toy/seed-1"
        )
        assert refused([*command.split(), "several"]).endswith("runs in it; expected that of a run, here several/a")
    assert "bench: comparison that has not ended" in refused(["report", "bench"])


def test_ratings_and_a_core_are_options_of_all_commands_that_prepare_data(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    options = "--min-rating 3 --k-core 2"
    for command, output in (("data prepare ratings.csv", "a"), (f"train --data ratings.csv {SMALL}", "b")):
        done = runner.invoke(app, [*command.split(), *options.split(), "--output", str(tmp_path / output)])
        assert done.exit_code == 0, done.output
    told = [json.loads((tmp_path / name).read_text()) for name in ("a/split.json", "b/result.json")]
    steps = told[0]["report"]["remarks"]
    assert [step.partition(":")[0] for step in steps][1::2] == ["rated 3 or more", "2-core"]
    assert set(steps) <= set(told[1]["data"])
    for option in options, "--min-rating 3", "--k-core 2":
        resumed = refused(["train", "--resume", "--output", str(tmp_path / "b"), *option.split()])
        assert "only --rounds and --device may change" in resumed
        up = refused(["federation", "up", "--resume", "--output", str(tmp_path / "f"), *option.split()])
        assert "--resume continues with the nodes" in up
    none = "federation up --data synthetic:users=20 --min-rating 9 --output"
    assert "compare with min_rating" in refused([*none.split(), str(tmp_path / "f")])


def test_lists_and_reports_are_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    for command in (
        "recommend --run run --all-users --output lists.csv",
        "recommend --run run --all-users --output l.parquet",
        "report run --output report.html",
        "node export --run run --output other.model",
    ):
        for _ in range(2):
            done = runner.invoke(app, command.split())
            assert done.exit_code == 0, done.output
    for name in ("lists.csv", "l.parquet", "report.html", "other.model"):
        Path(name).unlink()


def refused(words: list[str]) -> str:
    """The line that a command ends with."""
    done: Any = runner.invoke(app, words)
    assert isinstance(done.exception, SystemExit), (words, done.exception)
    assert done.exit_code == 2, (words, done.output)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, (words, done.stderr)
    assert done.stderr.splitlines()[-1] == errors[0], (words, done.stderr)
    return errors[0]


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
