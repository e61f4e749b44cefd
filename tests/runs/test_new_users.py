"""Runs whose test users are held out from training: each is served as a new user."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from perfedrec import Dataset, Method, Result, load, open_run, train
from perfedrec.audit.audit import audit
from perfedrec.cli import app
from perfedrec.core.errors import ConfigError, DataError
from perfedrec.runs.result import popularity

DATA = "synthetic:users=150,items=60,clusters=3,interactions_per_user=10,seed=4"
SHORT: dict[str, dict[str, Any]] = {
    "mf": {"rounds": 3},
    "lightgcn": {"rounds": 3},
    "fedmf": {"rounds": 2, "selection__n_clients_per_round": 64},
    "perfedrec_pp": {"rounds": 2, "evaluate_every": 2, "selection__n_clients_per_round": 64},
}
METHODS = ["popularity", "item_knn", "user_knn", "spectral_filter", *SHORT]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load(DATA, test_users=0.1)


@pytest.fixture(scope="module", params=METHODS)
def result(request: Any, dataset: Dataset) -> Result:
    return train(request.param, dataset, **SHORT.get(request.param, {}))


def test_a_held_out_user_gets_the_list_of_recommend_for(result: Result) -> None:
    """A naive evaluation: one user after the other, by the place of the tested item in the list."""
    data = result.dataset
    known, tested = data.new_users, data.test
    assert known is not None
    frame = result.per_user("test", ks=10)
    assert frame["user"].to_list() == known.user_ids.tolist()
    assert frame["interactions"].to_list() == known.degrees.tolist()
    for user, (hit, rank) in enumerate(frame.select("hr@10", "mrr@10").rows()):
        own = known.item_ids[known.items[slice(*known.offsets[user : user + 2])]]
        lists = result.recommend_for(own.tolist(), k=data.n_items)
        scores = dict(lists.select("item", "score").rows())
        wanted = scores[known.item_ids[tested.items[user]].item()]
        higher = sum(score > wanted + 1e-6 for score in scores.values())
        equal = sum(abs(score - wanted) <= 1e-6 for score in scores.values()) - 1
        assert hit == (rank > 0)
        place = 1 / rank if hit else 11
        assert higher + 1 <= place or place == 11, user
        assert place <= higher + equal + 1 or higher + equal + 1 > 10, user
    assert result.evaluate(ks=10)["recall@10"] == pytest.approx(frame["recall@10"].mean())


def test_the_scores_of_a_block_are_those_of_each_user_alone(result: Result) -> None:
    known = result.dataset.new_users
    assert known is not None
    offsets, items = torch.tensor(known.offsets), torch.tensor(known.items)
    others = result.recommender.for_new_users(offsets, items)
    block = others.raw_scores(others.everyone())
    for user, (first, last) in enumerate(zip(known.offsets[:-1], known.offsets[1:], strict=True)):
        alone = result.recommender.scores_of_new_user(items[first:last])
        torch.testing.assert_close(block[user], alone, rtol=1e-4, atol=1e-6)
    backward = others.everyone().flip(0)
    torch.testing.assert_close(others.raw_scores(backward), block.flip(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        others.for_new_users(offsets[:2], items[: int(offsets[1])]).raw_scores(torch.tensor([0])), block[:1]
    )
    assert torch.equal(others.frozen().raw_scores(others.everyone()), block)
    explained = others.explain(torch.tensor([2]))
    torch.testing.assert_close(torch.stack(list(explained.values())).sum(0), block[2:3], rtol=1e-4, atol=1e-5)


def test_sampled_negatives_are_those_that_a_held_out_user_does_not_have(result: Result) -> None:
    """With all other items as negatives, the sampled evaluation is the full ranking."""
    whole = result.evaluate(ks=5)
    assert result.evaluate_sampled(n_negatives=result.dataset.n_items, ks=5)["hr@5"] == pytest.approx(whole["hr@5"])


def test_held_out_users_change_nothing_in_training(dataset: Dataset) -> None:
    """Neither the model nor the validation figures depend on the test part and on what is known of its users."""
    with_them = train("perfedrec_pp", dataset, **SHORT["perfedrec_pp"])
    without = train("perfedrec_pp", dataset.without_test(), **SHORT["perfedrec_pp"])
    assert with_them.valid == without.valid
    assert with_them.recommend(k=5).equals(without.recommend(k=5))


def test_popularity_counts_training_alone_and_leaves_out_what_a_new_user_has(dataset: Dataset) -> None:
    known, degrees = dataset.new_users, dataset.train.item_degrees
    assert known is not None
    hits = []
    for user in range(known.n_users):
        own = set(known.items[slice(*known.offsets[user : user + 2])].tolist())
        target = int(dataset.test.items[user])
        rest = [degrees[item] for item in range(dataset.n_items) if item not in own and item != target]
        above, equal = np.sum(rest > degrees[target]), np.sum(rest == degrees[target])
        hits.append((above + equal < 20, above < 20))
    low, high = np.mean(hits, axis=0)
    assert low <= popularity(dataset)["hr@20"] <= high
    assert high - low < 0.5


class ByUser(Method):
    """A method that knows the users of its training alone."""

    def init(self, data: Any, key: Any) -> Any:
        raise AssertionError("it must not be trained")

    def scores(self, state: Any, data: Any, users: torch.Tensor) -> torch.Tensor:
        return torch.zeros(users.numel(), data.n_items)


def test_a_method_that_cannot_serve_new_users_is_refused_before_training(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ByUser can recommend to users who were in training alone; expected"):
        train(ByUser(), dataset, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(AssertionError, match="it must not be trained"):
        train(ByUser(), dataset.without_test())


def test_a_held_out_user_is_not_among_the_users_of_training(dataset: Dataset) -> None:
    result = train("item_knn", dataset)
    assert dataset.new_users is not None
    user = int(dataset.new_users.user_ids[0])
    for ask in (result.recommend, result.explain):
        with pytest.raises(DataError, match=rf"user {user} is held out from training; expected a user of training"):
            ask(user)
    assert result.recommend(k=3)["user"].unique().sort().to_list() == dataset.train.user_ids.tolist()


@pytest.mark.parametrize("name", ["item_knn", "mf", "perfedrec_pp"])
def test_a_run_is_stored_and_opened_again(name: str, tmp_path: Path) -> None:
    options = {"data__split": "users", "data__test_users": 0.2, **SHORT.get(name, {})}
    result = train(name, DATA, output=tmp_path / "run", **options)
    again, config = open_run(tmp_path / "run")
    assert (config.data.split, config.data.test_users) == ("users", 0.2)
    assert again.dataset.fingerprint == result.dataset.fingerprint
    assert again.evaluate() == result.evaluate() == result.summary().test
    stored = pl.read_parquet(tmp_path / "run" / "test_users.parquet")
    assert stored.equals(result.per_user())
    assert stored["user"].to_list() == result.dataset.test.user_ids.tolist()


def test_an_audit_of_members_is_of_users_of_training(tmp_path: Path) -> None:
    """There are fewer held-out users than members, who have validation items alone."""
    options = {"data__split": "users", "rounds": 1, "selection__n_clients_per_round": 64}
    result = train("fedmf", DATA, output=tmp_path / "run", **options)
    assert result.dataset.test.n_users < result.dataset.n_users
    findings = {finding.attack for finding in audit(tmp_path / "run", trials=1000).findings}
    assert findings


def test_the_commands_split_by_users(tmp_path: Path) -> None:
    runner = CliRunner()
    made = runner.invoke(app, ["data", "prepare", DATA, "--test-users", "0.2", "--output", str(tmp_path / "set")])
    assert made.exit_code == 0, made.output
    assert "30 users are held out from training" in made.output
    named = ["--set", "data.split=users", "--set", "data.test_users=0.2"]
    tests = []
    for number, data in enumerate([[str(tmp_path / "set")], [DATA, *named]]):
        output = tmp_path / str(number)
        ran = runner.invoke(app, ["train", "--algorithm", "item_knn", "--output", str(output), "--data", *data])
        assert ran.exit_code == 0, ran.output
        tests.append(pl.read_parquet(output / "test_users.parquet"))
    assert tests[0].equals(tests[1])
    assert tests[0].height == 30
