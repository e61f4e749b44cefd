"""The model of a federation after training: evaluated, recommended from, exported and reported, as for new users."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tests.federation.conftest import DATA, Federation, federation
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.errors import CheckpointError, DataError
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER
from perfedrec.data import load
from perfedrec.federation.model_file import export, read_model
from perfedrec.report import write_report
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.result import open_run
from perfedrec.runtimes.node import LocalRecommender, Store

runner = CliRunner()


def as_new_user(given: Federation, user: int) -> torch.Tensor:
    """[m] scores for one user of the data as for a new user, one step after the other."""
    algorithm, state = given.simulator.algorithm, given.simulator.state
    rows, _ = given.simulator.population.rows(torch.tensor([user]))
    broadcast = algorithm.broadcast(algorithm.serving(state), torch.tensor([NEWCOMER]))
    client = algorithm.init_new_user(broadcast, rows, algorithm.init_clients(rows, Key(5).fold("memory")))
    local = algorithm.without_privacy()
    for number in range(algorithm.finetune_rounds):
        _, client = local.client("train", broadcast, rows, client, Key(5).fold("alone", number))
    scores = algorithm.scores(broadcast, rows, client)[0]
    scores[rows.items] = -torch.inf
    return scores


def test_the_privacy_block_says_that_sums_which_were_not_kept_cannot_be_audited(finished: Federation) -> None:
    block = json.loads((finished.folder / "result.json").read_text())["privacy"]
    assert block["audit"] == "not possible, sums were not kept (--keep-sums)"


def test_lists_are_those_of_new_users(finished: Federation) -> None:
    result, _ = open_run(finished.folder, DATA)
    users = torch.tensor([3, 17, 79])
    found = result.recommender.scores(users)
    for place, user in enumerate(users.tolist()):
        torch.testing.assert_close(found[place], as_new_user(finished, user), rtol=1e-5, atol=1e-6)
    assert result.best_round == 3
    members = finished.simulator.recommender().scores(users)
    assert not torch.allclose(found, members, rtol=1e-3, atol=1e-3)  # who have parts of their own


def test_a_node_with_the_exported_model_recommends_the_same_to_a_new_user(finished: Federation, tmp_path: Path) -> None:
    export(finished.folder, tmp_path / "a.model")
    model, train = read_model(tmp_path / "a.model"), finished.dataset.train
    assert (model.round, model.catalogue.item_ids.tolist()) == (3, train.item_ids.tolist())
    with Store.create(tmp_path / "a.node", model.catalogue.item_ids) as store:
        model.give(store)
        own = train.frame().filter(pl.col("user") == train.user_ids[17])
        store.import_interactions(own, identities={str(train.user_ids[17]): 17})
        local = LocalRecommender(store, finished.simulator.algorithm)
        store._use_run(finished.simulator.algorithm, "mine", 0, seed=5)  # the draws of a node are its own
        scores, _ = local.scores(torch.tensor([17]))
    torch.testing.assert_close(scores[0], as_new_user(finished, 17), rtol=1e-5, atol=1e-6)


def test_named_data_are_numbered_by_the_catalogue(finished: Federation, tmp_path: Path) -> None:
    """Items in another order, as text, and items that no node has: lists and metrics are the same."""
    dataset = load(DATA)
    for name, part in (("train", dataset.train), ("valid", dataset.valid), ("test", dataset.test)):
        frame = part.frame().select(pl.col("user"), pl.col("item").cast(pl.String)).reverse()
        more = pl.DataFrame({"user": dataset.train.user_ids[:4], "item": ["unknown"] * 4})
        (pl.concat([frame, more]) if name == "train" else frame).write_csv(tmp_path / f"{name}.csv")
    found, expected = (open_run(finished.folder, data)[0] for data in (str(tmp_path), DATA))
    assert found.evaluate() == expected.evaluate()
    assert found.recommend(k=5).equals(expected.recommend(k=5))
    (line,) = (each for each in found.dataset.notes.lines() if "catalogue" in each)
    assert line == "4 interactions with 1 item that the federation's catalogue does not have: left out"
    (tmp_path / "other.csv").write_text("user,item\n" + "".join(f"u{n},x{n % 3}\nu{n},y{n % 4}\n" for n in range(9)))
    with pytest.raises(DataError, match=r"none of its . items is among the 58 items of the federation's catalogue"):
        open_run(finished.folder, str(tmp_path / "other.csv"))


def test_the_commands_say_whose_lists_they_show(finished: Federation, tmp_path: Path) -> None:
    run = ["--run", str(finished.folder)]
    shown = runner.invoke(app, ["evaluate", *run, "--data", DATA])
    assert shown.exit_code == 0, shown.output
    told = "the 80 users of " + DATA + " are served as new users, after 1 local round on their training interactions"
    assert told in shown.stdout
    plain = json.loads(runner.invoke(app, ["evaluate", *run, "--data", DATA, "--json"]).stdout)
    assert told in plain["basis"]
    assert plain["metrics"] == open_run(finished.folder, DATA)[0].evaluate()
    user = str(finished.dataset.train.user_ids[0])
    one = json.loads(runner.invoke(app, ["recommend", *run, "--data", DATA, "--user", user, "--json"]).stdout)
    assert len(one["items"]) == 20
    assert told in one["basis"]
    for command in (["evaluate", *run], ["recommend", *run, "--user", user]):
        without = runner.invoke(app, command)
        assert without.exit_code == 2
        assert without.stderr.startswith(
            "error: the data of this run are with the nodes of a federation; expected --da"
        )
    refused = runner.invoke(app, ["train", "--resume", "--output", str(finished.folder)])
    assert refused.stderr.endswith("is the run of a federation; expected perfedrec serve --resume, or federation up\n")
    refused = runner.invoke(app, ["audit", str(finished.folder), "--data", DATA])
    assert "expected --nodes FOLDER" in refused.stderr


def test_the_report_of_a_federation_has_the_figures_that_its_coordinator_has(
    finished: Federation, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    for number in (1, 2):
        line = {"node": "n1", "round": number, "phase": "train", "reason": "late", "detail": "no reply", "users": 3}
        RunFolder(run).append_rejection(line)
    text = write_report(run).read_text()
    for told in ("a federation of 80 users", "n0, n1", "Rounds that went on without a node", "Communication by phase"):
        assert told in text, told
    summary = RunFolder(run).summary()
    assert 70 < summary.test["users"] <= 80
    for told in ("Validation metrics", "Test metrics of the best round", f"{summary.test['ndcg@20']:.4f}"):
        assert told in text, told
    assert summary.communication["uploads_per_client"] > 1


def test_the_attributes_of_users_are_read_in_the_encoding_of_the_federation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder, other = tmp_path / "data", tmp_path / "other"
    for place, users in ((folder, range(40)), (other, range(12))):
        place.mkdir()
        rows = [f"{user},{item}" for user in users for item in rng.permutation(20)[:6]]
        (place / "ratings.csv").write_text("user,item\n" + "\n".join(rows) + "\n")
        ages = [f"{user},{20 + user},{'ab'[user % 2]}" for user in users if user != 11]
        (place / "user_attributes.csv").write_text("user,age,kind\n" + "\n".join(ages) + "\n")
    given = federation(
        tmp_path / "run", "model.attributes=true", privacy="none", data=str(folder / "ratings.csv"), rounds=1
    )
    result, _ = open_run(given.folder, str(other / "ratings.csv"))
    attributes = result.dataset.user_attributes
    assert attributes is not None
    assert attributes.names == ("age", "kind=a", "kind=b")
    # 20 to 59 in the federation, without user 11: age 23 is at 3 / 39.
    np.testing.assert_allclose(attributes.values[[3, 11]], [[3 / 39, 0, 1], [0, 0, 0]], rtol=1e-6)
    assert sum(result.evaluate().values()) > 0
    shutil.move(given.folder / "user_encoding.csv", tmp_path / "elsewhere.csv")
    with pytest.raises(CheckpointError, match="has no catalogue of this federation's items; expected the file"):
        open_run(given.folder, str(other / "ratings.csv"))
