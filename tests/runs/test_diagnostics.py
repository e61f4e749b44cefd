"""What a run records beside its metrics: sizes, the geometry of its vectors, and the map of its users."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.decomposition import PCA
from tests.runs.small import DATA, SMALL

from perfedrec import configure, load, open_run, train
from perfedrec.core.keys import Key
from perfedrec.methods.registry import METHODS, centralised
from perfedrec.runs.diagnostics import geometry, principal, read_diagnostics
from perfedrec.runs.engine import engine
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.preset_files import default_preset

PRODUCTS = (
    "mf",
    "lightgcn",
    "direct_au",
    "spectral_filter",
    "fedmf",
    "fedgnn",
    "pfedrec",
    "fedrap",
    "fedcia",
    "colr",
    "pfedclr",
)


def run(folder: Path, rounds: int, **options: Any) -> Any:
    config = configure("recommended", overrides=[*SMALL, f"run.rounds={rounds}"])
    return train(config.build(), load(config.data.path), config.run, output=folder, config=config, **options)


def playing(name: str, rounds: int = 3) -> Any:
    """A method after a few rounds."""
    preset, own = default_preset(name), []
    if not centralised(METHODS[name]):
        own = ["selection.n_clients_per_round=40"]
    config = configure(preset, overrides=own, algorithm=name)
    here = engine(config.build(), load(DATA), seed=0, device="cpu")
    for _ in range(rounds if here.n_phases == 0 else here.n_phases):
        here.play()
    return here.recommender()


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_the_vectors_rank_as_the_method_does(name: str) -> None:
    recommender, users = playing(name), torch.arange(0, 150, 7)
    found, scores = recommender.embedding(users), recommender.raw_scores(users)
    products = found.users @ found.items.T
    shift = (scores - products).mean(1, keepdim=True)  # a user's own bias changes no ranking
    assert (scores - products - shift).abs().max() < 1e-5 * (1 + scores.abs().max())


@pytest.mark.parametrize("name", ["popularity", "item_knn", "rp3beta", "fedncf", "ptf_fedrec"])
def test_methods_whose_scores_are_not_products_have_no_vectors(name: str) -> None:
    recommender = playing(name)
    assert recommender.embedding(torch.arange(5)) is None
    assert geometry(recommender, Key(0)) is None


def test_geometry_follows_its_definition() -> None:
    recommender = playing("mf")
    found = geometry(recommender, Key(0))
    unit = {}
    everyone = recommender.embedding(torch.arange(150))
    for side in ("users", "items"):
        vectors = getattr(everyone, side).double().numpy()
        unit[side] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = [
        ((unit["users"][user] - unit["items"][item]) ** 2).sum()
        for user in range(150)
        for item in recommender.items[recommender.offsets[user] : recommender.offsets[user + 1]].tolist()
    ]
    assert found["alignment"] == pytest.approx(np.mean(distances), rel=1e-5)
    for side, each in unit.items():
        apart = ((each[:, None] - each[None]) ** 2).sum(2)[np.triu_indices(len(each), 1)]
        assert found[f"uniformity_{side}"] == pytest.approx(np.log(np.exp(-2 * apart).mean()), rel=1e-5)


def test_principal_components_equal_those_of_a_library() -> None:
    vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(60, 5)) * [5, 3, 1, 0.5, 0.1])
    places, shares = principal(vectors)
    theirs = PCA(2).fit(vectors.numpy())
    expected = theirs.transform(vectors.numpy())
    signs = np.sign((places.numpy() * expected).sum(0))
    assert np.allclose(places.numpy(), expected * signs, atol=1e-5)
    assert shares == pytest.approx(theirs.explained_variance_ratio_.tolist())
    flat, one = principal(torch.arange(4.0)[:, None])
    assert flat[:, 1].tolist() == [0.0] * 4
    assert one == [1.0, 0.0]


def test_a_run_records_the_geometry_of_its_moments_and_the_map_of_its_users(tmp_path: Path) -> None:
    run(tmp_path, 4)
    result, _ = open_run(tmp_path)
    notes, phases = read_diagnostics(tmp_path), json.loads((tmp_path / "result.json").read_text())["prelude"]
    assert notes is not None
    train_set = result.dataset.train
    assert notes["data"]["users"] == 150
    assert notes["data"]["train"] == train_set.n_interactions
    assert {name: each["round"] for name, each in notes["geometry"].items()} == {
        "start": -phases,
        "pretrained": 0,
        "best": result.best_round,
    }
    assert notes["geometry"]["best"] == {
        "round": result.best_round,
        **geometry(result.recommender, Key(0).fold("diagnostics")),  # type: ignore[dict-item]
    }
    # Random vectors are unrelated; after pre-training they are not.
    assert notes["geometry"]["start"]["alignment"] > 1.7
    assert notes["geometry"]["pretrained"]["alignment"] < 1.2
    users = pl.read_parquet(tmp_path / "user_map.parquet")
    assert users["user"].to_list() == train_set.user_ids.tolist()
    assert users["interactions"].to_list() == np.diff(train_set.offsets).tolist()
    found = result.recommender.embedding(torch.arange(150))
    assert users["cluster"].to_list() == ([None] * 150 if found.groups is None else found.groups.tolist())
    places, _ = principal(torch.nn.functional.normalize(found.users, dim=1))
    assert np.allclose(users.select("x", "y").to_numpy(), places.numpy(), atol=1e-6)


@pytest.mark.parametrize("privacy", [None, "secure"])
def test_clusters_are_those_that_the_clients_contribute_to(privacy: str | None) -> None:
    small = SMALL if privacy is None else [*SMALL, "privacy.min_clients=5"]  # of 150 users
    config = configure("perfedrec", overrides=small, privacy=privacy, algorithm="perfedrec_pp")
    here = engine(config.build(), load(config.data.path), seed=0, device="cpu")
    users = torch.arange(150)
    assert here.recommender().embedding(users).groups is None
    for _ in range(here.n_phases + 5):
        here.play()
    groups = here.recommender().embedding(users).groups
    assert len(groups.unique()) > 1
    state = here.recommender().state
    if privacy is None:
        assert torch.equal(groups, state.clusters.labels)
    else:  # the coordinator does not know them: clients assign themselves to the centroids
        assert state.clusters.labels is None
        assert groups.max() < state.clusters.centroids.shape[0]


def test_a_resumed_run_has_the_notes_of_a_run_without_an_interruption(tmp_path: Path) -> None:
    run(tmp_path / "whole", 4)
    run(tmp_path / "broken", 2)
    run(tmp_path / "broken", 4, resume=RunFolder(tmp_path / "broken").latest_checkpoint())
    for name in ("diagnostics.json", "user_map.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
