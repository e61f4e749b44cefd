"""The command line with real files: its tables, its files, and one line for each error."""

import errno
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
import typer
from cryptography import x509
from rich.console import Console
from typer.testing import CliRunner

from perfedrec.__main__ import main
from perfedrec.cli import app
from perfedrec.cli import config as config_commands
from perfedrec.cli.common import command, console, one_line, print_list
from perfedrec.cli.training import which_round
from perfedrec.core.dotted import keys
from perfedrec.core.extras import MissingExtraError
from perfedrec.runs.config import resolve
from perfedrec.runs.preset_files import ABLATIONS
from perfedrec.runs.summary import Summary

runner = CliRunner()
FEW = ["--rounds", "3", "--set", "model.embedding_dim=8", "--set", "selection.n_clients_per_round=16", "--quiet"]


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """Ratings with string ids, in which two groups of users like two groups of items."""
    lines = ["user,item,rating,timestamp"]
    for user in range(30):
        for step in range(8):
            item = (user % 2) * 20 + (user * 3 + step * 5) % 20
            lines.append(f"u{user},i{item},{3 + step % 3},{1000 + step}")
    file = tmp_path / "ratings.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_training_on_validation_too_is_said_plainly(ratings: Path, tmp_path: Path) -> None:
    own = ["train", "--data", str(ratings), "--algorithm", "rp3beta", "--quiet", "--output"]
    apart = runner.invoke(app, [*own, str(tmp_path / "apart")])
    joined = runner.invoke(app, [*own, str(tmp_path / "joined"), "--train-on-valid"])
    assert (apart.exit_code, joined.exit_code) == (0, 0), joined.output
    assert "no validation data, so the last round is used" in joined.output
    figures = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("apart", "joined")}
    assert any("30 validation interactions are trained on" in line for line in figures["joined"]["data"])
    assert not any("trained on" in line for line in figures["apart"]["data"])
    assert figures["joined"]["valid"] == {"users": 0}
    assert figures["joined"]["test"]["users"] == figures["apart"]["test"]["users"] == 30
    assert figures["joined"]["test"] != figures["apart"]["test"]
    assert "train_on_valid = true" in (tmp_path / "joined" / "config.toml").read_text()
    refused = runner.invoke(app, [*own, str(tmp_path / "no"), "--train-on-valid", "--algorithm", "simgcl"])
    assert refused.exit_code == 2
    assert "expected run.patience = 0" in refused.output
    assert not (tmp_path / "no").exists()


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
    ("line", "user", "item"), [("{},{}", 3, int), ("u{},i{}", "u3", str), ("{},i{}", 3, str), ("{:03},{}", "003", int)]
)
def test_ids_in_json_are_of_the_kind_that_they_are_in_the_data(
    line: str, user: int | str, item: type, tmp_path: Path
) -> None:
    pairs = [(number, 20 + (number * 3 + step) % 9) for number in range(1, 13) for step in range(5)]
    data, run = tmp_path / "pairs.csv", tmp_path / "run"
    data.write_text("user,item\n" + "\n".join(line.format(*pair) for pair in pairs) + "\n")
    cli("train", "--data", data, "--algorithm", "popularity", "--output", run, "--quiet")
    found = json.loads(cli("recommend", "--run", run, "--user", user, "--k", 2, "--json").stdout)
    assert found["user"] == user
    assert [type(each["item"]) for each in found["items"]] == [item, item]


def test_a_list_shows_models_only_where_models_are_mixed(ratings: Path, tmp_path: Path) -> None:
    for method, mixed in (("popularity", False), ("perfedrec_pp", True)):
        run, few = tmp_path / method, FEW if mixed else ["--rounds", "0", "--quiet"]
        cli("train", "--data", ratings, "--algorithm", method, "--output", run, *few)
        shown = cli("recommend", "--run", run, "--user", "u3", "--k", "2").stdout
        assert ("moved" in shown, "score = " in shown) == (mixed, mixed)


def test_help_describes_arguments_as_well_as_options() -> None:
    assert "folder of a finished run" in runner.invoke(app, ["audit", "--help"]).stdout


def test_data_are_described_without_waiting_for_torch(ratings: Path) -> None:
    """Three quarters of a second of processor time, and not two and a half."""
    script = "import sys; from perfedrec.cli import app; app(sys.argv[1:], standalone_mode=False); "
    script += "assert not {'torch', 'pydantic'} & set(sys.modules)"
    words = ["data", "info", str(ratings), "--json"]
    told = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["users"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "missing.csv"], "missing.csv"),
        (["train", "--data", "{ratings}", "--set", "run.round=3"], "did you mean run.rounds"),
        (["train", "--data", "{ratings}", "--preset", "papr"], "paper"),
        (["train", "--resume"], "there is no such folder"),
        (["train", "--data", "{ratings}", "--device", "cuda"], "torch finds no CUDA device"),
        (["train", "--data", "missing.csv", "--device", "cuda"], "torch finds no CUDA device"),
        (["train", "--config", "{comparison}"], "{comparison}: this is the file of a comparison"),
        (["train", "--config", "{space}"], "{space}: this is a search space"),
        (["bench", "{configuration}", "--output", "{prepared}"], "{configuration}: this is the configuration of a run"),
        (["bench", "{comparison}", "--output", "{ratings}/a"], "cannot be written to, because {ratings} is a file"),
        (["bench", "{comparison}", "--output", "{used}"], "{used} is not empty; expected a new folder"),
        (["bench", "{comparison}", "--output", "{finished}"], "{finished} holds a run; expected a new folder"),
        (["tune", "--data", "missing.csv", "--output", "{used}"], "{used} is not empty; expected a new folder"),
        (["tune", "--data", "{ratings}", "--set", "run.device=cuda", "--output", "{prepared}"], "no CUDA device"),
        (["train", "--data", "{binary}"], "{binary}"),
        (["train", "--data", "{empty}"], "{empty}"),
        (["evaluate", "--run", "nowhere"], "nowhere"),
        (["recommend", "--run", "nowhere", "--user", "1"], "nowhere"),
        (["recommend", "--run", "nowhere"], "--user"),
        (["recommend", "--run", "nowhere", "--user", "1", "--output", "a.csv"], "--all-users"),
        (["recommend", "--run", "nowhere", "--all-users"], "--output FILE"),
        (
            ["train", "--resume", "--algorithm", "mf", "--seed", "1"],
            "expected it without --seed and --algorithm: only --rou",
        ),
        (["train", "--data", "{ratings}", "--previous"], "--resume"),
        (["train", "--data", "{ratings}", "--algorithm", "mf", "--privacy", "paper"], "mf is centralised: it has"),
        (["train", "--algorithm", "fedgnn", "--privacy", "private"], "expected profile none, paper or secure, or a m"),
        (["data", "prepare", "{ratings}", "--output", "{ratings}/a"], "{ratings}"),
        (["tune", "--data", "{ratings}", "--output", "{ratings}/a"], "cannot be written to, because {ratings} is a fi"),
        (
            ["federation", "key", "{ratings}/a"],
            "{ratings}/a: cannot be written (something of this name is there already)",
        ),
        (["data", "info", "{long}"], "{long}, line 3: cannot be split into columns"),
        (["data", "prepare", "{ratings}", "--output", "{prepared}", "--seed", "-1"], "at least 0"),
        (["data", "info", "{binary}"], "{binary}"),
        (["evaluate", "{ratings}"], "see perfedrec evaluate --help; expected --run {ratings}"),
        (["privacy", "report", "--run", "a"], "expected it without --run, as in perfedrec privacy report RUN"),
        (["report", "--run", "a"], "expected it without --run, as in perfedrec report RUN|BENCH"),
        (["recommend", "--run", "a", "--user"], "'--user' requires an argument; see perfedrec recommend --help"),
        (["privacy", "plan", "--epsilon"], "'--epsilon' requires an argument; see perfedrec privacy plan --help"),
        (["trian"], "no such command 'trian'; see perfedrec --help; did you mean train?"),
        (["federation", "statsu"], "no such command 'statsu'; see perfedrec federation --help"),
        (["train", "--resum"], "no such option '--resum'; see perfedrec train --help; did you mean --resume?"),
        (["train", "--no-heade"], "did you mean --no-header?"),
        (["train", "--min_rating", "3"], "did you mean --min-rating?"),
        (["train", "--rounds", "many"], "'many' is not a valid integer; see perfedrec train --help"),
        (["data", "prepare", "{ratings}"], "missing option '--output', the folder to write train, valid and test to"),
        (["train", "{ratings}"], "extra argument ({ratings}); see perfedrec train --help; expected --data {ratings}"),
        (["evaluate", "{finished}"], "missing option '--run', the folder of a finished run; see perfedrec evaluate -"),
        (["config", "show", "nothing"], "nothing"),
    ],
)
def test_an_error_is_one_line_with_exit_code_2_and_nothing_is_written(
    arguments: list[str], message: str, ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    names = {"ratings": ratings, "binary": tmp_path / "binary.csv", "empty": tmp_path / "empty.csv"}
    names["binary"].write_bytes(b"\x00\xff\xfe\x01" * 50)
    names["empty"].write_bytes(b"")
    names |= {"long": tmp_path / "long.csv", "prepared": tmp_path / "run"}
    for name, text in (
        ("comparison", '[data.a]\npath = "missing.csv"\n[methods.popularity]\n'),
        ("space", '[space]\n"method.shrink" = { low = 1, high = 2 }\n'),
        ("configuration", "[run]\nrounds = 3\n"),
    ):
        names[name] = tmp_path / f"{name}.toml"
        names[name].write_text(text)
    for name, content in (("used", "notes.txt"), ("finished", "config.toml")):
        names[name] = tmp_path / name
        names[name].mkdir()
        (names[name] / content).write_text("")
    names["long"].write_text("user,item,rating\n1,2,3\n4," + "5" * 200_000 + "\n")
    output = tmp_path / "run"
    filled = [each.format(**names) for each in arguments]
    if filled[0] == "train":
        filled += ["--output", str(output), "--quiet"]
    result = runner.invoke(app, filled)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message.format(**names) in result.stderr
    assert not output.exists()


def test_a_split_in_three_files_with_any_names(ratings: Path, tmp_path: Path) -> None:
    assert runner.invoke(app, ["data", "prepare", str(ratings), "--output", str(tmp_path / "prepared")]).exit_code == 0
    files: list[str] = []
    for part in ("train", "valid", "test"):
        place = tmp_path / f"with {part}" / f"{part}-2.csv"
        place.parent.mkdir()
        (tmp_path / "prepared" / f"{part}.csv").rename(place)
        files += [f"--{part}", str(place)]
    trained = runner.invoke(app, ["train", *files, "--output", str(tmp_path / "run"), "--json", *FEW])
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["test"]["users"] == 30
    two = runner.invoke(app, ["train", *files[:2], *files[4:], "--output", str(tmp_path / "two"), "--json", *FEW])
    assert two.exit_code == 0, two.output
    some = runner.invoke(app, ["train", *files[:4], "--output", str(tmp_path / "other"), *FEW])
    assert some.exit_code == 2
    assert "needs train and test, and valid if there is one" in some.stderr


def test_missing_attributes_are_an_error_of_one_line(ratings: Path, tmp_path: Path) -> None:
    wanted = ["train", "--data", str(ratings), "--set", "model.attributes=true", "--output", str(tmp_path / "run")]
    refused = runner.invoke(app, [*wanted, *FEW])
    assert refused.exit_code == 2
    assert "user_attributes.csv" in refused.stderr
    assert not (tmp_path / "run").exists()
    rows = "\n".join(f"u{user},{20 + user},{'ab'[user % 2]}" for user in range(30))
    (tmp_path / "user_attributes.csv").write_text(f"user,age,kind\n{rows}\n")
    accepted = runner.invoke(app, [*wanted, *FEW])
    assert accepted.exit_code == 0, accepted.output


def test_80_columns_show_all_figures_and_a_pipe_gets_plain_lines(ratings: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perfedrec", "train", "--data", str(ratings), *FEW[:-1], "--rounds", "20"]
    controller, terminal = pty.openpty()
    size = struct.pack("HHHH", 40, 80, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm"}
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "a")], stdout=subprocess.DEVNULL, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # a terminal answers so when its last writer has ended
        while part := os.read(controller, 4096):
            shown += part
    os.close(controller)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    frames = [frame for frame in re.split(r"[\r\n]+", text) if "a client: " in frame or "validation " in frame]
    assert frames
    assert all(len(frame) <= 80 and "…" not in frame for frame in frames)
    assert all(re.search(r"a client: .*B up, .*B down|validation recall@20 0", frame) for frame in frames)
    assert re.search(r"loss .* validation recall@20 ", frames[-2])
    assert "a client: " in frames[-1]
    assert re.search(r"round \d+/20 .*eta", text)

    piped = subprocess.run(
        [*command, "--output", str(tmp_path / "b")], capture_output=True, text=True, check=True, env=environment
    )
    lines = piped.stderr.splitlines()
    assert lines
    assert all(re.match(r"(phase \d+/\d+ \w+|round \d+/20)  ", line) for line in lines)
    assert re.search(r"^round 20/20  loss ", lines[-1])
    assert "\x1b" not in piped.stdout + piped.stderr


@pytest.mark.parametrize("preset", ["paper", "recommended"])
@pytest.mark.parametrize("lines", ["u1,i1,3\nu2,i1,4\n", "u1,i1,3\nu1,i2,3\nu1,i3,3\nu2,i1,4\n"])
def test_data_of_two_users(preset: str, lines: str, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("user,item,rating\n" + lines)
    command = ["train", "--data", str(tmp_path / "few.csv"), "--preset", preset, "--output", str(tmp_path / "run")]
    trained = runner.invoke(app, [*command, *FEW, "--set", "clusters.start=1"])
    assert trained.exit_code == 0, trained.output
    assert runner.invoke(app, ["recommend", "--run", str(tmp_path / "run"), "--user", "u2"]).exit_code == 0


def test_runs_that_start_in_one_second_get_folders_of_their_own(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    from perfedrec.cli import training

    class Still(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2024, 5, 6, 7, 8, 9)

    monkeypatch.setattr(training, "datetime", Still)
    monkeypatch.chdir(tmp_path)
    command = ("train", "--data", ratings, "--algorithm", "popularity", "--rounds", "0", "--quiet")
    cli("train", "--data", "missing.csv", code=2)
    assert not (tmp_path / "runs").exists()
    for _ in range(2):
        cli(*command)
    cli("train", "--data", "missing.csv", code=2)  # leaves no folder
    cli(*command)
    names = ["2024-05-06-070809", "2024-05-06-070809-2", "2024-05-06-070809-3"]
    assert sorted(each.name for each in (tmp_path / "runs").iterdir()) == names
    assert all((tmp_path / "runs" / name / "result.json").exists() for name in names)


def test_a_run_that_has_played_all_its_rounds_says_so(ratings: Path, tmp_path: Path) -> None:
    again = ("train", "--resume", "--output", tmp_path / "run")
    cli("train", "--data", ratings, "--output", tmp_path / "run", *FEW)
    assert cli(*again, "--rounds", "3", "--quiet").stderr == (
        "no round was left to play; --rounds with a larger number plays more\n"
    )
    fewer = cli(*again, "--rounds", "2", code=2)
    assert fewer.stderr == (
        f"error: {tmp_path / 'run'}: 3 rounds of training have been played; expected --rounds 3 or more\n"
    )
    assert cli(*again, "--rounds", "4", "--quiet").stderr == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_with_a_closed_pipe_ends_quietly_and_can_be_resumed(stream: str, ratings: Path, tmp_path: Path) -> None:
    """stdout is closed before the final figures; stderr is closed after the first round. The pipe holds fewer lines
    than the run prints, so that the run cannot end before it is closed."""
    run, rounds = tmp_path / "run", 4000 if stream == "stderr" else 3
    command = [sys.executable, "-m", "perfedrec", "train", "--data", str(ratings), "--output", str(run), "--json"]
    command += [*FEW[2:-1], "--rounds", str(rounds), "--set", "run.evaluate_every=50"]
    reader, writer = os.pipe()
    if stream == "stdout":
        os.close(reader)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        os.close(writer)
        if stream == "stderr":
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
            with open(reader, encoding="utf-8", buffering=4096) as pipe:
                printed = pipe.readline()
        else:
            printed = process.stderr.read()
        assert process.wait() == 141
    assert all(json.loads(line)["event"] == "round" for line in printed.splitlines()), printed
    newest = max((run / "checkpoints").iterdir())
    assert (run / "result.json").exists() == (stream == "stdout")
    cli("train", "--resume", "--output", run, "--rounds", int(newest.name.removeprefix("round-")), "--quiet")
    assert (run / "result.json").exists()


def test_data_without_held_out_interactions_are_reported(tmp_path: Path) -> None:
    few, run = tmp_path / "few.csv", tmp_path / "run"
    few.write_text("user,item\n" + "".join(f"u{user},i{item}\n" for user in range(1200) for item in (0, 1 + user % 2)))
    printed = cli("train", "--data", few, "--algorithm", "popularity", "--output", run).stdout
    assert "few: 1,200 users, 3 items; interactions: 2,400 train, 0 validation, 0 test\n" in printed
    assert "no user can be evaluated: no interactions are held out for validation or test" in printed
    assert "no user was evaluated" in printed
    assert "recall@20" not in printed
    assert cli("evaluate", "--run", run).stdout == "no user was evaluated: no interactions are held out for testing\n"
    few.write_text("user,item\nu1,i1\n")
    assert (
        "few: 1 user, 1 item; interactions: 1 train, 0 validation, 0 test\n"
        in cli("train", "--data", few, "--output", run / "a", *FEW[:-1]).stdout
    )


def test_a_full_disk_is_one_line_and_other_errors_keep_their_traceback(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")

    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("perfedrec.runs.checkpoint.write_atomic", full)
    command = ["train", "--data", str(ratings), "--algorithm", "item_knn", "--quiet", "--output"]
    failed = cli(*command, tmp_path / "a", code=2)
    assert failed.stderr == "error: the disk is full\n"
    error = ConnectionResetError(errno.ECONNRESET, "reset")
    assert runner.invoke(app, [*command, str(tmp_path / "b")]).exception is error


def test_a_run_whose_data_have_moved_says_how_to_name_them(ratings: Path, tmp_path: Path) -> None:
    moved, run = tmp_path / "moved.csv", tmp_path / "run"
    cli("train", "--data", ratings, "--algorithm", "popularity", "--output", run)
    ratings.rename(moved)
    shown = cli("recommend", "--run", run, "--user", "nobody", code=2).stderr
    assert f"the data of the run {run} cannot be opened: {ratings}: no such file" in " ".join(shown.split())
    assert "name them by --data" in " ".join(shown.split())


def test_a_run_goes_on_where_its_data_have_moved(ratings: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", ("--output", tmp_path / "run", "--rounds", "2", "--quiet")
    few = ("--algorithm", "fedmf", "--set", "model.embedding_dim=4", "--rounds", "1", "--quiet")
    cli("train", "--data", ratings, "--output", run, *few)
    (tmp_path / "elsewhere").mkdir()
    moved = ratings.rename(tmp_path / "elsewhere" / ratings.name)
    said = cli("train", "--resume", *again, code=2).stderr
    assert f"{ratings.name}: no such file" in said
    assert f"if the data of the run {run} lie elsewhere now, name them by --data" in said
    lines = moved.read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text("".join(lines[:-20]))
    said = cli("train", "--resume", *again, "--data", tmp_path / "other.csv", code=2).stderr
    assert "it was made with another data set than this run's; expected that of the run" in said
    before = (run / "config.toml").read_text()
    cli("train", "--resume", *again, "--data", moved)
    assert str(ratings) in before
    assert (run / "config.toml").read_text() == before.replace(str(ratings), str(moved)).replace(
        "rounds = 1", "rounds = 2"
    )
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_option_without_effect_is_said_in_a_quiet_run_too(ratings: Path, tmp_path: Path) -> None:
    few = ("--algorithm", "fedmf", "--set", "model.embedding_dim=4", "--rounds", "0", "--quiet")
    said = cli("train", "--data", ratings, "--output", tmp_path / "run", *few, "--set", "defence.alike=0.5").stderr
    assert said == "defence.alike: without effect, because this method has no neighbourhood service\n"


def test_a_defence_is_named_with_what_a_run_guarantees(ratings: Path, tmp_path: Path) -> None:
    few = ("--algorithm", "fedmf", "--set", "model.embedding_dim=4", "--rounds", "1", "--quiet")
    for place, words in ((tmp_path / "run", ("--set", "defence.row_clip=0.3")), (tmp_path / "bare", ())):
        shown = [cli("train", "--data", ratings, "--output", place, *few, *words).stdout]
        shown += [cli("privacy", "report", place).stdout]
        named = [[line.split(None, 1) for line in each.splitlines() if line.startswith(" defence ")] for each in shown]
        assert named == [[["defence", "row_clip = 0.3"]] if words else []] * 2


def test_an_interruption_before_a_command_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    importing = ModuleType("perfedrec.cli")
    importing.__getattr__ = interrupted  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "perfedrec.cli", importing)
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")
    monkeypatch.undo()
    monkeypatch.setattr("perfedrec.cli._check_encoding", interrupted)
    stopped = runner.invoke(app, ["config", "list"])
    assert (stopped.exit_code, stopped.stderr) == (130, "error: interrupted\n")


def test_a_list_by_no_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"item": "a", "rank": 1, "score": 0.0, "local": 0.0, "global": 0.0, "moved": 0}
    print_list([row], "somebody")
    shown = " ".join(capsys.readouterr().out.split())
    assert "no model knows anything of this user's items" in shown
    assert "score =" not in shown
    del row["moved"]
    print_list([row | {"popularity": 0.5, "moved": 0}], "somebody")
    assert "the list is the same for all: the most popular" in " ".join(capsys.readouterr().out.split())
    print_list([], "ann")
    assert capsys.readouterr().out == "nothing is left to recommend to user ann, who has all items\n"


def test_places_are_compared_with_a_global_model_that_counts(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"item": "a", "rank": 1, "score": 2.0, "local": 0.5, "global": 1.5, "moved": 3}
    print_list([row], "somebody")
    shown = " ".join(capsys.readouterr().out.split())
    assert "+3" in shown
    assert "score = local + global; moved: places gained over the global model" in shown
    print_list([row | {"local": 2.0, "global": 0.0, "moved": 0}], "somebody")
    shown = " ".join(capsys.readouterr().out.split())
    assert "moved" not in shown
    assert shown.endswith("score = local")


def test_rounds_that_were_of_no_use_are_told() -> None:
    def said(best: int, played: int) -> str:
        return which_round(Summary("perfedrec_pp", 2, best, {}, {}, valid={"users": 9.0}), played)

    before = "best round by validation: phase 2 of 2 before training"
    assert said(0, 12) == f"{before}; the rounds of training did not improve on it"
    assert said(0, 2) == before
    assert said(10, 12) == "best round by validation: round 10"


@pytest.mark.parametrize("algorithm", ["mf", "fedmf"])
def test_a_model_without_a_round_is_evaluated_and_not_said_to_have_no_validation_data(
    algorithm: str, ratings: Path, tmp_path: Path
) -> None:
    own = ["train", "--data", str(ratings), "--rounds", "0", "--algorithm", algorithm, "--output", str(tmp_path / "a")]
    done = runner.invoke(app, [*own, "--quiet"])
    assert done.exit_code == 0, done.output
    assert "no round was played: the model is the one before training" in done.output
    assert "no validation data" not in done.output
    found = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (found["best_round"], found["valid"]["users"]) == (0, 30)
    again = runner.invoke(app, ["evaluate", "--run", str(tmp_path / "a"), "--part", "valid", "--json"])
    assert json.loads(again.output)["metrics"]["ndcg@20"] == pytest.approx(found["valid"]["ndcg@20"])


def test_a_folder_that_is_not_empty_is_not_changed(ratings: Path, tmp_path: Path) -> None:
    before = ratings.read_bytes()
    result = runner.invoke(app, ["train", "--data", str(ratings), "--output", str(tmp_path), *FEW])
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ratings.csv"]
    assert ratings.read_bytes() == before


def test_figures_of_sampled_negatives_are_labelled(ratings: Path, tmp_path: Path) -> None:
    """The name of the protocol is with its figures, on the terminal and in the file."""
    knn, run = ["--algorithm", "item_knn", "--set", "run.sampled_negatives=7"], tmp_path / "run"
    shown = runner.invoke(app, ["train", "--data", str(ratings), "--output", str(run), "--quiet", *knn]).stdout
    assert re.search(r"test, 7 sampled\b", shown)
    assert "columns with sampled negatives rank each held-out item among these" in " ".join(shown.split())
    summary = json.loads((run / "result.json").read_text())
    assert summary["protocols"] == {"test": "full ranking", "test_sampled": "7 sampled negatives"}
    assert summary["test_sampled"]["recall@10"] > summary["test"]["recall@10"]  # which is why they are labelled


def test_ids_that_look_like_markup_are_printed_unchanged(ratings: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd [b].csv"
    odd.write_text(ratings.read_text().replace(",i", ",[/i]:ring:").replace("\nu", "\n[red]u"))
    run = tmp_path / "run [i]"
    trained = cli("train", "--data", odd, "--output", run, "--algorithm", "item_knn").stdout
    assert "odd [b]: 30 users" in trained
    assert str(run) in trained
    shown = cli("recommend", "--run", run, "--user", "[red]u3", "--k", "4").stdout
    assert "for user [red]u3" in shown
    assert shown.count("[/i]:ring:") == 4


def test_data_replaces_a_split_of_the_configuration(ratings: Path, tmp_path: Path) -> None:
    few, file = tmp_path / "few.csv", tmp_path / "run.toml"
    few.write_text("user,item\n" + "".join(f"u{user},i{item}\n" for user in range(5) for item in range(4)))
    file.write_text(f'[data]\ntrain = "{ratings}"\nvalid = "{ratings}"\ntest = "{ratings}"\n')
    knn = ["--algorithm", "item_knn", "--quiet", "--json"]
    cli("train", "--config", file, "--data", few, "--output", tmp_path / "run", *knn)
    assert json.loads((tmp_path / "run" / "diagnostics.json").read_text())["data"]["users"] == 5


def test_data_info_and_prepare(ratings: Path, tmp_path: Path) -> None:
    facts = json.loads(runner.invoke(app, ["data", "info", str(ratings), "--json"]).stdout)
    assert (facts["users"], facts["interactions"] + facts["duplicates"]) == (30, 30 * 8)
    ratings.write_text(ratings.read_text() + "u0,i0,5,1001\n")  # which u0 already had
    again = json.loads(cli("data", "info", ratings, "--json").stdout)
    assert again["read"].pop("rows") == facts["read"].pop("rows") + 1 == 30 * 8 + 1
    assert again["read"].pop("ratings")["max"] == facts["read"].pop("ratings")["max"]
    assert again == facts | {"duplicates": facts["duplicates"] + 1}
    said = f"{again['duplicates']} rows repeat a pair of user and item (duplicates): a pair is one interaction, the"
    assert said in cli("data", "info", ratings).stdout
    assert "training part" in cli("data", "info", "synthetic").stdout
    folder = tmp_path / "prepared"
    assert runner.invoke(app, ["data", "prepare", str(ratings), "--output", str(folder)]).exit_code == 0
    assert runner.invoke(app, ["train", "--data", str(folder), "--output", str(tmp_path / "r"), *FEW]).exit_code == 0


def test_columns_with_unusual_names(ratings: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.csv"
    odd.write_text(ratings.read_text().replace("user,item,rating,timestamp", "buyer,thing,stars,when"))
    asked = runner.invoke(app, ["data", "info", str(odd)])
    assert asked.exit_code == 2
    assert "buyer, thing, stars, when" in asked.stderr
    assert "columns" in asked.stderr
    named = ["--columns", "user=buyer, item=2, rating=stars, timestamp=when"]
    expected = json.loads(runner.invoke(app, ["data", "info", str(ratings), "--json"]).stdout)
    found = json.loads(runner.invoke(app, ["data", "info", str(odd), "--json", *named]).stdout)
    assert found["read"].pop("columns")["user"] == {"position": 1, "name": "buyer"}
    assert expected["read"].pop("columns")["user"] == {"position": 1, "name": "user"}
    assert found == expected
    trained = runner.invoke(app, ["train", "--data", str(odd), *named, "--output", str(tmp_path / "r"), *FEW])
    assert trained.exit_code == 0, trained.output
    assert runner.invoke(app, ["evaluate", "--run", str(tmp_path / "r")]).exit_code == 0
    for wrong in ("buyer", "user=", "usr=buyer", "user=nobody"):
        refused = runner.invoke(app, ["data", "info", str(odd), "--columns", wrong])
        assert refused.exit_code == 2, wrong
        assert refused.stderr.count("\n") == 1


def test_config_commands(tmp_path: Path) -> None:
    shown = runner.invoke(app, ["config", "show", "paper"])
    file = tmp_path / "paper.toml"
    file.write_text(shown.stdout)
    assert runner.invoke(app, ["config", "show", str(file)]).stdout == shown.stdout
    assert "clusters" in runner.invoke(app, ["config", "list"]).stdout
    keys = json.loads(cli("config", "keys", "--json").stdout)
    assert keys["privacy.clip"]["default"] is None
    assert keys["run.rounds"]["default"] == resolve().run.rounds
    listed = json.loads(cli("config", "list", "--json").stdout)
    assert set(listed["without"]) == set(ABLATIONS)
    assert runner.invoke(app, ["--version"]).stdout.strip()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("what", ["list", "keys"])
def test_names_of_options_are_whole_on_80_columns_and_in_a_pipe(
    what: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are whole, too: ``off`` where there is none. In a pipe each option is one line."""
    monkeypatch.setattr(config_commands, "console", Console(width=80, force_terminal=True) if terminal else console)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", cli("config", what).stdout)
    if terminal:
        assert max(map(len, printed.splitlines())) <= 80
    config = resolve()
    lines = {words[0]: line for line in printed.splitlines() if (words := line.split())}
    for key, field in keys(type(config)).items() if what == "keys" else ():
        assert key in lines
        if not terminal:
            assert lines[key].split("  ", 1)[1].strip().endswith(str(field.description))
    for part, changes in ABLATIONS.items() if what == "list" else ():
        assert part in lines
        assert all(f"{key}=" in printed for key in changes)
    if what == "keys":
        assert re.search(r"^ privacy\.clip +off ", printed, re.MULTILINE)
        assert "None" not in printed


def cli(*arguments: object, code: int = 0) -> Any:
    result = runner.invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_privacy_report_of_a_centralised_run_has_no_table_of_releases(tmp_path: Path) -> None:
    cli("train", "--data", "synthetic:users=100,items=250", "--algorithm", "popularity", "--output", tmp_path / "a")
    shown = cli("privacy", "report", tmp_path / "a").stdout
    assert "a centralised method has everybody's interactions in one place" in " ".join(shown.split())
    assert "participations" not in shown


def test_one_list_is_not_written_to_a_file(tmp_path: Path) -> None:
    done = cli("recommend", "--run", tmp_path, "--user", "u3", "--output", tmp_path / "l.csv", code=2)
    assert "--output goes with --all-users" in done.stderr


def test_names_of_attacks_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    from perfedrec.audit.attacks import Finding
    from perfedrec.audit.audit import Audit
    from perfedrec.cli.privacy import print_audit

    name = "differences between the sums of 60 rounds of training"
    found = [Finding(name, "AUC", 0.3, 0.1, None, 60, 1), Finding(name, "precision at |I_u|", 0.25, 0.1, 0.2, 6, -1)]
    print_audit(Audit(found, [], []))
    assert capsys.readouterr().out.splitlines()[:4] == [
        "  figure              round  reached  guessing  popularity  cases",
        name,
        "  AUC                 1      0.300    0.100     -           60",
        "  precision at |I_u|  pre    0.250    0.100     0.200       6",
    ]


def test_privacy_from_plan_to_audit(tmp_path: Path) -> None:
    plan = cli("privacy", "plan", "--epsilon", "8", "--users", "5224", "--rounds", "200", "--json")
    found = json.loads(plan.stdout)
    assert found["pretraining"]["multipliers"]["spectral"] == pytest.approx(0.6003 * (6 / 0.8) ** 0.5, abs=0.01)
    assert found["training"]["cap"] == 10
    assert found["training"]["coordinator"] == pytest.approx(0.6003 * 10**0.5, abs=0.01)
    assert found["training"]["recipients"] < 1 < found["training"]["coordinator"]
    few = cli("privacy", "plan", "--epsilon", "8", "--users", "80", "--rounds", "5", "--json")  # all 80 in each round
    assert json.loads(few.stdout)["training"]["rate"] == 1.0
    assert json.loads(few.stdout)["training"]["cap"] == 5
    trained = cli(
        "train", "--data", "synthetic:users=100,items=250", "--privacy", "private", "--output", tmp_path / "a"
    )
    assert "epsilon 8 at delta 1e-05" in " ".join(trained.stdout.split())
    assert "100 users are few for epsilon 8" in " ".join(trained.stdout.split())
    block = json.loads(cli("privacy", "report", tmp_path / "a", "--json").stdout)
    assert block["audit"] == "none so far"
    assert "within" in cli("audit", tmp_path / "a").stdout
    assert "of 8.00" in json.loads(cli("privacy", "report", tmp_path / "a", "--json").stdout)["audit"]
    assert "spectral" in cli("privacy", "report", tmp_path / "a").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("privacy", "plan", "--epsilon", "0", "--users", "10"), "--epsilon is 0; expected more than 0"),
        (
            ("privacy", "plan", "--epsilon", "1", "--users", "10", "--rounds", "5", "--cohort", "11"),
            "a cohort of 11 is",
        ),
        (("privacy", "plan", "--epsilon", "1", "--users", "10", "--cap", "0"), "--cap is 0; expected more than 0"),
        (("privacy", "plan", "--epsilon", "nan", "--users", "10"), "--epsilon is nan; expected more than 0"),
        (("privacy", "plan", "--epsilon", "1", "--users", "10", "--rounds", "-1"), "--rounds is -1"),
        (("privacy", "report", "nowhere"), "there is no such folder"),
        (("audit", "nowhere"), "there is no such folder"),
        (("train", "--privacy", "privat"), "did you mean private?"),
    ],
)
def test_errors_of_privacy_commands_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    failed = cli(*arguments, code=2)
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("delta", ["1e-15", "1e-20", "1e-300"])
def test_a_plan_for_a_small_delta_is_sensible(delta: str) -> None:
    plan = cli("privacy", "plan", "--epsilon", "8", "--users", "50000", "--rounds", "200", "--delta", delta, "--json")
    found = json.loads(plan.stdout)["training"]
    assert plan.stderr == ""
    assert 0.6 < found["recipients"] < found["coordinator"] < 7


def test_a_plan_warns_of_a_delta_that_permits_disclosing_one_user() -> None:
    plan = ("privacy", "plan", "--epsilon", "8", "--users", "500", "--delta")
    assert "delta 0.1 is above 1 / 500 users" in cli(*plan, "0.1").stderr
    assert cli(*plan, "0.0019").stderr == ""


def test_a_missing_neighbourhood_service_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    dealt, keys = tmp_path / "dealt", tmp_path / "keys"
    assert "none to the coordinator" in cli("federation", "bundles", dealt, "--node", "n0").stdout
    cli("federation", "certificates", tmp_path / "certificates")
    cli("federation", "key", keys / "n0")
    (tmp_path / "items.txt").write_text("a\nb\n")
    serve = ("serve", "--output", tmp_path / "run", "--catalogue", tmp_path / "items.txt", "--nodes", keys)
    for arguments, message in (
        (("federation", "bundles", dealt, "--node", "n0"), "n0 is taken already"),
        (
            ("service", "run", "--state", keys, "--coordinator", "h:1", "--ca", "c", "--key", "k"),
            "expected the keys of",
        ),
        (
            (*serve, "--certificates", tmp_path / "certificates", "--privacy", "none"),
            "and none is registered; expected its public key",
        ),
    ):
        failed = cli(*arguments, code=2)
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_renewed_certificate_has_the_same_names_and_the_same_authority(tmp_path: Path) -> None:
    def names(folder: Path) -> list[str]:
        found = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes()).extensions
        return [str(each.value) for each in found.get_extension_for_class(x509.SubjectAlternativeName).value]

    certs = tmp_path / "certs"
    cli("federation", "certificates", tmp_path / "other")
    assert names(tmp_path / "other") == ["localhost", "127.0.0.1", "::1"]
    cli("federation", "certificates", certs, "--name", "fed.example.org", "--name", "10.0.0.7")
    authority, first = (certs / "ca.crt").read_bytes(), (certs / "server.pem").read_bytes()
    cli("federation", "certificates", certs)
    assert names(certs) == ["fed.example.org", "10.0.0.7"]
    assert (certs / "ca.crt").read_bytes() == authority
    assert (certs / "server.pem").read_bytes() != first
    cli("federation", "certificates", certs, "--name", "::1")
    assert names(certs) == ["::1"]


def test_an_interrupted_coordinator_prints_the_command_that_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command resumes with the same files, rounds and terms. A first and a second SIGINT differ in one word."""
    from perfedrec.federation import coordinator
    from perfedrec.federation.admission import Limits
    from perfedrec.runs.folder import RunFolder
    from perfedrec.runs.signals import InterruptedRunError

    seen, ends = list[Any](), [InterruptedRunError("stopped after round 4", 15), KeyboardInterrupt()]

    def stopped(given: coordinator.Deployment, *_: Any) -> None:
        about = (given.config.run.rounds, given.output, given.certificates, given.keys, given.terms, given.limits)
        seen.append(about)
        given.output.mkdir(exist_ok=True)
        RunFolder(given.output).write_settings(given.config)
        assert given.resume is (len(seen) > 1)
        raise ends[len(seen) - 1]

    monkeypatch.setattr(coordinator, "serve", stopped)
    (tmp_path / "items.txt").write_text("a\nb\n")
    files = ("--output", tmp_path / "a run", "--catalogue", tmp_path / "items.txt", "--nodes", tmp_path / "keys")
    terms = ("--certificates", tmp_path / "certs", "--rounds", "7", "--min-nodes", "4", "--enough", "0.5")
    limits = (
        "--max-users",
        "9",
        "--max-growth",
        "2.5",
        "--quarantine",
        "3",
        "--max-joins",
        "4",
        "--max-requests",
        "50",
    )
    terms += (*limits, "--max-megabytes", "60")
    first = cli("serve", *files, *terms, "--privacy", "none", "--set", "model.embedding_dim=8", code=143)
    message, _, command = first.stderr.strip().partition("; resume with perfedrec ")
    assert message == "error: stopped after round 4"
    second = cli(*shlex.split(command), code=130)
    assert second.stderr.strip() == f"error: interrupted; resume with perfedrec {command}"
    assert seen[0] == seen[1]
    assert (seen[0][0], seen[0][4].min_nodes, seen[0][4].enough) == (7, 4, 0.5)
    assert seen[0][5] == Limits(9, 2.5, 3, 4, 50, 60)


def test_real_nodes_get_profile_secure_unless_an_option_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[privacy]\nclip = 0.5\n")
    cases: list[tuple[list[Any], str]] = [
        ([], "secure"),
        (["--preset", "paper"], "secure"),  # whose own mechanisms are weaker
        (["--privacy", "paper"], "sparse"),
        (["--privacy", "none"], "sparse"),
        (["--config", file], "sparse"),
    ]
    for options, aggregation in cases:
        found = _asked(options)
        assert found.privacy.aggregation == aggregation, options
        assert (found.privacy.clip is None) == ("none" in options)


def _asked(options: list[Any]) -> Any:
    """The configuration that serve sends to nodes."""
    from perfedrec.cli.federation import _resolved

    named = dict(zip(options[::2], options[1::2], strict=True))
    values = named.get("--preset"), named.get("--config"), [], named.get("--privacy"), None
    return _resolved(Path("nowhere"), False, *values)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("up", ("--preset", "gpfedrec"), "gpfedrec compares users by their uploads; expected privacy.aggregation"),
        ("up", ("--preset", "gpfedrec"), "expected profile none or paper, or a method that secure fits: fedmf"),
        (
            "up",
            ("--preset", "fedmf", "--privacy", "private"),
            "does not fit fedmf: the profile sets model.encoder, which",
        ),
        (
            "node",
            ("--require", "secur"),
            "there is no privacy profile 'secur'; expected one of: none, paper, private, secure; did you mean secure?",
        ),
        ("up", ("--users", "20"), "there are 20 users, and no sum of fewer than 32 is opened"),
        ("up", ("--nodes", "2", "--resume"), "--resume continues with the nodes and users in --output"),
        ("up", ("--no-header", "--resume"), "--resume continues with the nodes and users in --output"),
        ("up", ("--data", "d.csv", "--columns", "user=a,thing=b"), "thing"),
        ("node", ("--coordinator", "host"), "--coordinator host: has no port; expected HOST:PORT, as in host:18000"),
        ("node", ("--threads", "0"), "--threads 0: expected at least 1"),
        ("serve", ("--port", "99999"), "port is 99999; expected 1 to 65535"),
        ("serve", ("--min-users", "0"), "min_users is 0; expected at least 1"),
        ("serve", ("--max-users", "0"), "max_users is 0; expected at least 1"),
        ("serve", ("--enough", "2"), "enough is 2.0; expected more than 0 and at most 1"),
        ("up", ("--deadline", "0"), "deadline is 0.0; expected more than 0 seconds"),
        ("up", ("--nodes", "1"), "a secure sum needs more than one node; expected 3 or more"),
        ("up", ("--nodes", "0"), "0 is not in the range x>=1"),
        (
            "node",
            ("--coordinator", "https://h:1"),
            "needs no https:// because TLS is always used; expected HOST:PORT, as in h:1",
        ),
        ("serve", ("--host", "https://h:1"), "expected a name or an IP address and nothing else, as in h"),
        ("serve", ("--resume",), "needs the extra opendp"),
        ("up", ("--resume",), "needs the extra opendp"),
        ("up", ("--privacy", "private"), "needs the extra opendp"),
        ("up", ("--privacy", "private", "--set", "privacy.noise_source=opendp"), "needs the extra opendp"),
    ],
)
def test_an_impossible_federation_is_an_error_before_anything_starts(
    command: str, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perfedrec.runs.config import load

    run, files = tmp_path / "run", ("--catalogue", "c", "--certificates", "c", "--nodes", "k")
    if "opendp" in message:
        monkeypatch.setitem(sys.modules, "opendp", None)
    if "--resume" in options:
        run.mkdir()
        kept = load("recommended", None, ["privacy.noise_source=opendp"], privacy="private")
        (run / "config.toml").write_text(kept.to_toml())
    arguments: dict[str, tuple[Any, ...]] = {
        "up": ("federation", "up", "--output", tmp_path),
        "serve": ("serve", "--output", run, *files),
        "node": ("node", "run", "--store", "s", "--coordinator", "h:1", "--ca", "c", "--key", "k"),
    }
    failed = cli(*arguments[command], *options, code=2)
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == ([run] if "--resume" in options else [])


def test_a_federation_too_large_for_this_machine_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    from perfedrec.federation import sizing

    monkeypatch.setattr(sizing, "memory", lambda: 10_000_000)  # 490 of the 500 items occur in training
    failed = cli("federation", "up", "--output", tmp_path / "up", code=2)
    assert "4 nodes with 490 items of 64 dimensions need about 23.5 MB" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_flower_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, one_line():
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr.common")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == f"error: {MissingExtraError('this command', 'flower')}\n"
    with pytest.raises(ModuleNotFoundError), one_line():
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")


def test_a_pipe_gets_no_spaces_at_the_ends_of_lines() -> None:
    assert not [line for line in cli("config", "list").stdout.splitlines() if line != line.rstrip()]


def test_a_printed_command_can_be_typed_where_it_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / ".venv" / "bin" / "perfedrec"
    script.parent.mkdir(parents=True)
    script.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert command("train", "--data", "a b.csv") == ".venv/bin/perfedrec train --data 'a b.csv'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert command("train") == "perfedrec train"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "perfedrec").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'other'}:{script.parent}")
    assert command("train") == ".venv/bin/perfedrec train"
    monkeypatch.setattr(sys, "argv", ["/lib/perfedrec/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert command("train") == "./python -m perfedrec train"


def test_data_info_tells_how_a_file_is_read(ratings: Path, tmp_path: Path) -> None:
    shown = cli("data", "info", ratings).stdout
    assert 'read as csv: user = column 1 "user", item = column 2 "item", rating = column 3 "rating", time = ' in shown
    assert "240 rows" in shown
    assert "--min-rating 4 leaves these out" in shown
    left = json.loads(cli("data", "info", ratings, "--min-rating", "4", "--json").stdout)
    assert left["interactions"] + left["duplicates"] == 30 * 5
    assert left["read"]["rows"] == 240
    assert left["equal_times"] == {"users": 30, "last": 0, "last_two": 0}
    prepared = cli("data", "prepare", ratings, "--output", tmp_path / "prepared").stdout
    assert "read as csv: user = column 1" in prepared


def test_a_header_is_an_option(tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("".join(f"ann{i},{name}\n" for i, name in enumerate(["abba", "queen", "abba"])))
    count = {
        flag: json.loads(cli("data", "info", names, "--json", *flag).stdout)["users"] for flag in [(), ("--no-header",)]
    }
    assert count == {(): 3, ("--no-header",): 3}
    knn = ["--algorithm", "item_knn", "--quiet", "--json", "--columns", "user=1,item=2"]
    for flag, users in (("--header", 2), ("--no-header", 3)):
        run = tmp_path / flag
        cli("train", "--data", names, flag, "--output", run, *knn)
        assert json.loads((run / "diagnostics.json").read_text())["data"]["users"] == users


def test_relations_are_given_beside_the_data_and_patience_says_that_it_ended_the_run(tmp_path: Path) -> None:
    table, friends = tmp_path / "table.csv", tmp_path / "friends.csv"
    table.write_text("user,item\n" + "".join(f"u{u},i{(3 * u + 5 * i) % 17}\n" for u in range(12) for i in range(6)))
    friends.write_text("".join(f"u{u},u{(u + 1) % 12}\n" for u in range(12)))
    options = ("--algorithm", "mhcn", "--rounds", "40", "--set", "run.patience=1", "--set", "run.evaluate_every=1")
    said = cli("train", "--data", table, "--relations", friends, *options, "--output", tmp_path / "run").stdout
    played = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert played < 40
    assert f"ended after {played} of 40 rounds (run.patience = 1)" in said
    assert f'relations = "{friends}"' in (tmp_path / "run" / "config.toml").read_text()


def test_users_who_have_every_item_are_nothing_to_learn_from(tmp_path: Path) -> None:
    full = tmp_path / "full.csv"
    full.write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(1, 5) for i in (1, 2)))
    refused = cli("train", "--data", full, "--algorithm", "mf", "--output", tmp_path / "run", code=2)
    assert "full: there is nothing to learn from: every user has every item" in refused.stderr
