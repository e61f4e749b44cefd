"""Measure on which data clusters of users, users' own rows and learned weights of the mix pay.

    PERFEDREC_TEST_DATA=FOLDER python benchmarks/personalisation.py [--only facets lastfm ...] [--rounds 100]

FOLDER holds ``ml-100k``, ``lastfm`` and ``yelp``; without it the planted data alone are measured. ``domains`` is one
federation of the users of Last.fm and of MovieLens, who have no item in common. On each data set preset ``recommended``
is trained with clusters and without, and on planted data with clusters that are found during training (``late``) or
that learn faster (``fast``). The weights of the mix do not change this training, so that each mix is a figure of the
same models; learned weights are learned beside it. Each variant has the round that is best on validation data, and is
ranked on the test split once. The differences are paired over users, with the test of ``perfedrec bench``. Each result
is one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from perfedrec import Dataset, configure, load
from perfedrec.core.keys import Key
from perfedrec.core.records import copied
from perfedrec.evaluation import Recommender
from perfedrec.evaluation.significance import adjusted, compare
from perfedrec.runs.result import ranking
from perfedrec.runtimes.simulator import PersonalRecommender, Simulator

PLANTED = {
    "synthetic": ("synthetic:users=2000,items=1500", 64),
    "facets": ("synthetic:users=3000,items=1500,clusters=20,facets=4,interactions_per_user=20", 64),
    "facets, d = 16": ("synthetic:users=3000,items=1500,clusters=20,facets=4,interactions_per_user=20", 16),
}
REAL = {"domains": "", "ml-100k": "ml-100k/u.data", "lastfm": "lastfm", "yelp": "yelp"}
TRAININGS: dict[str, dict[str, Any]] = {
    "none": {"clusters__n_clusters": 0},
    "late": {"pretraining__cluster_passes": 0},
    "clusters": {"personal__learned": True},
    "fast": {"clusters__learning_rate": 1.0},
}
EXTRA = ("late", "fast")
"""Trainings for planted data alone."""

EVERY = 50
"""Rounds between two evaluations on validation data."""


@dataclass(frozen=True)
class Variant:
    """A ``training``, whether own rows are mixed in (otherwise the cluster's and the global model share their weight),
    and whether the weights are ``learned``, from those of the preset on."""

    training: str
    local: bool = True
    learned: bool = False


VARIANTS = {
    "nothing personal": Variant("none", local=False),
    "own rows": Variant("none"),
    "clusters from round 41": Variant("late", local=False),
    "clusters": Variant("clusters", local=False),
    "clusters, learning rate 1": Variant("fast", local=False),
    "clusters and own rows (preset)": Variant("clusters"),
    "the same, learned weights": Variant("clusters", learned=True),
}


def triples(dataset: Dataset, name: str) -> Iterator[pl.DataFrame]:
    """Train, valid and test of a data set, with ids that begin with its ``name``."""
    for part in (dataset.train, dataset.valid, dataset.test):
        users, items = part.user_ids[part.users_of_rows()], part.item_ids[part.items]
        yield pl.DataFrame({"user": [f"{name} {each}" for each in users], "item": [f"{name} {each}" for each in items]})


def domains(folder: Path) -> Dataset:
    """Last.fm and MovieLens as one federation."""
    both = [triples(load(folder / REAL[name]), name) for name in ("lastfm", "ml-100k")]
    train, valid, test = (pl.concat(parts) for parts in zip(*both, strict=True))
    return load(train=train, valid=valid, test=test)


def mixed(found: PersonalRecommender[Any, Any, Any], variant: Variant) -> Recommender:
    """The recommender with a variant's weights of the mix."""
    records, algorithm = found.records(), found.algorithm
    if variant.learned:
        return found
    personal = algorithm.settings.personal
    if not variant.local:
        half = personal.local / 2
        update = {"local": 0.0, "cluster": personal.cluster + half, "global_": personal.global_ + half}
        personal = personal.model_copy(update=update)
    chosen = type(algorithm)(algorithm.settings.model_copy(update={"personal": personal}))
    rows, _ = found.population.rows(torch.arange(1))
    mix = chosen.init_clients(rows, Key(0)).mix.expand_as(records["memory"].mix)
    return found.with_records(records | {"memory": replace(records["memory"], mix=mix.clone())})


def played(dataset: Dataset, training: str, dim: int, seed: int, rounds: int) -> dict[str, tuple[float, Recommender]]:
    """The variants of a training: validation Recall@20 and recommender of the best round."""
    fixed: dict[str, Any] = {"personal__neighbourhood": 0.0, "personal__chosen": False}
    config = configure("recommended", model__embedding_dim=dim, **fixed, **TRAININGS[training])
    simulator: Simulator[Any, Any, Any] = Simulator(config.build(), dataset, seed=seed)
    best: dict[str, tuple[float, Recommender]] = {}
    wanted = {name: variant for name, variant in VARIANTS.items() if variant.training == training}
    for trained in range(1 - simulator.n_phases, rounds + 1):
        simulator.play()
        if trained < 0 or (trained % EVERY and trained < rounds):
            continue
        here = simulator.recommender()
        for name, variant in wanted.items():
            recommender, held, hide = ranking(mixed(here, variant), dataset, "valid")
            value = recommender.evaluate(held, (20,), hide)["recall@20"]
            if name not in best or value > best[name][0]:
                kept = here.with_records({key: copied(record) for key, record in here.records().items()})
                best[name] = (value, mixed(kept, variant))
    return best


def tested(dataset: Dataset, recommender: Recommender) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Test metrics, and the NDCG@20 of each tested user."""
    recommender, held, hide = ranking(recommender, dataset, "test")
    totals = recommender.rank(held, (20,), hide)
    users = torch.cat([users for users, _ in totals.cases])
    values = torch.cat([values["ndcg@20"] for _, values in totals.cases])
    return totals.means(), values[users.argsort()].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PLANTED, *REAL], help="data sets (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="planted data of a fifth of the users and items")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = os.environ.get("PERFEDREC_TEST_DATA")
    for name in args.only or [*PLANTED, *(REAL if folder else {})]:
        if name in PLANTED:
            spec, dim = PLANTED[name]
            dataset = load(
                spec.replace("000", "00").replace("1500", "300").replace("=20", "=5") if args.small else spec
            )
        elif not folder:
            parser.error(f"{name} needs PERFEDREC_TEST_DATA; expected a folder with {', '.join(filter(None, REAL))}")
        else:
            dim, dataset = 64, domains(Path(folder)) if name == "domains" else load(Path(folder) / REAL[name])
        measure(name, dataset, dim, args)


def measure(name: str, dataset: Dataset, dim: int, args: argparse.Namespace) -> None:
    """Print one line for each variant on a data set."""
    trainings = [each for each in TRAININGS if each not in EXTRA or name in PLANTED]
    found: dict[str, list[tuple[float, dict[str, float], NDArray[np.float64]]]] = {}
    start = time.process_time()
    for seed in args.seeds:
        for training in trainings:
            for variant, (valid, best) in played(dataset, training, dim, seed, args.rounds).items():
                found.setdefault(variant, []).append((valid, *tested(dataset, best)))
    users = {variant: np.mean([values for _, _, values in runs], axis=0) for variant, runs in found.items()}
    reference = next(iter(VARIANTS))
    others = [variant for variant in VARIANTS if variant in found and variant != reference]
    comparisons = {variant: compare(users[variant], users[reference]) for variant in others}
    p = dict(zip(others, adjusted([comparisons[each].p for each in others]), strict=True))
    for variant in [reference, *others]:
        runs = found[variant]
        line = {"data": name, "variant": variant, "seeds": args.seeds, "rounds": args.rounds}
        line["valid recall@20"] = round(float(np.mean([valid for valid, *_ in runs])), 4)
        for metric in ("recall@20", "ndcg@20"):
            figures = [metrics[metric] for _, metrics, _ in runs]
            line[metric] = round(float(np.mean(figures)), 4)
            line[f"{metric} sd"] = round(float(np.std(figures, ddof=1)), 4) if len(figures) > 1 else None
        if variant in comparisons:
            line |= {"difference": round(comparisons[variant].difference, 4), "p": round(p[variant], 4)}
        print(json.dumps(line), flush=True)
    print(json.dumps({"data": name, "processor_seconds": round(time.process_time() - start)}), flush=True)


if __name__ == "__main__":
    main()
