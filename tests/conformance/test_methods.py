"""Every method, federated or not, in the same tests, on small data with planted clusters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perfedrec import Dataset, configure, load, open_run, train
from perfedrec.methods.registry import METHODS, centralised
from perfedrec.runs.engine import engine
from perfedrec.runs.preset_files import default_preset

NAMES = list(METHODS)
TRAINED = [name for name in NAMES if not centralised(METHODS[name]) or METHODS[name].trained]
DATA = "synthetic:users=300,items=200,clusters=4,interactions_per_user=12,seed=2,relations=6"
SHORT = ("selection.n_clients_per_round=64", "clusters.start=2", "clusters.every=3")

PLANTED = {  # with four tastes in all, most users of a batch are alike, and pushing all apart hurts
    "sgl": ("method.weight=0.02",),
    "simgcl": ("method.weight=0.02",),
    "xsimgcl": ("method.weight=0.02",),
    "direct_au": ("method.gamma=0.2",),
}

SMALLER = {  # to take less time, and to reach all that a method does
    "ssl4rec": ("method.hidden_dim=64",),
    "mixgcf": ("method.n_candidates=8",),
    "sept": ("method.warmup=1",),
}


def config(
    name: str,
    rounds: int,
    *more: str,
    path: str = DATA,
) -> Any:
    preset = default_preset(name)
    own: list[str] = [*SMALLER.get(name, ())]
    if name in TRAINED:
        own += [f"run.rounds={rounds}", "run.evaluate_every=5"]
    steps = centralised(METHODS[name]) and "learning_rate" in METHODS[name].Options.model_fields
    if steps:  # few interactions, and so few steps an epoch
        own += ["method.learning_rate=0.02", "method.batch_size=512"]
    if centralised(METHODS[name]) and METHODS[name].sequential:
        own += ["method.embedding_dim=16", "method.n_blocks=1", "method.batch_size=50", "method.learning_rate=0.01"]
    if name in ("spectral_filter", "gf_cf"):
        own += ["method.n_components=4"]
    if not centralised(METHODS[name]):
        own += [each for each in SHORT if each.split(".")[0] in configure(preset, algorithm=name).model_dump()]
    return configure(preset, overrides=[*own, *more], algorithm=name, data__path=DATA)


def data() -> Dataset:
    return load(DATA)


def run(name: str, rounds: int, dataset: Dataset | None = None, **options: Any) -> Any:
    chosen = config(name, rounds)
    return train(chosen.build(), dataset or data(), chosen.run, config=chosen, **options)


def lists(result: Any) -> list[int]:
    return result.recommend(None, 10)["item"].to_list()


@pytest.mark.parametrize("name", NAMES)
def test_planted_tastes_are_found(name: str) -> None:
    """There are four tastes, each with a quarter of the items: most recommended items belong to the user's own taste. A
    list without regard to taste has a quarter of them."""
    dataset = data()
    truth = dataset.truth
    assert truth is not None
    federated = not centralised(METHODS[name])
    rounds = 150 if federated else 30
    chosen = config(name, rounds, *PLANTED.get(name, ()), *(("run.evaluate_every=50",) if federated else ()))
    result = train(chosen.build(), dataset, chosen.run, config=chosen)
    items, _ = result.recommender.recommend(torch.arange(dataset.n_users), 10)
    share = (truth.item_clusters[items.numpy()] == truth.user_clusters[:, None]).mean()
    assert (share > 0.5) == (name != "popularity")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_determined_by_its_seed(name: str) -> None:
    assert lists(run(name, 2)) == lists(run(name, 2))
    fixed = ("personal.chosen=false",) if name == "perfedrec_pp" else ()  # or else a model without a seed is chosen
    one, other = (config(name, 2, f"run.seed={seed}", *fixed) for seed in (0, 1))
    found = [lists(train(each.build(), data(), each.run, config=each)) for each in (one, other)]
    assert (found[0] != found[1]) == (name in TRAINED)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_data_cannot_reach_training(name: str) -> None:
    """The same training data with other held-out interactions give the same model, and the same negatives."""
    dataset = data()
    generator = np.random.default_rng(0)
    outside = [
        generator.choice(np.setdiff1d(np.arange(dataset.n_items), dataset.train.items[a:b]), 1)
        for a, b in zip(dataset.train.offsets[:-1], dataset.train.offsets[1:], strict=True)
    ]
    items = np.concatenate(outside)
    other = replace(dataset.valid, offsets=np.arange(items.size + 1), items=items, timestamps=None)
    scores = []
    for given in (dataset, replace(dataset, valid=other, test=other)):
        here = engine(config(name, 2).build(), given, seed=0, device="cpu")
        for _ in range(here.n_phases + (3 if name in TRAINED else 0)):
            here.play()
        scores.append(here.recommender().raw_scores(torch.arange(dataset.n_users)))
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_run_recommends_the_same_and_no_seen_items(name: str, tmp_path: Path) -> None:
    chosen = config(name, 2)
    dataset = data()
    result = train(chosen.build(), dataset, chosen.run, config=chosen, output=tmp_path / "run")
    opened, _ = open_run(tmp_path / "run", data=None)
    assert lists(opened) == lists(result)
    assert opened.evaluate("test") == json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    users = torch.arange(dataset.n_users)
    recommended, _ = opened.recommender.recommend(users, 10)
    for user in range(0, dataset.n_users, 7):
        own = dataset.train.items[dataset.train.offsets[user] : dataset.train.offsets[user + 1]]
        assert not set(recommended[user].tolist()) & set(own.tolist())


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    from perfedrec.runs.folder import RunFolder

    short, long = (config(name, rounds, "run.evaluate_every=1") for rounds in (2, 4))
    train(short.build(), data(), short.run, config=short, output=tmp_path / "run")
    checkpoint = RunFolder(tmp_path / "run").latest_checkpoint()
    resumed = train(long.build(), data(), long.run, config=long, output=tmp_path / "run", resume=checkpoint)
    assert lists(resumed) == lists(train(long.build(), data(), long.run, config=long))


@pytest.mark.parametrize("name", NAMES)
def test_methods_name_their_paper_and_their_differences_from_it(name: str) -> None:
    own = METHODS[name].__doc__ or ""
    text = own + (__import__(METHODS[name].__module__, fromlist=["_"]).__doc__ or "")
    assert name == "popularity" or any(str(year) in text for year in range(1994, 2027))
    assert "depart" in own.lower()
