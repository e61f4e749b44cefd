"""Measure on which data clusters of users, users' own rows and learned weights of the mix pay.

    PERFEDREC_TEST_DATA=FOLDER python benchmarks/personalisation.py [--only facets lastfm ...] [--rounds 100]

FOLDER holds ``ml-100k``, ``lastfm`` and ``yelp``; without it the planted data alone are measured. ``two domains`` is
one federation of the users of Last.fm and of MovieLens, ``three domains`` has those of Yelp as well: they have no item
in common. In ``shared items`` the items of Last.fm and of MovieLens that are equally popular are one item: users have
the same items and different tastes. Such data are also trained as one federation for each domain, with as many uploads
a client.

On each data set preset ``recommended`` is trained with clusters and without, and on some with clusters that are found
during training (``late``) or that learn faster (``fast``). The weights of the mix do not change this training, so that
each mix is a figure of the same models; learned weights are learned beside it. Each variant has the round that is best
on validation data, and is ranked on the test split once. The differences are paired over users, with the test of
``perfedrec bench``. Each result is one JSON line.

These trainings leave out the neighbourhood model and the choice of weights by held-out items, to show what the others
do. ``--whole`` trains the preset as it is instead, on several domains as one federation and for each domain.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from perfedrec import Dataset, configure, load, train
from perfedrec.core.keys import Key
from perfedrec.evaluation import Recommender, Totals
from perfedrec.evaluation.significance import adjusted, compare
from perfedrec.runs.result import ranking
from perfedrec.runtimes.population import USERS_OF
from perfedrec.runtimes.simulator import PersonalRecommender, Simulator

PLANTED = {
    "synthetic": ("synthetic:users=2000,items=1500", 64),
    "facets": ("synthetic:users=3000,items=1500,clusters=20,facets=4,interactions_per_user=20", 64),
    "facets, d = 16": ("synthetic:users=3000,items=1500,clusters=20,facets=4,interactions_per_user=20", 16),
}
REAL = {"ml-100k": "ml-100k/u.data", "lastfm": "lastfm", "yelp": "yelp"}
JOINED = {
    "two domains": ("lastfm", "ml-100k"),
    "three domains": ("lastfm", "ml-100k", "yelp"),
    "shared items": ("lastfm", "ml-100k"),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "none": {"clusters__n_clusters": 0},
    "late": {"pretraining__cluster_passes": 0},
    "clusters": {"personal__learned": True},
    "fast": {"clusters__learning_rate": 1.0},
}
EXTRA = {"late": [*PLANTED], "fast": [*PLANTED, *JOINED]}
"""Trainings for some data alone."""

APART = "a federation for each domain"
"""The variant in which the preset is trained on each domain by itself."""

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


def parts(dataset: Dataset, name: str, shared: bool) -> Iterator[pl.DataFrame]:
    """Train, valid and test of a data set, with ids of users that begin with its ``name``. So do those of items, or
    they are the items' ranks by popularity if domains have ``shared`` items."""
    ranks = np.empty(dataset.n_items, dtype=np.int64)
    ranks[np.argsort(-dataset.train.item_degrees, kind="stable")] = np.arange(dataset.n_items)
    names = ranks.astype(str) if shared else np.array([f"{name} {each}" for each in dataset.train.item_ids])
    for part in (dataset.train, dataset.valid, dataset.test):
        users = [f"{name} {each}" for each in part.user_ids[part.users_of_rows()]]
        yield pl.DataFrame({"user": users, "item": names[part.items]})


def joined(sets: Mapping[str, Dataset], shared: bool) -> Dataset:
    """Several data sets as one federation."""
    every = [parts(dataset, name, shared) for name, dataset in sets.items()]
    train, valid, test = (pl.concat(each) for each in zip(*every, strict=True))
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
    mix = chosen.init_clients(rows, Key(0)).mix.expand(found.population.n_users, -1)
    memory = {name: value for name, value in records["memory"].items() if name != USERS_OF + "mix"}
    return found.with_records(records | {"memory": memory | {"mix": mix}})


def played(
    dataset: Dataset, training: str, dim: int, seed: int, rounds: int, n_clients: int = 256
) -> dict[str, tuple[float, Recommender]]:
    """The variants of a training: validation Recall@20 and recommender of the best round."""
    fixed: dict[str, Any] = {"personal__neighbourhood": 0.0, "personal__chosen": False}
    fixed["selection__n_clients_per_round"] = n_clients
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
                best[name] = (value, mixed(here.frozen(), variant))
    return best


def tested(dataset: Dataset, recommender: Recommender) -> Tested:
    """Recall@20 and NDCG@20 of each tested user by id."""
    recommender, held, hide = ranking(recommender, dataset, "test")
    return by_user(dataset, recommender.rank(held, (20,), hide))


def by_user(dataset: Dataset, totals: Totals) -> Tested:
    """The same, of ``totals`` over users."""
    found: Tested = {}
    for users, values in totals.cases:
        pairs = zip(values["recall@20"].tolist(), values["ndcg@20"].tolist(), strict=True)
        found |= dict(zip(dataset.train.user_ids[users.numpy()].tolist(), pairs, strict=True))
    return found


Tested = dict[str, tuple[float, float]]
Run = tuple[float, Tested]
"""Validation Recall@20 and the test figures of a run."""


def apart(sets: Mapping[str, Dataset], training: str, dim: int, seed: int, rounds: int, n_clients: int) -> Run:
    """The preset on each domain by itself. A domain's share of the clients of a round is its share of users."""
    total, valid, found = sum(each.n_users for each in sets.values()), 0.0, {}
    preset = "clusters and own rows (preset)"
    for name, dataset in sets.items():
        share = dataset.n_users / total
        value, best = played(dataset, training, dim, seed, rounds, max(round(n_clients * share), 1))[preset]
        valid += value * share
        found |= {f"{name} {user}": values for user, values in tested(dataset, best).items()}
    return valid, found


def whole(name: str, sets: Mapping[str, Dataset], dataset: Dataset, args: argparse.Namespace) -> None:
    """Print one line for each seed: the preset as it is, as one federation and for each domain, and how much a domain
    of its own gains each domain's users in NDCG@20, with p."""
    for seed in args.seeds:
        began = time.process_time()
        options = {"rounds": args.rounds, "evaluate_every": EVERY // 2, "seed": seed}
        together, alone = train("perfedrec_pp", dataset, **options), dict[str, Any]()
        found, own = by_user(dataset, together.rank("test")), dict[str, Tested]()
        for domain, each in sets.items():
            n_clients = max(round(args.clients * each.n_users / dataset.n_users), 1)
            alone[domain] = train("perfedrec_pp", each, selection__n_clients_per_round=n_clients, **options)
            users = by_user(each, alone[domain].rank("test"))
            own[domain] = {f"{domain} {user}": values for user, values in users.items()}
        line: dict[str, Any] = {"data": name, "seed": seed, "rounds": args.rounds}
        line["valid recall@20 together"] = round(together.valid["recall@20"], 4)
        line["best rounds"] = [together.best_round, *(each.best_round for each in alone.values())]
        for domain, values in own.items():
            pairs = np.array([[found[user], values[user]] for user in sorted(values)])
            means, difference = pairs.mean(axis=0).round(4).tolist(), compare(pairs[:, 1, 1], pairs[:, 0, 1])
            line[domain] = {"together": means[0], "alone": means[1], "difference": round(difference.difference, 4)}
            line[domain]["p"] = round(difference.p, 4)
        print(json.dumps(line | {"processor_seconds": round(time.process_time() - began)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PLANTED, *REAL, *JOINED], help="data sets (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=256, help="clients in a round")
    parser.add_argument("--whole", action="store_true", help="the preset as it is, for several domains")
    parser.add_argument("--small", action="store_true", help="planted data of a fifth of the users and items")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = os.environ.get("PERFEDREC_TEST_DATA")
    for name in args.only or [*PLANTED, *((*REAL, *JOINED) if folder else ())]:
        sets, dim = dict[str, Dataset](), 64
        if name in PLANTED:
            spec, dim = PLANTED[name]
            dataset = load(
                spec.replace("000", "00").replace("1500", "300").replace("=20", "=5") if args.small else spec
            )
        elif not folder:
            parser.error(f"{name} needs PERFEDREC_TEST_DATA; expected a folder with {', '.join(REAL)}")
        elif name in JOINED:
            sets = {each: load(Path(folder) / REAL[each]) for each in JOINED[name]}
            dataset = joined(sets, name == "shared items")
        else:
            dataset = load(Path(folder) / REAL[name])
        if args.whole and sets:
            whole(name, sets, dataset, args)
        else:
            measure(name, dataset, sets, dim, args)


def measure(name: str, dataset: Dataset, sets: Mapping[str, Dataset], dim: int, args: argparse.Namespace) -> None:
    """Print one line for each variant on a data set, which may be ``sets`` of several domains."""
    trainings = [each for each in TRAININGS if name in EXTRA.get(each, [name])]
    found: dict[str, list[Run]] = {}
    start = time.process_time()
    for seed in args.seeds:
        given = dim, seed, args.rounds, args.clients
        for training in trainings:
            for variant, (valid, best) in played(dataset, training, *given).items():
                found.setdefault(variant, []).append((valid, tested(dataset, best)))
        if sets:
            found.setdefault(APART, []).append(apart(sets, "clusters", *given))
    found = {variant: found[variant] for variant in (*VARIANTS, APART) if variant in found}
    users = {variant: np.mean([list(ndcg(run)) for run in runs], axis=0) for variant, runs in found.items()}
    reference, *others = found
    comparisons = {variant: compare(users[variant], users[reference]) for variant in others}
    p = dict(zip(others, adjusted([comparisons[each].p for each in others]), strict=True))
    for variant, runs in found.items():
        line = {"data": name, "variant": variant, "seeds": args.seeds, "rounds": args.rounds}
        line["valid recall@20"] = round(float(np.mean([valid for valid, _ in runs])), 4)
        for place, metric in enumerate(("recall@20", "ndcg@20")):
            figures = [float(np.mean([each[place] for each in run.values()])) for _, run in runs]
            line[metric] = round(float(np.mean(figures)), 4)
            line[f"{metric} sd"] = round(float(np.std(figures, ddof=1)), 4) if len(figures) > 1 else None
        if variant in comparisons:
            line |= {"difference": round(comparisons[variant].difference, 4), "p": round(p[variant], 4)}
        for each in sets:
            own = [values for _, run in runs for user, values in run.items() if user.startswith(f"{each} ")]
            line[each] = [round(float(value), 4) for value in np.mean(own, axis=0)]
        print(json.dumps(line), flush=True)
    print(json.dumps({"data": name, "processor_seconds": round(time.process_time() - start)}), flush=True)


def ndcg(run: Run) -> Iterator[float]:
    """NDCG@20 of each user, in the order of ids."""
    return (run[1][user][1] for user in sorted(run[1]))


if __name__ == "__main__":
    main()
