"""Comparisons: the file, real runs in separate processes, interruption, and the figures against those of the runs."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from perfedrec import train
from perfedrec.cli import app
from perfedrec.cli import bench as commands
from perfedrec.compare import tables
from perfedrec.compare.bench import Target, read
from perfedrec.compare.cells import locked
from perfedrec.compare.remaining import Remaining
from perfedrec.compare.results import reached, spread
from perfedrec.core.errors import ConfigError
from perfedrec.core.types import RoundReport
from perfedrec.methods.registry import METHODS, centralised, seedless
from perfedrec.runs.config import DataSettings, open_data, resolve
from perfedrec.runs.engine import engine
from perfedrec.runs.folder import Entry
from perfedrec.runs.preset_files import ABLATIONS

runner = CliRunner()
READY = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.toml"))
TOY = """
seeds = [0, 3]
metric = "recall@20"
reference = "popularity"
[data.toy]
path = "synthetic:users=120,items=200"
[methods.popularity]
[methods.fedmf]
set = ["run.rounds=3", "selection.n_clients_per_round=40", "model.embedding_dim=8", "run.sampled_negatives=99"]
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "bench.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_a_file_of_the_package_can_be_read(file: Path, tmp_path: Path) -> None:
    bench = read(file, tmp_path / "out")
    configs = {config.model_dump_json() for config in bench.configs.values()}
    assert len(configs) == len(bench.configs) > 1, "two methods of the file are the same"
    assert not (tmp_path / "out").exists()


def test_the_files_of_the_package_compare_all_methods_and_switch_off_every_part() -> None:
    files = {file.stem: read(file, Path("out")) for file in READY}
    ordered = {name for name, kind in METHODS.items() if centralised(kind) and kind.sequential}  # Yelp has no order
    social = {name for name, kind in METHODS.items() if centralised(kind) and kind.social}  # nor relations
    assert {config.algorithm for config in files["comparison"].configs.values()} == set(METHODS) - ordered - social
    assert ordered < {config.algorithm for config in files["sequences"].configs.values()}
    off = {f"without {part}" for part in ABLATIONS}
    parts = set(files["ablation"].labels) | set(files["ablation-paper"].labels)
    assert parts - off == {"perfedrec_pp", "perfedrec_pp paper"}
    assert off < parts
    kinds = {label: config.settings.privacy for (label, _), config in files["noise"].configs.items()}
    assert len({each.model_dump_json() for each in kinds.values()}) == 1
    assert kinds["perfedrec_pp"].noise_scale == 0.1
    sweep = {
        label: config.selection.n_clients_per_round for (label, _), config in files["sweep-clients"].configs.items()
    }
    assert sweep["perfedrec_pp n_clients_per_round=32"] == 32
    assert len(sweep) == 15


def test_options_of_a_method_override_common_options(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('algorithm = "lightgcn"\n[method]\nembedding_dim = 5\n')
    text = """
    seeds = [4, 2]
    [data.a]
    path = "synthetic:users=120,items=200"
    [common]
    privacy = "paper"
    set = ["run.rounds=9"]
    [methods.fedmf]
    [methods.mine]
    algorithm = "perfedrec_pp"
    preset = "paper"
    privacy = "secure"
    without = ["pretraining"]
    set = ["run.rounds=7"]
    [methods.own]
    config = "mine.toml"
    """
    with pytest.raises(ConfigError, match=r"methods\.own: .*privacy"):  # a centralised method has no such part
        read(written(tmp_path, text), tmp_path / "out")
    bench = read(written(tmp_path, text.replace('privacy = "paper"\n', "", 1)), tmp_path / "out")
    mine = resolve(
        "paper", None, ["run.threads=1", "run.rounds=7"], ["pretraining"], privacy="secure", algorithm="perfedrec_pp"
    )
    assert bench.configs["mine", "a"].settings == mine.settings
    assert (bench.configs["mine", "a"].run.rounds, bench.configs["fedmf", "a"].run.rounds) == (7, 9)
    own = bench.configs["own", "a"]
    assert (own.algorithm, own.settings.embedding_dim, own.settings.learning_rate) == ("lightgcn", 5, 0.005)
    assert [(cell.label, cell.seed, cell.config.run.seed) for cell in bench.cells()] == [
        (label, seed, seed) for seed in (4, 2) for label in ("fedmf", "mine", "own")
    ]


def test_all_methods_have_the_lengths_of_lists_that_the_comparison_needs(tmp_path: Path) -> None:
    text = TOY.replace('metric = "recall@20"', 'metric = "ndcg@5"')
    bench = read(written(tmp_path, text), tmp_path / "out")
    assert {config.run.ks for config in bench.configs.values()} == {(5, 10, 20)}
    bench = read(written(tmp_path, "ks = [3]\n" + text), tmp_path / "out")
    assert {config.run.ks for config in bench.configs.values()} == {(3, 5)}
    assert bench.cutoffs == (3, 5, 20)  # the best round is selected by recall@20
    bench = read(written(tmp_path, text), tmp_path / "out", ks=(30,))
    assert bench.cutoffs == (5, 20, 30)
    plain = read(written(tmp_path, TOY), tmp_path / "out")
    assert {config.run.ks for config in plain.configs.values()} == {(10, 20)}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds", "seed", "did you mean seeds"),
        ("seeds = [0, 3]", "seeds = []", "seeds: expected whole numbers from 0, each once"),
        ("seeds = [0, 3]", "seeds = [3, 3]", "seeds: expected whole numbers from 0, each once (given: [3, 3])"),
        ("seeds = [0, 3]", "seeds = [0, -3]", "seeds: expected whole numbers from 0, each once"),
        ('"popularity"', '"popularty"', "did you mean popularity"),
        (
            "recall@20",
            "recal@7",
            "metric: expected one of recall, ndcg, hr, mrr, precision with the length of the list",
        ),
        ("methods.fedmf", "methods.fedmx", "did you mean fedmf"),
        ("run.rounds=3", "run.round=3", "did you mean run.rounds"),
        ("run.rounds=3", "data.k_core=3", "[data.NAME]"),
        ("methods.fedmf", 'methods."../fedmf"', "folder"),
        ("synthetic:users=120", "syntetic:users=120", "error: data.toy: syntetic"),
        ("[data.toy]", "[data.toy", "not valid TOML"),
        ("path =", "pth =", "there is no option data.toy.pth; did you mean data.toy.path?\n"),
        ("set =", "sets =", "there is no option methods.fedmf.sets; did you mean methods.fedmf.set?\n"),
        ("set =", "quickly =", "there is no option methods.fedmf.quickly\n"),
        ("seeds = [0, 3]", "seeds = [0.5]", "seeds.0: expected a whole number (given: 0.5)"),
        ("[data.toy]", "[target]\nmetrc = 'x'\nvalue = 1\n[data.toy]", "did you mean target.metric?"),
        (
            "[methods.popularity]",
            '[sweep]\nkey = "run.rounds"\nvalues = [1]\nmethods = ["x"]\n[methods.popularity]',
            "'x'",
        ),
    ],
)
def test_an_error_in_the_file_is_one_line_and_nothing_is_started(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    assert before in TOY
    file, output = written(tmp_path, TOY.replace(before, after, 1)), tmp_path / "out"
    result = runner.invoke(app, ["bench", str(file), "--output", str(output)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not output.exists()


def test_a_path_that_is_given_without_the_name_of_its_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data set 'x/y'; expected one of: toy, or NAME=PATH with one of these"):
        read(written(tmp_path, TOY), tmp_path / "out", moved={"x/y": None})


def bench(file: Path, output: Path, *more: str) -> Any:
    return runner.invoke(app, ["bench", str(file), "--output", str(output), "--processes", "2", "--json", *more])


@pytest.mark.parametrize(
    ("method", "needs"), [("sept", "relations between users"), ("sasrec", "the order of a user's")]
)
def test_a_method_that_cannot_learn_from_the_data_is_refused_before_anything_is_trained(
    method: str, needs: str, tmp_path: Path
) -> None:
    data = tmp_path / "ratings.csv"
    data.write_text(
        "user,item\n" + "".join(f"u{user},i{item}\n" for user in range(9) for item in range(user, user + 6))
    )
    file = written(tmp_path, f'[data.own]\npath = "{data}"\n[methods.popularity]\n[methods.{method}]\n')
    refused = bench(file, tmp_path / "out")
    assert refused.exit_code == 2
    assert f"methods.{method}, data.own: ratings: " in refused.stderr
    assert needs in refused.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("config.toml"))


def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from perfedrec.methods.centralised.popularity import Popularity\n\n\n"
        "class Broken(Popularity):\n    def init(self, data, key):\n        raise ZeroDivisionError('on purpose')\n"
    )
    more = f'[methods.broken]\nalgorithm = "{broken}:Broken"\nset = ["run.rounds=0"]\n'
    output = tmp_path / "out"
    failed = bench(written(tmp_path, TOY + more), output)
    assert failed.exit_code == 1
    assert "2 of 5 runs failed" in failed.stderr
    told, start = (json.loads(line) for line in failed.stderr.splitlines()[:2])
    assert (told["event"], told["data"], told["notes"][0]) == ("data", "toy", "split: leave-one-out by time")
    assert start == {"event": "start", "runs": 5, "finished": 0, "output": str(output)}
    assert "on purpose" in failed.stderr
    results = json.loads(failed.stdout)
    assert {each["label"] for each in results["cells"] if each["error"]} == {"broken"}
    assert [each["missing"] for each in results["summary"]] == [0, 0, 2]

    kept = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/toy/seed-*/result.json")}
    again = bench(written(tmp_path, TOY), output)
    assert again.exit_code == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    results = json.loads((output / "results.json").read_text())
    assert results == json.loads(again.stdout)

    runs = {seed: output / "runs" / "fedmf" / "toy" / f"seed-{seed}" for seed in (0, 3)}
    recall = {
        seed: json.loads((folder / "result.json").read_text())["test"]["recall@20"] for seed, folder in runs.items()
    }
    line = next(each for each in results["summary"] if each["label"] == "fedmf")
    assert line["test"]["recall@20"]["mean"] == pytest.approx((recall[0] + recall[3]) / 2)
    assert line["test"]["recall@20"]["sd"] == pytest.approx(abs(recall[0] - recall[3]) / 2**0.5)
    assert line["protocol_sampled"] == "99 sampled negatives"
    assert line["parameters"]["server"] >= 8 * results["data"]["toy"]["items"]
    popular = output / "runs" / "popularity" / "toy" / "seed-0" / "test_users.parquet"
    floor = float(pl.read_parquet(popular)["recall@20"].mean())  # type: ignore[arg-type]
    assert line["comparison"]["difference"] == pytest.approx(line["test"]["recall@20"]["mean"] - floor)
    assert line["comparison"]["low"] < line["comparison"]["difference"] < line["comparison"]["high"]
    assert line["cpu_seconds"]["mean"] > 0
    assert results["data"]["toy"]["popularity"]["recall@20"] == pytest.approx(floor)

    assert [each["label"] for each in results["cells"]].count("popularity") == 1  # which takes no seed
    assert [(each["n"], each["seedless"]) for each in results["summary"]] == [(1, True), (2, False)]
    assert "takes no seed" in (output / "table.md").read_text()

    figure = f"{line['test']['recall@20']['mean']:.4f} ± {line['test']['recall@20']['sd']:.4f}"
    assert figure in (output / "table.md").read_text()
    assert "recall@20, full ranking | ndcg@20" in (output / "table.md").read_text()
    assert "hr@10, 99 sampled negatives" in (output / "table.md").read_text()
    assert "FedMF & " in (output / "table.tex").read_text()
    rows = {row["label"]: row for row in csv.DictReader((output / "table.csv").open())}
    assert float(rows["fedmf"]["test.recall@20.mean"]) == line["test"]["recall@20"]["mean"]
    assert "comparison" not in rows["fedmf"]  # each of its figures has a column

    with locked(output):
        second = bench(written(tmp_path, TOY), output)
    assert (second.exit_code, second.stderr.count("\n")) == (2, 1)
    assert "another perfedrec bench" in second.stderr

    changed = bench(written(tmp_path, TOY.replace("embedding_dim=8", "embedding_dim=9")), output)
    assert changed.exit_code == 2
    assert "model.embedding_dim is 9, was 8" in changed.stderr
    other = bench(written(tmp_path, TOY), output, "--data", "toy=synthetic:users=130,items=200")
    assert other.exit_code == 2
    assert "the data toy have changed" in other.stderr
    assert other.stderr.count("\n") == changed.stderr.count("\n") == 1


STOPPED = """
import os, pathlib, signal, time
from perfedrec.methods.federated.fedmf import FedMF

class Stopped(FedMF):
    def plan(self, state, key):
        flag, told = pathlib.Path(__file__).with_suffix(".flag"), []
        if state.round == 30 and not flag.exists():
            flag.touch()
            stop = signal.signal(signal.SIGTERM, lambda *given: (told.append(given), stop(*given)))
            os.killpg(os.getpgid(os.getppid()), signal.SIGINT)  # as a terminal does on Ctrl-C
            while not told:
                time.sleep(0.01)
        return super().plan(state, key)
"""


def test_ctrl_c_stops_all_runs_with_a_checkpoint_and_the_same_command_continues(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    text = TOY.replace("run.rounds=3", "run.rounds=60").replace("[0, 3]", "[3]")
    text = text.replace("[methods.popularity]\n", "").replace('reference = "popularity"\n', "")
    text = text.replace("[methods.fedmf]\n", f"[methods.fedmf]\nalgorithm = '{tmp_path / 'stopped.py'}:Stopped'\n")
    text = text.replace('set = ["', 'set = ["run.checkpoint_every=20", "run.evaluate_every=20", "')
    file, output = written(tmp_path, text), tmp_path / "out"
    command = [sys.executable, "-m", "perfedrec", "bench", str(file), "--output", str(output), "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=0)
    _, printed = process.communicate()
    assert process.returncode == 130, printed
    assert printed.splitlines()[0] == f"1 run in {output}, 0 finished already"
    assert "run the same command again to continue" in printed.splitlines()[-1]
    (folder,) = output.glob("runs/fedmf/toy/seed-*")
    assert not (folder / "result.json").exists()
    assert not (output / "results.json").exists()
    played = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(played) == 31
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert (lines[:31], len(lines)) == (played, 60)
    assert json.loads((folder / "cost.json").read_text())["seconds"] > 0


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (120, ["method", "recall@20", "ndcg@20", "difference", "adj. p", "95 % interval", "seconds"]),
        (80, ["method", "recall@20", "ndcg@20", "difference", "adj. p"]),
        (40, ["method", "recall@20"]),
    ],
)
def test_a_terminal_shows_only_columns_that_fit_and_breaks_no_line(
    width: int, heads: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(label: str, comparison: dict[str, float] | None) -> dict[str, Any]:
        test = {name: {"mean": 0.0732, "sd": 0.0018} for name in ("recall@20", "ndcg@20")}
        known = {"label": label, "data": "toy", "algorithm": "fedmf", "test": test, "comparison": comparison}
        return known | {"seconds": {"mean": 123.4, "sd": 1.0}}

    compared = {"difference": -0.0043, "low": -0.0061, "high": -0.0022, "p_adjusted": 0.0014}
    lines = [line("perfedrec_pp", None), line("perfedrec_pp paper", compared)]
    floor = {"recall@20": 0.0194, "ndcg@20": 0.0072}
    results = {"reference": "perfedrec_pp", "target": None, "metric": "ndcg@20", "protocol": "full ranking"}
    monkeypatch.setattr(commands, "console", Console(width=width))
    commands.print_results(results | {"data": {"toy": {"popularity": floor}}, "summary": lines})
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= width
    assert re.split(r"\s{2,}", printed[2].strip()) == heads
    paper = next(text for text in printed if text.startswith(" perfedrec_pp paper "))
    every = ["perfedrec_pp paper", *["0.0732 ± 0.0018"] * 2, "-0.0043", "0.0014", "-0.0061, -0.0022", "123.4"]
    assert re.split(r"\s{2,}", paper.strip()) == every[: len(heads)]


def test_only_methods_that_draw_nothing_run_once(tmp_path: Path) -> None:
    """The flag is right: another seed gives the same scores. Sampled negatives are drawn with the seed, too."""
    once = [name for name, kind in METHODS.items() if seedless(kind)]
    assert once == ["popularity", "item_knn", "user_knn", "rp3beta", "ease", "slim"]
    dataset = open_data(DataSettings(path="synthetic:users=60,items=250"))
    for name in once:
        config = resolve(algorithm=name)
        first, second = (engine(config.build(), dataset, seed=seed, device="cpu") for seed in (0, 7))
        users = torch.arange(dataset.n_users)
        assert torch.equal(first.recommender().scores(users), second.recommender().scores(users)), name

    class Own(METHODS["item_knn"]):  # type: ignore[misc]  # may draw, whatever its base says
        pass

    assert not seedless(Own)
    text = TOY.replace("[methods.popularity]", '[methods.popularity]\nset = ["run.sampled_negatives=9"]')
    for content, expected in ((TOY, [0]), (text, [0, 3])):
        cells = list(read(written(tmp_path, content), tmp_path / "out").cells())
        assert [cell.seed for cell in cells if cell.label == "popularity"] == expected
        assert [cell.seed for cell in cells if cell.label == "fedmf"] == [0, 3]


def test_a_figure_without_deviation_shows_none() -> None:
    assert tables.with_deviation({"mean": 0.25, "sd": 0.0}) == "0.2500"
    assert tables.with_deviation({"mean": 0.25, "sd": None}) == "0.2500"
    assert tables.with_deviation({"mean": 0.25, "sd": 0.01}) == "0.2500 ± 0.0100"


def test_a_comparison_without_reference_says_that_nothing_was_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = {"ndcg@20": {"mean": 0.07, "sd": 0.01}}
    lines = [{"label": label, "data": "toy", "algorithm": "mf", "test": test, "n": 1, "missing": 0} for label in "ab"]
    sizes = {"users": 1, "items": 1, "interactions": 1, "popularity": {"ndcg@20": 0.01}}
    results: Any = {"reference": None, "target": None, "metric": "ndcg@20", "protocol": "full ranking"}
    results |= {"data": {"toy": sizes}, "summary": lines, "seeds": [0]}
    note = 'No significance was tested: the file names no reference. reference = "LABEL" tests all others against it.'
    monkeypatch.setattr(commands, "console", Console(width=80))
    commands.print_results(results)
    assert capsys.readouterr().out.replace("\n", " ").count(note) == 1
    assert tables.markdown(results).count(note) == 1
    for other in (results | {"reference": "a"}, results | {"summary": lines[:1]}):
        assert note not in tables.markdown(other)


def test_the_time_that_is_left_follows_from_the_runs_so_far(tmp_path: Path) -> None:
    text = TOY.replace("[0, 3]", "[0, 1, 2, 3]").replace("[methods.popularity]\n", "[methods.mf]\n")
    cells = list(read(written(tmp_path, text.replace('reference = "popularity"\n', "")), tmp_path / "out").cells())
    mf, fedmf = ([cell for cell in cells if cell.label == label] for label in ("mf", "fedmf"))
    now = 100.0
    left = Remaining(cells, 2, lambda cell: None, lambda: now)
    assert left.all() is None
    left.begin(mf[0])
    left.begin(fedmf[0])
    now += 10
    left.advance(mf[0], 0.5)
    assert left.of(mf[0]) == 10  # as long as so far
    assert left.of(fedmf[0]) == 10  # of the 20 seconds that mf seems to take
    assert left.all() == (10 + 10 + 6 * 20) / 2
    left.end(mf[0])
    left.advance(fedmf[0], 0.1)
    assert left.of(fedmf[0]) == 90
    assert left.all() == (90 + 3 * 10 + 3 * 100) / 2
    left.end(fedmf[0])
    for cell in (*mf[1:], *fedmf[1:]):
        left.begin(cell)
    assert left.all() == 3 * 10
    for cell in (*mf[1:], *fedmf[1:]):
        left.end(cell)
    assert left.all() == 0


def test_finished_runs_say_how_long_the_others_take(tmp_path: Path) -> None:
    cells = list(read(written(tmp_path, TOY), tmp_path / "out").cells())
    done = next(cell for cell in cells if cell.label == "fedmf")
    done.folder.mkdir(parents=True)
    (done.folder / "result.json").write_text("{}")
    assert Remaining(cells, 1, lambda cell: 7.0).all() == 2 * 7.0


def test_progress_without_a_terminal_is_lines_with_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "EVERY", 0.0)
    cells = list(read(written(tmp_path, TOY), tmp_path / "out").cells())
    line = {
        "done": 30,
        "total": 60,
        "n_phases": 5,
        "phase": "spectral",
        "started_at": 0,
        "metric": "recall@20",
        "best": 0.25,
    }
    for as_json in (False, True):
        with commands._Show(cells, tmp_path / "out", 1, as_json) as show:
            show.begin(cells[0])
            show.round(cells[0], line)
        printed = capsys.readouterr().err.splitlines()[-1]
        if as_json:
            told = json.loads(printed)
            assert (told["event"], told["run"], told["round"], told["rounds"]) == ("playing", cells[0].name, 30, 60)
            assert told["seconds_left"] >= 0
        else:
            here = "playing  popularity, toy, seed 0: round 25/55 recall@20 0.2500, N s left"
            assert re.sub(r"\d+(?= s left)", "N", printed) == f"{here}; all: 0 of 3 runs, N s left"


def test_the_cost_of_a_target_is_summed_over_rounds() -> None:
    def entry(number: int, recall: float | None, sent: int) -> Entry:
        report = RoundReport(number, "train", 5, 4, 0.5, sent, sent, 10 * sent)
        return Entry(report, 0.5, None if recall is None else {"recall@20": recall})

    history = [entry(0, 0.1, 7), entry(1, None, 7), entry(2, 0.3, 7), entry(3, 0.4, 7)]
    expected = {"rounds": 3, "bytes_up": 21, "bytes_down": 210, "uploads": 12, "seconds": 1.5}
    assert reached(history, Target(metric="recall@20", value=0.3)) == expected
    assert reached(history, Target(metric="recall@20", value=0.41)) is None
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": 2**0.5}
    assert spread([1.0]) == {"mean": 1.0, "sd": None}


TIED = "user,item,timestamp\n" + "".join(f"{u},{(u * 7 + i * i) % 40},{i // 3}\n" for u in range(60) for i in range(9))
VARIED = """
vary = "data.seed"
metric = "recall@20"
[data.toy]
path = "{path}"
[methods.item_knn]
[methods.popularity]
"""


def test_seeds_can_vary_the_split(tmp_path: Path) -> None:
    (tmp_path / "toy.csv").write_text(TIED)
    file = written(tmp_path, VARIED.replace("{path}", str(tmp_path / "toy.csv")))
    done = runner.invoke(app, ["bench", str(file), "--output", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["vary"], results["data"]["toy"]["splits"]) == ("data.seed", 3)
    assert "The 3 seeds gave 3 different splits (data.seed)." in done.output
    assert "over seeds, each with its own split" in (tmp_path / "out" / "table.md").read_text()
    found = {each["seed"]: each["test"] for each in results["cells"] if each["label"] == "item_knn"}
    for seed, test in found.items():  # a method that takes no seed runs once for each split
        dataset = open_data(DataSettings(path=str(tmp_path / "toy.csv"), seed=seed))
        floor = train("item_knn", dataset).evaluate()
        assert test == pytest.approx(floor)
    mean = sum(test["recall@20"] for test in found.values()) / 3
    summary = next(each for each in results["summary"] if each["label"] == "item_knn")
    assert summary["test"]["recall@20"]["mean"] == pytest.approx(mean)
    assert summary["test"]["recall@20"]["sd"] > 0
    popular = [each["test"]["recall@20"] for each in results["cells"] if each["label"] == "popularity"]
    assert results["data"]["toy"]["popularity"]["recall@20"] == pytest.approx(sum(popular) / 3)
    again = runner.invoke(app, ["bench", str(file), "--output", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output


def test_what_chance_decides_is_said_where_seeds_do_not_vary_the_split(tmp_path: Path) -> None:
    (tmp_path / "toy.csv").write_text(TIED)
    text = VARIED.replace("{path}", str(tmp_path / "toy.csv")).replace('vary = "data.seed"\n', "seeds = [0]\n")
    done = runner.invoke(
        app, ["bench", str(written(tmp_path, text)), "--output", str(tmp_path / "out")], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    told = done.output.index('read as csv: user = column 1 "user", item = column 2 "item", time = column 3 "timestamp"')
    assert told < done.output.index("runs in ")  # before the first run starts
    notes = json.loads((tmp_path / "out" / "results.json").read_text())["data"]["toy"]["notes"]
    assert notes[0].startswith("read as csv: ")
    assert "Chance decides which interaction is tested for 60 of 60 users (100%)" in done.output
    assert 'All seeds have this one split; vary = "data.seed" draws one for each.' in done.output
    assert "Chance decides" in (tmp_path / "out" / "table.md").read_text()


def test_a_split_without_chance_is_played_once_by_methods_that_take_no_seed(tmp_path: Path) -> None:
    (tmp_path / "toy.csv").write_text(TIED)
    text = VARIED.replace("{path}", str(tmp_path / "toy.csv")).replace(
        "[methods.item", 'ties = "together"\n[methods.item'
    )
    bench = read(written(tmp_path, text), tmp_path / "out")
    bench.prepare()
    assert bench.n_splits("toy") == 1
    assert [(cell.label, cell.seed) for cell in bench.cells()] == [("item_knn", 0), ("popularity", 0)]


def test_folds_are_repetitions(tmp_path: Path) -> None:
    text = TOY.replace("seeds = [0, 3]", 'vary = "data.fold"').replace("items=200", 'items=200"\nfolds = 4\nx = "')
    text = text.replace('x = ""\n', "")
    bench = read(written(tmp_path, text), tmp_path / "out")
    assert bench.file.seeds == (0, 1, 2, 3)
    assert [cell.config.data.fold for cell in bench.cells() if cell.label == "popularity"] == [0, 1, 2, 3]
    bench.prepare()
    assert bench.n_splits("toy") == 4
    with pytest.raises(ConfigError, match=r"needs data.toy.folds above 4"):
        read(written(tmp_path, f"seeds = [0, 4]\n{text}"), tmp_path / "out")
    for more, message in (("fold = 2", "data.toy.fold is set by vary"), ('split = "ratio"', "folds changes nothing")):
        with pytest.raises(ConfigError, match=message):
            read(written(tmp_path, text.replace("folds = 4", f"folds = 4\n{more}")), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"needs data.toy.folds above 2"):
        read(written(tmp_path, text.replace("folds = 4", "")), tmp_path / "out")
