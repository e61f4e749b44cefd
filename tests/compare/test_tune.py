"""Tuning: only validation data count, weak trials stop early, studies continue, and the best is a configuration."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.compare.tune import Dimension, Outcome, Space, Tuning, _sampler, read_space, ready_made
from perfedrec.core.errors import ConfigError
from perfedrec.data import Interactions
from perfedrec.methods.registry import METHODS
from perfedrec.runs.config import DataSettings, differences, open_data, resolve
from perfedrec.runs.training import train

runner = CliRunner()
DATA = "synthetic:users=120,items=200"
FEW = ("run.rounds=10", "run.evaluate_every=2", "selection.n_clients_per_round=40", "model.embedding_dim=8")


@pytest.fixture(scope="module")
def toy() -> Any:
    return open_data(DataSettings(path=DATA))


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="perfedrec", storage=f"sqlite:///{folder / 'study.db'}").trials


def workers(folder: Path) -> set[str]:
    """The processes that have finished a trial."""
    return {each.user_attrs["process"] for each in trials(folder) if each.state == TrialState.COMPLETE}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "popularity"])
def test_each_method_has_a_space_whose_ends_are_valid(name: str, toy: Any, tmp_path: Path) -> None:
    space = ready_made(name)
    Tuning(resolve(algorithm=name), space, toy, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def tune(
    output: Path, *more: str, n: int = 6, algorithm: str = "item_knn", data: Sequence[str] = ("--data", DATA)
) -> Any:
    command = ["tune", *data, "--algorithm", algorithm, "--trials", str(n), "--output", str(output), *more]
    return runner.invoke(app, command)


def test_a_study_continues_and_writes_its_best_as_a_configuration(tmp_path: Path) -> None:
    output = tmp_path / "study"
    first = tune(output, n=3)
    assert first.exit_code == 0, first.output
    shown = [line.split(":")[0] for line in first.stderr.splitlines()]
    assert shown == ["1/3 trial 0 (as configured)", "2/3 trial 1", "3/3 trial 2"]
    more = tune(output, "--json", n=5)
    events = [json.loads(line) for line in more.stderr.splitlines()]
    assert [each["number"] for each in events] == [3, 4]
    best = json.loads(more.stdout)
    values = [each.value for each in trials(output)]
    assert best["value"] == max(values)
    assert len(set(values)) > 1
    resolved = resolve(None, output / "best.toml", data__path=DATA)
    assert resolved.algorithm == "item_knn"
    assert {f"method.{key}": value for key, value in resolved.settings.model_dump().items()} == best["options"]
    run = tmp_path / "run"
    trained = runner.invoke(app, ["train", "--config", str(output / "best.toml"), "--data", DATA, "--output", str(run)])
    assert trained.exit_code == 0, trained.output
    assert json.loads((run / "result.json").read_text())["valid"]["recall@20"] == best["value"]

    whole = tmp_path / "whole"
    tune(whole, n=5)
    assert [each.params for each in trials(whole)] == [each.params for each in trials(output)]
    tune(tmp_path / "other", "--seed", "1", n=2)
    assert trials(tmp_path / "other")[1].params != trials(output)[1].params

    for change, message in (
        ("run.select_by=ndcg@20", "run.select_by is ndcg@20, was recall@20"),
        ("data.seed=3", "data.seed"),
    ):
        refused = tune(output, "--set", change, n=9)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_the_printed_command_repeats_the_best_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the filters, the split and the seed of the data and of the study."""
    monkeypatch.chdir(tmp_path)
    drawn = np.random.default_rng(1).integers((60, 150, 6), size=(1200, 3))
    lines = [f"{user},{item % (user + 60)},{rating}" for user, item, rating in drawn.tolist()]
    Path("rated it.csv").write_text("user,item,rating\n" + "\n".join(lines) + "\n")
    changed = ["--set", "data.min_rating=2", "--set", "data.k_core=3", "--set", "data.split=ratio", "--seed", "3"]
    found = tune(Path("study"), "--data", "rated it.csv", *changed, "--set", "data.seed=4", n=3)
    assert found.exit_code == 0, found.output
    printed = found.stdout.splitlines()[-1].removeprefix("Next: perfedrec ")
    trained = runner.invoke(app, [*shlex.split(printed), "--output", "run", "--quiet", "--json"])
    assert trained.exit_code == 0, trained.output
    best = max(each.value for each in trials(Path("study")) if each.value is not None)
    assert json.loads(trained.stdout)["valid"]["recall@20"] == best
    unfiltered = runner.invoke(app, ["train", "--config", "study/base.toml", "--set", "data.k_core=0", "--json"])
    assert json.loads(unfiltered.stdout)["valid"]["recall@20"] != best

    for part in ("train", "valid", "test"):
        Path(f"{part}.csv").write_text("user,item\n" + "\n".join(f"{u},{(u + ord(part[1])) % 30}" for u in range(30)))
    split = [f"--set=data.{part}={part}.csv" for part in ("train", "valid", "test")]
    assert "--train train.csv --valid valid.csv --test test.csv" in tune(Path("other"), *split, n=1, data=()).stdout


def test_the_first_trial_is_the_configuration_itself(toy: Any, tmp_path: Path) -> None:
    """Also where some of its values are outside of the space, or off; the search may use the others."""
    config = resolve(algorithm="item_knn", overrides=["method.n_neighbours=33", "method.shrink=0.0"])
    space = Space.model_validate(
        {"space": {"method.n_neighbours": {"low": 10, "high": 90}, "method.shrink": {"low": 1.0, "high": 9.0}}}
    )
    outcomes: list[Outcome] = []
    tuning = Tuning(config, space, toy, tmp_path / "study")
    tuning.play(3, outcomes.append)
    assert [each.as_configured for each in outcomes] == [True, False, False]
    assert outcomes[0].changes == {"method.n_neighbours": 33}
    assert all(set(each.changes) == set(space.space) for each in outcomes[1:])
    assert outcomes[0].value == train(config.build(), toy, config.run, config=config).valid["recall@20"]
    tuning.play(4, outcomes.append)
    assert not outcomes[3].as_configured


@pytest.mark.parametrize(
    ("dimension", "takes", "refuses"),
    [
        ({"low": 1, "high": 4}, [1, 4, 2.0], [0, 5, 2.5, None, True]),
        ({"low": 0.5, "high": 4.0}, [0.5, 1, 4], [0.4, None, "a"]),
        ({"choices": ["bpr", 1.0, False]}, ["bpr", 1.0, False], ["a", 0, True, None]),
    ],
)
def test_a_dimension_takes_the_values_that_a_trial_can_have(
    dimension: dict[str, Any], takes: list[Any], refuses: list[Any]
) -> None:
    found = Dimension.model_validate(dimension)
    assert all(found.takes(value) for value in takes)
    assert not any(found.takes(value) for value in refuses)


def test_a_search_does_not_depend_on_what_a_version_of_optuna_assumes() -> None:
    """From trial 10 on the tree-structured estimator draws; 4.9 and 5.0 differ in two of its defaults."""
    sampler = _sampler(0, 12)
    assert (sampler._constant_liar, sampler._multivariate) == (True, False)


def test_the_test_split_changes_nothing(toy: Any, tmp_path: Path) -> None:
    other = np.arange(toy.n_users) % toy.n_items
    ids = toy.train.user_ids, toy.train.item_ids
    foreign = replace(toy, test=Interactions.from_rows(*ids, np.arange(toy.n_users), other, None))
    config, outcomes = resolve(algorithm="fedmf", overrides=FEW), []
    for name, dataset in (("a", toy), ("b", foreign)):
        tuning = Tuning(config, ready_made("fedmf"), dataset, tmp_path / name)
        assert tuning.dataset.test.n_interactions == 0
        of_this: list[Outcome] = []
        tuning.play(2, of_this.append)
        outcomes.append(of_this)
    assert outcomes[0] == outcomes[1]


def test_a_trial_below_the_median_is_stopped_early(toy: Any, tmp_path: Path) -> None:
    space = Space.model_validate({"space": {"method.learning_rate": {"low": 1e-5, "high": 0.05, "log": True}}})
    config = resolve(algorithm="lightgcn", overrides=["run.rounds=10", "method.embedding_dim=8"])
    outcomes: list[Outcome] = []
    Tuning(config, space, toy, tmp_path / "study").play(9, outcomes.append)
    assert {each.state for each in outcomes} == {"complete", "pruned"}
    assert all(each.state == "complete" for each in outcomes[:5])
    stored = trials(tmp_path / "study")
    for each in outcomes[5:]:
        others = [other.intermediate_values for other in stored[: each.number] if other.state == TrialState.COMPLETE]
        curve = stored[each.number].intermediate_values
        behind = [step for step in curve if step >= 2 and curve[step] < np.median([other[step] for other in others])]
        assert bool(behind) == (each.state == "pruned"), each
        assert each.rounds == (behind[0] if behind else 10)


def test_options_that_are_impossible_together_are_reported_and_the_study_continues(toy: Any, tmp_path: Path) -> None:
    space = Space.model_validate(
        {
            "space": {
                "personal.pretrained": {"choices": [0.0, 0.2]},
                "pretraining.kind": {"choices": ["none", "spectral"]},
            }
        }
    )
    base = resolve("paper", overrides=[*FEW, "run.rounds=0", "pretraining.kind=spectral"])
    outcomes: list[Outcome] = []
    Tuning(base, space, toy, tmp_path / "study").play(8, outcomes.append)
    for each in outcomes:
        impossible = each.changes == {"personal.pretrained": 0.2, "pretraining.kind": "none"}
        assert (each.state == "infeasible") == impossible
        assert not impossible or "needs pretraining.kind" in each.remark
    assert {each.state for each in outcomes} == {"infeasible", "complete"}


def test_a_trial_that_diverges_is_reported_and_the_study_continues(toy: Any, tmp_path: Path) -> None:
    for name, key in (("fedmf", "client.learning_rate"), ("mf", "method.learning_rate")):
        space = Space.model_validate({"space": {key: {"choices": [0.01, 1e30]}}})
        few = FEW if name == "fedmf" else ("run.rounds=2", "method.embedding_dim=8")
        outcomes: list[Outcome] = []
        Tuning(resolve(algorithm=name, overrides=few), space, toy, tmp_path / name).play(6, outcomes.append)
        assert {(each.changes[key], each.state) for each in outcomes[1:]} == {(0.01, "complete"), (1e30, "infeasible")}
        assert all("finite" in each.remark for each in outcomes if each.state == "infeasible")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[space]\n", "space.toml: space names no option; expected [space] with lines such as"),
        (
            '"method.shrink" = {low = 1, high = 2}',
            "space.toml: there is no table [space] of options to search",
        ),
        ("[space]\nmethod.shrink = {low = 1, high = 2}", "space.method: names of options stand in quotes"),
        ('[space]\n"method.shrink" = {low = true, high = 2}', "space.method.shrink.low: expected a number"),
        (
            '[space]\n"method.shrnk" = {low = 1, high = 2}',
            "space.toml: there is no option method.shrnk of item_knn; did",
        ),
        ('[space]\n"method.shrink" = {low = 1}', "expected { low"),
        ('[space]\n"method.shrink" = {low = 3, high = 2}', "low < high"),
        ('[space]\n"method.shrink" = {low = 0, high = 2, log = true}', "low > 0"),
        (
            '[space]\n"method.shrink" = {low = -1, high = 2}',
            "space.toml, method.shrink = -1: method.shrink: expected",
        ),
        ('[space]\n"method.shrink" = {choices = [1, 2], low = 0}', "expected { low"),
        ('[space]\n"data.seed" = {low = 0, high = 2}', "data.seed"),
        ("[space\n", "not valid TOML"),
    ],
)
def test_an_error_in_a_space_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(text)
    refused = tune(tmp_path / "study", "--space", str(file))
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_without_optuna_the_error_names_the_extra(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused = tune(tmp_path / "study")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "tuning needs the extra tune" in refused.stderr


STOPPED = """
import os, pathlib, time
from perfedrec.methods.federated.fedmf import FedMF

class Stopped(FedMF):
    trials = 0

    def plan(self, state, key):
        Stopped.trials += state.round == 0
        if "SIGNAL" in os.environ and (Stopped.trials, state.round) == (2, 5):  # both processes are in a second trial
            flags = pathlib.Path(os.environ["FLAGS"])
            (flags / os.environ["SIGNAL"]).touch()
            while len(list(flags.iterdir())) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return super().plan(state, key)
"""


def test_two_processes_share_a_study_and_a_signal_loses_no_trial(tmp_path: Path) -> None:
    """Each process has finished one trial and is in the middle of another one when it stops."""
    output, flags, ends = tmp_path / "study", tmp_path / "flags", (signal.SIGINT, signal.SIGKILL)
    flags.mkdir()
    (tmp_path / "stopped.py").write_text(STOPPED)
    (tmp_path / "space.toml").write_text('[space]\n"client.learning_rate" = { low = 0.01, high = 0.1 }\n')
    settings = [part for each in FEW for part in ("--set", each)]
    command = [sys.executable, "-m", "perfedrec", "tune", "--data", DATA, "--output", str(output), *settings]
    command += ["--algorithm", f"{tmp_path / 'stopped.py'}:Stopped", "--space", str(tmp_path / "space.toml")]
    both = [
        subprocess.Popen(
            [*command, "--trials", "9"],
            env=os.environ | {"FLAGS": str(flags), "SIGNAL": str(int(number))},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number in ends
    ]
    printed = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [130, -signal.SIGKILL], printed
    assert "2 of 9 trials are finished; run the same command again to continue" in printed[0].splitlines()[-1]
    before = trials(output)
    assert len(workers(output)) == 2
    states = [each.state for each in before]
    assert [states.count(each) for each in (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)] == [2, 1, 1]
    broken = [each.params for each in before if each.state in (TrialState.FAIL, TrialState.RUNNING)]
    done = subprocess.run([*command, "--trials", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = [each for each in trials(output) if each.state == TrialState.COMPLETE]
    assert len(after) == 4
    assert all(each in [trial.params for trial in after] for each in broken)
    assert not [each for each in trials(output) if each.state == TrialState.RUNNING]


def test_a_space_from_a_file_is_searched(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(
        '[space]\n"method.shrink" = { choices = [1.5, 2.5] }\n"method.n_neighbours" = { low = 7, high = 9 }\n'
    )
    space = read_space(file)
    assert space.space["method.n_neighbours"].ends() == (7, 9)
    assert tune(tmp_path / "study", "--space", str(file), n=5).exit_code == 0
    searched = trials(tmp_path / "study")[1:]  # the first one is as configured
    assert all(each.params["method.shrink"] in (1.5, 2.5) for each in searched)
    assert {each.params["method.n_neighbours"] for each in searched} <= {7, 8, 9}


def test_options_without_effect_are_not_searched(toy: Any, tmp_path: Path) -> None:
    def searched(*overrides: str, space: Space | None = None, algorithm: str = "mf") -> tuple[set[str], list[str]]:
        config = resolve(algorithm=algorithm, overrides=list(overrides))
        study = Tuning(config, space or ready_made(algorithm), toy, tmp_path / "study")
        return set(study.space.space), study.what_is_left_out()

    every = set(ready_made("mf").space)
    assert searched() == (every, [])
    said = ["method.batch_size is not searched: without effect with method.optimizer = sgd"]
    assert searched("method.optimizer=sgd") == (every - {"method.batch_size"}, said)
    size, steps = ready_made("mf").space["method.batch_size"], Dimension(low=2, high=9)
    both = Space(space={"method.batch_size": size, "method.optimizer": Dimension(choices=("adam", "sgd"))})
    assert searched("method.optimizer=sgd", space=both) == (set(both.space), [])  # with Adam it has an effect
    with pytest.raises(ConfigError, match="expected at least one option that has an effect"):
        searched("method.optimizer=sgd", space=Space(space={"method.batch_size": size}))
    none = Space(space={"clusters.every": steps, "client.local_steps": steps})
    assert searched("clusters.n_clusters=0", space=none, algorithm="perfedrec") == (
        {"client.local_steps"},
        ["clusters.every is not searched: without effect with clusters.n_clusters = 0"],
    )


def test_a_part_that_is_switched_off_is_not_searched(tmp_path: Path) -> None:
    few = [part for each in FEW for part in ("--set", each)]
    done = tune(tmp_path / "study", "--without", "clusters", *few, n=2, algorithm="perfedrec")
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[:2] == [
        "clusters.n_clusters is not searched: --without clusters sets it",
        "clusters.learning_rate is not searched: without effect with clusters.n_clusters = 0",
    ]
    tried = {key for each in trials(tmp_path / "study") for key in each.params}
    assert "client.learning_rate" in tried
    assert not any(key.startswith("clusters.") for key in tried)


def test_a_space_is_the_one_for_other_options() -> None:
    """Plain steps need a larger learning rate than Adam."""
    adam, plain = ready_made("mf", {"method.optimizer": "adam"}), ready_made("mf", {"method.optimizer": "sgd"})
    assert ready_made("mf") == adam
    rates = [each.space["method.learning_rate"] for each in (adam, plain)]
    assert [(each.low, each.high) for each in rates] == [(5e-4, 0.02), (0.005, 0.2)]
    assert "method.batch_size" in adam.space.keys() - plain.space.keys()


def test_a_method_without_a_space_gives_an_error() -> None:
    with pytest.raises(ConfigError, match="--space"):
        ready_made("popularity")
    assert differences(resolve(algorithm="mf"), resolve(algorithm="mf", run__seed=5)) == ["run.seed is 5, was 0"]
    free, capped = resolve("paper"), resolve("paper", overrides=["selection.max_participations=5"])
    assert differences(free, capped) == ["selection.max_participations is 5, was off"]
    assert differences(capped, free) == ["selection.max_participations is off, was 5"]
    assert differences(resolve(algorithm="mf"), resolve(algorithm="fedmf")) == ["algorithm is fedmf, was mf"]
