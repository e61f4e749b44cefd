"""Replay and correction: only rows of the forgotten users' items change, and their data are nowhere in what is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perfedrec.core.errors import ConfigError
from perfedrec.data import load
from perfedrec.forgetting.forget import Request, forget
from perfedrec.forgetting.rows import Rows, replay
from perfedrec.runs.config import Config, resolve
from perfedrec.runs.result import Result
from perfedrec.runs.training import train
from perfedrec.runtimes.simulator import PersonalRecommender

SMALL: dict[str, Any] = {
    "data__path": "synthetic:users=60,items=150,interactions_per_user=8",
    "run__rounds": 6,
    "run__evaluate_every": 6,
    "run__device": "cpu",
    "selection__n_clients_per_round": 20,
    "model__embedding_dim": 8,
}
METHODS: dict[str, dict[str, Any]] = {
    "fedmf": {"algorithm": "fedmf", **SMALL},
    "recommended": {"preset": "recommended", **SMALL, "clusters__n_clusters": 2, "data__train_on_valid": True},
}
USER = 7


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A configuration and the folder of its finished run."""
    folder, config = tmp_path_factory.mktemp("runs") / "run", resolve(**METHODS[request.param])
    train(config, output=folder)
    return config, folder


def rows_of(config: Config, result: Result) -> Rows:
    left = result.dataset.without_users([result.dataset.train.user_ids[USER]])
    assert isinstance(result.recommender, PersonalRecommender)
    played = max(result.best_round, 0)
    return Rows.of(config.build(), left, config.run, result.recommender, played, torch.tensor([USER]))  # type: ignore[arg-type]


def test_replay_changes_the_rows_of_the_users_items_alone(trained: tuple[Config, Path]) -> None:
    config, folder = trained
    result = Result.load(folder)
    rows, train_ = rows_of(config, result), result.dataset.train
    own = train_.items[train_.offsets[USER] : train_.offsets[USER + 1]].tolist()
    assert rows.touched.nonzero().squeeze(1).tolist() == own
    others = {
        user
        for user in range(60)
        if user != USER and set(own) & set(train_.items[train_.offsets[user] : train_.offsets[user + 1]].tolist())
    }
    assert set(rows.holders.nonzero().squeeze(1).tolist()) == others
    made, before = replay(rows, 1.0), result.recommender.records()["state"]
    after = made.recommender.state
    same = (after.items == before.items).all(1)
    assert same[~rows.touched].all()
    assert not same[rows.touched].any()
    if before.offsets is not None:
        changed = (after.offsets != before.offsets).any(1)
        assert not changed[~rows.touched.repeat(before.offsets.shape[0] // rows.touched.numel())].any()
    kept, old = (each.records()["memory"]["private"] for each in (made.recommender, result.recommender))
    assert torch.equal(kept[:USER], old[:USER])
    assert not torch.equal(kept[USER], old[USER])
    assert len(made.entries) == max(result.best_round, 0)


def test_a_share_of_the_rounds_is_played_again(trained: tuple[Config, Path]) -> None:
    config, folder = trained
    result = Result.load(folder)
    rows, phases = rows_of(config, result), len(config.build().phases)
    assert rows.numbers(0.5) == [phases, phases + 2, phases + 4][: (result.best_round + 1) // 2]
    assert rows.numbers(0.0) == []
    assert len(rows.numbers(1.0)) == result.best_round


def test_the_sum_of_the_others_has_the_weight_of_all_of_them(trained: tuple[Config, Path]) -> None:
    config, folder = trained
    rows = rows_of(config, Result.load(folder))
    number = len(config.build().phases)
    users, weights = rows.cohort(number)
    assert USER not in users.tolist()
    whole = rows.algorithm.plan(rows.simulator.state, rows_key(rows, number)).cohort
    assert float(weights.sum()) == pytest.approx(whole.numel() - int((whole == USER).sum()))


def rows_key(rows: Rows, number: int) -> Any:
    from perfedrec.runtimes.round import round_key

    return round_key(rows.simulator.seed, number).fold("plan")


def test_undoing_moves_rows_against_what_the_user_sent(trained: tuple[Config, Path]) -> None:
    config, folder = trained
    result = Result.load(folder)
    rows, before = rows_of(config, result), result.recommender
    assert isinstance(before, PersonalRecommender)
    table = rows.simulator.state.items.clone()
    often = rows.undo(before, torch.tensor([USER]))
    assert often == int(before.population.load_client_states(torch.tensor([USER]), torch.tensor([0])).participations)
    moved = (rows.simulator.state.items != table).any(1)
    assert not moved[~rows.touched].any()
    assert moved.any() == (often > 0)


@pytest.mark.parametrize("method", ["replay", "correction"])
def test_the_new_run_can_be_opened_and_says_what_was_done(
    method: str, trained: tuple[Config, Path], tmp_path: Path
) -> None:
    _, folder = trained
    exact = forget(folder, Request([str(USER)]), tmp_path / "exact")
    found = forget(folder, Request([str(USER)], method, reference=tmp_path / "exact"), tmp_path / method)
    assert found.cost.clients < exact.cost.clients
    assert found.measured["distance to the model trained again"]["overlap@20"] <= 1
    assert found.approximate
    result = Result.load(tmp_path / method)
    assert result.dataset.forgotten == (USER,)
    assert result.recommend(None, 5)["user"].n_unique() == 59
    with pytest.raises(ConfigError, match="is not this run without these users"):
        forget(folder, Request(["9"], method, reference=tmp_path / "exact"), tmp_path / "other")


def test_what_does_not_suit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    train(
        resolve(**{**METHODS["fedmf"], "selection__n_clients_per_round": 40, "privacy": "secure"}),
        output=tmp_path / "secure",
    )
    with pytest.raises(ConfigError, match="expected --method exact"):
        forget(tmp_path / "secure", Request(["1"], "replay"), tmp_path / "new")
    train("popularity", load(SMALL["data__path"]), output=tmp_path / "central")
    with pytest.raises(ConfigError, match="is centralised"):
        forget(tmp_path / "central", Request(["1"], "replay"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "central" / "forgetting.jsonl").exists()
    with pytest.raises(ConfigError, match="there is no method other"):
        forget(tmp_path / "central", Request(["1"], "other"), tmp_path / "new")
