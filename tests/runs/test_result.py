"""What can be asked of a result: lists, vectors, curves, metrics by user, new users, saving and loading."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from perfedrec import CheckpointError, ConfigError, DataError, Dataset, Result, list_methods, load, open_run, train
from perfedrec.methods.centralised.vectors import FOLD_IN_L2, folded_in

DATA = "synthetic:users=200,items=120,clusters=3,interactions_per_user=12,seed=4"
SHORT: dict[str, dict[str, Any]] = {
    "mf": {"rounds": 4, "evaluate_every": 2, "method__learning_rate": 0.02, "method__batch_size": 256},
    "lightgcn": {"rounds": 4, "evaluate_every": 2, "method__learning_rate": 0.02, "method__batch_size": 256},
    "fedmf": {"rounds": 4, "evaluate_every": 2, "selection__n_clients_per_round": 64},
    "perfedrec_pp": {"rounds": 2, "evaluate_every": 2, "selection__n_clients_per_round": 64},
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load(DATA)


@pytest.fixture(scope="module", params=["item_knn", "mf", "perfedrec_pp"])
def result(request: Any, dataset: Dataset) -> Result:
    return train(request.param, dataset, **SHORT.get(request.param, {}))


def test_one_user_is_asked_for_by_one_id(result: Result) -> None:
    """A matrix product may differ in its last digits where it is for all users at once."""
    whole = result.recommend(k=5)
    first = int(result.dataset.train.user_ids[0])
    for asked in (first, str(first), np.int64(first), [first], pl.Series([first])):
        lists = result.recommend(asked, k=5)
        expected = whole.filter(pl.col("user") == first)
        assert lists.drop("score").equals(expected.drop("score"))
        assert lists["score"].to_list() == pytest.approx(expected["score"].to_list(), rel=1e-5)
        assert lists["rank"].to_list() == [1, 2, 3, 4, 5]


def test_the_cut_offs_of_an_evaluation_can_be_one_number_or_several(result: Result) -> None:
    several = result.evaluate("valid", ks=[5, 20])
    assert result.evaluate("valid", ks=5).items() <= several.items()
    assert several["recall@20"] == result.evaluate("valid")["recall@20"]
    with pytest.raises(ConfigError, match=r"the cut-offs ks are \[0\]"):
        result.evaluate(ks=0)


def test_metrics_by_user_have_the_means_of_the_evaluation(result: Result) -> None:
    frame, means = result.per_user(ks=5), result.evaluate(ks=5)
    assert frame.height == means["users"]
    for name in ("recall@5", "ndcg@5", "mrr@5"):
        assert frame[name].mean() == pytest.approx(means[name])
    train_part = result.dataset.train
    sizes = dict(zip(train_part.user_ids.tolist(), train_part.degrees.tolist(), strict=True))
    assert frame["interactions"].to_list() == [sizes[user] for user in frame["user"]]


def test_curves_have_a_row_for_each_round(result: Result) -> None:
    curves = result.curves()
    assert curves.height == len(result.history)
    assert curves["round"].to_list() == list(range(curves["round"][0], curves["round"][0] + curves.height))
    assert curves["round"][-1] == sum(entry.report.phase == "train" for entry in result.history)
    best = curves.filter(pl.col("round") == result.best_round)
    assert best["recall@20"].item() == result.valid["recall@20"]
    assert curves["bytes_up"].sum() == sum(entry.report.bytes_up for entry in result.history)


@pytest.mark.parametrize("name", ["mf", "lightgcn", "fedmf"])
def test_the_products_of_the_vectors_are_the_scores(name: str, dataset: Dataset) -> None:
    result = train(name, dataset, **SHORT[name])
    users, items = result.user_vectors, result.item_vectors
    assert users.columns == ["user", "vector"]
    assert users["user"].to_list() == dataset.train.user_ids.tolist()
    assert items["item"].to_list() == dataset.train.item_ids.tolist()
    scores = users["vector"].to_numpy() @ items["vector"].to_numpy().T
    lists = result.recommend(k=3)
    user = dict(zip(users["user"], range(users.height), strict=True))
    item = dict(zip(items["item"], range(items.height), strict=True))
    found = [scores[user[row["user"]], item[row["item"]]] for row in lists.to_dicts()]
    assert found == pytest.approx(lists["score"].to_list(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["item_knn", "popularity"])
def test_a_method_without_vectors_says_so(name: str, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"this method has no vectors of users and items.*for example mf, lightgcn"):
        _ = train(name, dataset).user_vectors


# --- new users ---


@pytest.mark.parametrize("name", ["popularity", "item_knn", "rp3beta", "spectral_filter"])
def test_a_method_by_items_ranks_for_a_new_user_as_for_a_known_one_with_the_same_items(
    name: str, dataset: Dataset
) -> None:
    result = train(name, dataset)
    user = int(dataset.train.degrees.argmax())
    own = dataset.train.item_ids[dataset.train.items[slice(*dataset.train.offsets[user : user + 2])]]
    known = result.recommend(int(dataset.train.user_ids[user]), k=dataset.n_items)
    new = result.recommend_for(reversed(own.tolist()), k=dataset.n_items)
    assert new.columns == ["item", "rank", "score"]
    assert new["score"].is_sorted(descending=True)
    scores = dict(known.select("item", "score").iter_rows())
    assert dict(new.select("item", "score").iter_rows()) == pytest.approx(scores, rel=1e-5, abs=1e-7)


def test_user_knn_weighs_all_known_users_by_their_overlap_with_a_new_one() -> None:
    """A new user with a and b: u has both (2 / 2), v has b of two (1 / 2); shrink 0. u also has c, v also has d."""
    rows = pl.DataFrame({"user": ["u", "u", "u", "v", "v"], "item": ["a", "b", "c", "b", "d"]})
    none = pl.DataFrame({"user": ["w"] * 2, "item": ["c", "d"]})
    data = load(pl.concat([rows, none]), split_how="leave-one-out", order="random")
    data = Dataset("all", *(three := _all_in_training(pl.concat([rows, none]))), data.notes)
    assert three[0].n_interactions == 7
    result = train("user_knn", data, method__shrink=0.0)
    lists = result.recommend_for(["a", "b"], k=4)
    assert lists["item"].to_list() == ["c", "d"]
    assert lists["score"].to_list() == pytest.approx([2 / np.sqrt(2 * 3), 1 / np.sqrt(2 * 2)])


def _all_in_training(rows: pl.DataFrame) -> tuple[Any, Any, Any]:
    from perfedrec import Interactions

    whole = Interactions.from_frame(rows)
    nothing = np.empty(0, dtype=np.int64)
    empty = Interactions.from_rows(whole.user_ids, whole.item_ids, nothing, nothing)
    return whole, empty, empty


def test_a_new_vector_is_at_the_minimum_of_its_loss() -> None:
    """The gradient of the loss over all pairs, written out pair by pair, is zero."""
    generator = np.random.default_rng(0)
    items, own = torch.tensor(generator.normal(size=(9, 3)), dtype=torch.float32), torch.tensor([1, 4])
    vector = folded_in(items, own).double().requires_grad_()
    pairs = [(i, j) for i in own.tolist() for j in range(9) if j not in own]
    loss = sum(torch.log1p(torch.exp(vector @ (items[j] - items[i]).double())) for i, j in pairs) / len(pairs)
    loss = loss + FOLD_IN_L2 / 2 * vector.square().sum()
    (gradient,) = torch.autograd.grad(loss, vector)
    assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["item_knn", "user_knn", "mf", "lightgcn", "fedmf", "perfedrec_pp"])
def test_a_new_user_gets_items_of_the_taste_that_the_given_items_have(name: str, dataset: Dataset) -> None:
    truth = dataset.truth
    assert truth is not None
    options = SHORT.get(name, {}) | ({"rounds": 20} if name in ("mf", "lightgcn") else {})
    result = train(name, dataset, **(options | ({"rounds": 60} if name == "fedmf" else {})))
    shares = []
    for taste in range(3):
        members = (truth.item_clusters == taste).nonzero()[0]
        popular = members[truth.popularity[members].argsort()[::-1]]
        given = [dataset.train.item_ids[item].item() for item in popular[:8]]
        lists = result.recommend_for(given, k=8)
        assert not set(lists["item"]) & set(given)
        found = [dataset.train.item_index(item) for item in lists["item"]]
        shares.append((truth.item_clusters[found] == taste).mean())
    assert np.mean(shares) > 0.6  # one third by chance


def test_a_new_user_is_served_twice_alike_and_leaves_no_trace(result: Result) -> None:
    before = result.recommend(k=5)
    items = result.dataset.train.item_ids[:4].tolist()
    first, second = result.recommend_for(items, k=5), result.recommend_for([*items, items[0]], k=5)
    assert first.equals(second)
    assert result.recommend(k=5).equals(before)


def test_what_is_wrong_about_a_new_user_is_said(result: Result) -> None:
    with pytest.raises(DataError, match="there is no item to recommend by"):
        result.recommend_for([])
    with pytest.raises(DataError, match="unknown item 'nothing'"):
        result.recommend_for(["nothing"])
    with pytest.raises(ConfigError, match="the length k of the list is 0"):
        result.recommend_for([0], k=0)


# --- saving and loading ---


@pytest.mark.parametrize("name", ["item_knn", "mf", "perfedrec_pp"])
def test_a_saved_result_is_the_run_that_training_would_have_written(
    name: str, dataset: Dataset, tmp_path: Path
) -> None:
    written = train(name, dataset, output=tmp_path / "written", **SHORT.get(name, {}))
    saved = train(name, dataset, **SHORT.get(name, {}))
    assert saved.save(str(tmp_path / "saved")) == tmp_path / "saved" == saved.output
    for file in ("config.toml", "result.json", "test_users.parquet"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "written" / file).read_bytes(), file
    assert saved.curves().drop("seconds").equals(written.curves().drop("seconds"))
    opened, config = open_run(str(tmp_path / "saved"), data=dataset)
    assert config == saved.config == opened.config
    assert opened.recommend(k=5).equals(saved.recommend(k=5))
    assert opened.evaluate() == json.loads((tmp_path / "saved" / "result.json").read_text())["test"]
    assert opened.curves().equals(saved.curves())
    assert Result.load(tmp_path / "saved", dataset).best_round == saved.best_round


def test_a_run_that_has_a_folder_is_copied_without_its_checkpoints(dataset: Dataset, tmp_path: Path) -> None:
    result = train("mf", dataset, output=str(tmp_path / "run"), **SHORT["mf"])
    result.save(tmp_path / "copy")
    assert not (tmp_path / "copy" / "checkpoints").exists()
    assert (tmp_path / "run" / "checkpoints").is_dir()
    again = Result.load(tmp_path / "copy", dataset)
    assert again.recommend(k=3).equals(result.recommend(k=3))
    again.save(tmp_path / "copy of the copy")
    with pytest.raises(ConfigError, match="is not empty; expected a new folder"):
        again.save(tmp_path / "copy")


def test_a_result_cannot_be_opened_with_other_data(dataset: Dataset, tmp_path: Path) -> None:
    train("item_knn", dataset).save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another data"):
        Result.load(tmp_path / "run", load(DATA.replace("seed=4", "seed=5")))


def test_a_data_set_in_memory_can_be_given_again_as_it_was(tmp_path: Path, dataset: Dataset) -> None:
    frame = dataset.train.frame()
    result = train("item_knn", frame, output=tmp_path / "run", data__k_core=2)
    assert Result.load(tmp_path / "run", frame).recommend(k=3).equals(result.recommend(k=3))


def test_a_result_is_described_in_one_line(result: Result) -> None:
    text = repr(result)
    assert result.config is not None
    assert text.startswith(f"<Result of {result.config.algorithm} on synthetic:users=200")
    assert f"best round {result.best_round}, recall@20 {result.valid['recall@20']:.4f}" in text
    assert len(repr(result.dataset)) < 200 > len(repr(result.dataset.train))


def test_all_methods_are_listed() -> None:
    assert {"popularity", "lightgcn", "perfedrec_pp"} <= set(list_methods())
    assert list_methods("centralised") + list_methods("federated") == list_methods()
    assert "lightgcn" not in list_methods("federated")
    with pytest.raises(ConfigError, match="there is no kind 'other'"):
        list_methods("other")  # type: ignore[arg-type]
