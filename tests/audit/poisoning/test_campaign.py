"""Attacks on a finished run: from the folder to figures, the record and its page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perfedrec import ConfigError, configure, load, train
from perfedrec.audit.poisoning import Scenario, attack, campaign, poisoned, read_attacks
from perfedrec.audit.poisoning.exposure import Exposure
from perfedrec.audit.poisoning.record import Attacked, Outcome
from perfedrec.cli import app
from perfedrec.core.errors import CheckpointError, DivergedError
from perfedrec.report.run import run_page
from perfedrec.runs.config import load as load_config

DATA = "synthetic:users=150,items=120,interactions_per_user=10"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [
        "selection.n_clients_per_round=50",
        "model.embedding_dim=8",
        "run.rounds=12",
        "run.threads=1",
        "server.optimizer=fedavg",
    ]
    config = configure(
        "fedmf",
        overrides=[
            *overrides,
            "server.learning_rate=1",
            "server.averaging=0",
            "run.evaluate_every=12",
            f"data.path={DATA}",
        ],
    )
    folder = tmp_path_factory.mktemp("runs") / "a"
    train(config.build(), load(DATA), config.run, output=folder, config=config)
    return folder


def test_an_attack_is_played_stored_printed_and_reported(run: Path) -> None:
    told: list[tuple[str, str]] = []
    scenario = Scenario(k=10)
    found = attack(
        run, ["collusion"], [0.05], scenario, doing=lambda what, progress: told.append((what, progress.place))
    )
    assert found == read_attacks(run)
    assert told[-1] == ("collusion, 0.05 malicious", "round 12/12")
    (outcome,) = found.outcomes
    assert (outcome.malicious, found.rounds) == (8, 12)
    assert found.chance == pytest.approx(10 / load(DATA).n_items)
    assert outcome.after is not None
    assert outcome.after.exposure > max(found.before.exposure, found.chance) + 0.2
    assert f"{outcome.after.exposure:.4f} (collusion)" in found.line()
    page = run_page(run)
    section = next(each for each in page.sections if each.title == "Malicious clients")
    assert found.rows() in [getattr(each, "rows", None) for each in section.blocks]
    notes = [getattr(each, "note", "") for each in section.blocks]
    assert f"Target: {found.named_targets}. Malicious clients keep the bound" in notes[0]
    assert notes[0].endswith("Defence: none.")
    printed = CliRunner().invoke(app, ["audit", str(run), "--trials", "1000"])
    assert found.line() in printed.stdout


def test_an_attack_that_ends_the_training_is_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*given: object) -> None:
        raise DivergedError("an update has numbers that are not finite")

    monkeypatch.setattr(campaign, "poisoned", diverged)
    found = attack(run, ["sign-flipping"], [0.05])
    assert found.strongest is None
    assert read_attacks(run) == found
    assert "the training was ended by sign-flipping, 0.05" in found.line()
    assert found.rows()[1][:4] == ["sign-flipping", "0.05", "8", "ended"]
    assert found.group_rows() == []
    run_page(run)


def test_the_command_prints_what_it_stores(run: Path) -> None:
    (run / "attack.json").unlink(missing_ok=True)
    words = ["attack", str(run), "--attack", "random", "--share", "0.02", "--rounds", "1", "--k", "5", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads((run / "attack.json").read_text())
    stored = json.loads(result.stdout)
    assert (stored["rounds"], stored["before"]["k"], stored["outcomes"][0]["malicious"]) == (1, 5, 3)


def test_progress_counts_phases_and_rounds_apart(run: Path, tmp_path: Path) -> None:
    """``--rounds 1`` of a method with a phase before training is not two rounds."""
    (run / "attack.json").unlink(missing_ok=True)
    words = ["attack", "--attack", "random", "--share", "0.02", "--rounds", "1"]
    assert CliRunner().invoke(app, [*words, str(run)]).stderr.splitlines() == [
        "without an attack: 1 round",
        "random, 0.02 malicious: 1 round",
    ]
    config = configure("paper", overrides=["run.rounds=0", "model.embedding_dim=8", f"data.path={DATA}"])
    train(config.build(), load(DATA), config.run, output=tmp_path / "paper", config=config)
    said = CliRunner().invoke(app, [*words, str(tmp_path / "paper")]).stderr
    assert said.splitlines()[0] == "without an attack: 1 phase and 1 round"


def test_a_finished_table_is_never_lost(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attack is added, the same one again replaces its line, and another scenario sets the table aside."""
    made, stopped = _figures(), list[str]()

    def played(config: object, dataset: object, name: str | None, *given: object) -> Exposure:
        if name in stopped:
            raise KeyboardInterrupt
        return made

    def named() -> list[tuple[str, float]]:
        found = read_attacks(folder)
        assert found is not None
        return [(each.attack, each.share) for each in found.outcomes]

    monkeypatch.setattr(campaign, "poisoned", played)
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("attack*.json"))
    attack(folder, ["random", "popular"], [0.05], rounds=2)
    attack(folder, ["random"], [0.05, 0.1], rounds=2)
    before = [("popular", 0.05), ("random", 0.05), ("random", 0.1)]
    assert named() == before
    stopped.append("collusion")
    words = ["attack", str(folder), "--attack", "collusion", "--share", "0.05"]
    result = CliRunner().invoke(app, [*words, "--rounds", "2"])
    assert (result.exit_code, named()) == (130, before)
    assert "interrupted; " in result.stderr
    assert "attack.json keeps popular 0.05, random 0.05, random 0.1" in " ".join(result.stderr.split())
    CliRunner().invoke(app, [*words, "--attack", "popular", "--rounds", "3"])
    assert named() == before
    words[3] = "popular"
    result = CliRunner().invoke(app, [*words, "--rounds", "3"])
    assert named() == [("popular", 0.05)]
    assert f"is kept in {folder / 'attack-1.json'}" in result.stderr
    assert "defence: none" in result.stdout
    assert [each["attack"] for each in json.loads((folder / "attack-1.json").read_text())["outcomes"]] == [
        "popular",
        "random",
        "random",
    ]


def test_options_of_an_attack_are_recorded_and_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "poisoned", lambda *given: _figures())
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("attack*.json"))
    attack(folder, ["collusion"], [0.05], rounds=2)
    words = ["attack", str(folder), "--attack", "collusion", "--share", "0.05", "--rounds", "2", "--set", "varied=true"]
    assert CliRunner().invoke(app, words).exit_code == 0
    found = read_attacks(folder)
    assert found is not None
    assert [each.options for each in found.outcomes] == [{}, {"varied": "true"}]
    assert [row[0] for row in found.rows()] == ["none", "collusion", "collusion (varied=true)"]
    assert found.rows() in [getattr(each, "rows", None) for part in run_page(folder).sections for each in part.blocks]
    stored = json.loads((folder / "attack.json").read_text())
    for each in stored["outcomes"]:
        del each["options"]  # as earlier versions wrote it
    (folder / "attack.json").write_text(json.dumps(stored))
    older = read_attacks(folder)
    assert older is not None
    assert [each.named for each in older.outcomes] == ["collusion", "collusion"]


def test_small_steps_of_rows_lower_what_an_attack_reaches(run: Path) -> None:
    config = load_config("fedmf", run / "config.toml")
    bounded = load_config("fedmf", run / "config.toml", ["defence.row_step=0.01"])
    free, found = (poisoned(each, load(DATA), "collusion", 0.05, 0, Scenario(k=10)) for each in (config, bounded))
    assert found.exposure < free.exposure - 0.2


def _figures(exposure: float = 0.1, ndcg: float = 0.2) -> Exposure:
    return Exposure(20, exposure, 0.2, ndcg, (exposure,), ())


def test_figures_that_no_attack_has_made_worse_are_called_so() -> None:
    better, worse = Outcome("random", 0.1, 5, _figures(0.05, 0.3)), Outcome("popular", 0.1, 5, _figures(0.6, 0.1))
    record = Attacked(("7",), (1,), {}, 0, 3, 0.1, _figures(), (better,))
    assert record.line() == (
        "ER@20 of the target 0.1000, and no attack raised it; NDCG@20 0.2000, and no attack lowered it"
    )
    assert record.having(worse).line().endswith("0.6000 (popular); NDCG@20 0.2000, at worst 0.1000 (popular, 0.1)")
    assert record.named_targets == "7 (1 user)"


def test_the_same_attack_gives_the_same_figures_in_any_blocks() -> None:
    config = configure("fedmf", overrides=["model.embedding_dim=8", "run.rounds=3", "run.threads=1"])
    smaller = config.model_copy(update={"run": config.run.model_copy(update={"block_size": 16})})
    data = load(DATA)
    found = [poisoned(each, data, "collusion", 0.05, 3) for each in (config, config, smaller)]
    assert found[0] == found[1]
    assert found[2].exposure == pytest.approx(found[0].exposure, abs=0.1)  # lengths are means over a block


def test_mistakes_are_named_before_anything_is_trained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="share of malicious clients is 2"):
        attack(run, ["random"], [2.0])
    with pytest.raises(ConfigError, match="expected a single attack"):
        attack(run, ["random", "popular"], options={"top": 3})
    with pytest.raises(ConfigError, match="no option loud"):
        attack(run, ["random"], options={"loud": 3})
    with pytest.raises(ConfigError, match="no attack 'shout'"):
        attack(run, ["shout"])
    with pytest.raises(ConfigError, match="--rounds is -1"):
        attack(run, ["random"], rounds=-1)
    for words, message in (
        (["--bound", "keptt"], "--bound: expected kept or ignored (given: 'keptt'); did you mean kept?"),
        (["--share", "much"], "--share is 'much'"),
        (["--set", "top"], "expected option=value"),
        (["--targets", "0"], "--targets: expected at least 1 (given: 0)"),
        (["--list-length", "-1"], "--list-length: expected at least 0 (given: -1)"),
        (["--public", "2"], "--public: expected at most 1 (given: 2.0)"),
        (["--target", "none such"], "expected a whole number, as all ids of items are (without a target, items that"),
        (["--target", "9999"], "target: unknown item '9999'; expected an id of the items in the data, such as 119 ("),
    ):
        result = CliRunner().invoke(app, ["attack", str(run), *words])
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    assert read_attacks(tmp_path) is None
    (tmp_path / "attack.json").write_text('{"targets": []}')
    with pytest.raises(CheckpointError, match="damaged record of attacks"):
        read_attacks(tmp_path)


@pytest.mark.parametrize("name", ["fedrecattack", "pieck-uea"])
def test_published_direction_on_ml_100k(real_data: Callable[[str], Path], name: str) -> None:
    """FedRecAttack (Rong et al., ICDE 2022) publishes for MovieLens 100K, 5 % malicious clients and 1 % public
    interactions, that ER@10 of a target rises from 0.005 to 0.78 within five epochs. Four epochs of FedMF with a plain
    server step, as the paper has it."""
    overrides = ["model.embedding_dim=16", "run.rounds=15", "run.evaluate_every=50", "run.threads=1"]
    plain = ["server.optimizer=fedavg", "server.learning_rate=1", "server.averaging=0"]
    config, data = configure("fedmf", overrides=[*overrides, *plain]), load(real_data("ml-100k") / "u.data")
    scenario = Scenario(k=10, public=0.01)
    assert poisoned(config, data, None, 0.05, 0, scenario).exposure < 0.02
    assert poisoned(config, data, name, 0.05, 0, scenario).exposure > 0.6
