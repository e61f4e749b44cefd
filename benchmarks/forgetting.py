"""Measure what the methods of forgetting reach and cost: the tables of docs/forgetting.md.

    PERFEDREC_TEST_DATA=FOLDER python benchmarks/forgetting.py [--only yelp ...] [--users 50] [--methods resum replay]

A run is trained with kept uploads, and some users of it, who are drawn at random among those with held-out items, are
forgotten at once: by training again (``exact``), and by each of the other methods. A second training without them, with
the next seed, says how far apart two good models are. Each line is one JSON object about one model: how often clients
were asked (a share of the run), the distance to the model that was trained again (``overlap@20``, ``scores``), the
membership AUC with its difference to who never took part and half of the 95 % interval, Recall@20 and NDCG@20 of the
others on the test split, and seconds. A method may have a share of its own, as in ``replay:0.2``.

With ``--alone N`` each of the first N drawn users is forgotten alone, too. These lines have the membership AUC over
all N, against the model without all users; with ``--exact-alone`` the first one has references of its own.

Kept uploads, which ``resum`` needs, take some gigabytes on the disk (``--output``, by default a folder that is removed
at the end).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perfedrec import Dataset, configure, load, train
from perfedrec.core.keys import Key, uniform
from perfedrec.forgetting import measures
from perfedrec.forgetting.forget import SHARES, Request, forget
from perfedrec.forgetting.measures import Membership
from perfedrec.runs.config import Config
from perfedrec.runs.forget_log import Limits
from perfedrec.runs.result import Result, open_run

DATA = {"synthetic": "synthetic:users=200,items=200", "ml-100k": "ml-100k/u.data", "yelp": "yelp"}
USERS = {"synthetic": 8, "ml-100k": 20, "yelp": 50}
"""How many users are forgotten at once, by default."""

METHODS = ("resum", "replay", "correction")
EVERYTHING = Limits(share=1.0, per_day=1_000_000)


@dataclass(frozen=True)
class Model:
    """A model without the users: its ``result``, how often clients were asked for it, and the seconds it took."""

    result: Result
    clients: int
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """A run in a ``folder`` by a ``config``, of a ``dataset`` whose ``users`` [k] are forgotten. ``before`` is the
    model with them, and ``again`` the one that was trained again without them."""

    folder: Path
    config: Config
    dataset: Dataset
    users: torch.Tensor
    before: Result
    again: Model

    @property
    def whole(self) -> Model:
        """The model before, with what it cost."""
        history = self.before.history
        return Model(self.before, sum(x.report.clients for x in history), sum(each.seconds for each in history))

    def line(self, model: Model) -> dict[str, Any]:
        """The figures of one model."""
        left = self.again.result
        apart = measures.distance(model.result.recommender, left.recommender, measures.remaining(left.dataset))
        seen, never = (self.membership(each) for each in (model.result, left))
        above, half = seen.above(never)
        figures = measures.accuracy(model.result.recommender, left.dataset).means()
        return rounded(
            {
                "clients asked": model.clients / self.whole.clients,
                "overlap@20": apart.overlap,
                "scores": apart.scores,
                "membership": seen.mean,
                "above never": above,
                "+-": half,
                "ndcg@20": figures["ndcg@20"],
                "recall@20": figures["recall@20"],
                "seconds": model.seconds,
            }
        )

    def membership(self, model: Result, users: Sequence[int] | None = None) -> Membership:
        """How well a model tells what these (or all forgotten) users had."""
        return measures.membership(model.recommender, self.dataset, self.users.tolist() if users is None else users)


def rounded(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures with four digits; nothing for what is no number."""
    return {name: None if np.isnan(value) else round(value, 4) for name, value in figures.items()}


def drawn(dataset: Dataset, number: int, seed: int) -> torch.Tensor:
    """A ``number`` of users [k] with two or more items of training and with held-out ones, drawn at random."""
    held = dataset.valid.degrees + dataset.test.degrees
    able = torch.from_numpy(np.flatnonzero((dataset.train.degrees > 1) & (held > 0)))
    return able[uniform(Key(seed).fold("forgotten").spread(able), 1).squeeze(1).argsort()[:number]]


def experiment(config: Config, dataset: Dataset, users: torch.Tensor, folder: Path) -> Experiment:
    """Train the run and the reference."""
    before = train(config, dataset, output=folder / "run")
    return Experiment(folder, config, dataset, users, before, exact(config, dataset, users))


def exact(config: Config, dataset: Dataset, users: torch.Tensor, more: int = 0) -> Model:
    """The model that is trained again without some users, with the run's seed or one that is larger by ``more``."""
    run = config.run.model_copy(update={"seed": config.run.seed + more, "keep_uploads": False})
    result = train(config.model_copy(update={"run": run}), dataset.without_users(ids(dataset, users)))
    return Model(result, sum(each.report.clients for each in result.history), sum(x.seconds for x in result.history))


def ids(dataset: Dataset, users: torch.Tensor) -> list[str]:
    return [str(each) for each in dataset.train.user_ids[users.numpy()]]


def way(text: str) -> tuple[str, float | None]:
    """A method and its share of the rounds, as in ``replay:0.2``."""
    name, _, share = text.partition(":")
    if name not in SHARES:
        raise argparse.ArgumentTypeError(f"{name} is no method; expected {', '.join(METHODS)}, or one with a share")
    return name, float(share) if share else None


def lines(tried: Experiment, methods: Sequence[tuple[str, float | None]]) -> Iterator[dict[str, Any]]:
    """One line for each model without all users."""
    yield {"model": "before"} | tried.line(tried.whole)
    yield {"model": "exact"} | tried.line(tried.again)
    yield {"model": "exact, next seed"} | tried.line(exact(tried.config, tried.dataset, tried.users, 1))
    for method, share in methods:
        found = forgotten(tried, tried.users, method, share, f"{method}-{share}")
        yield {"model": method, "share": SHARES[method] if share is None else share} | tried.line(found)


def forgotten(tried: Experiment, users: torch.Tensor, method: str, share: float | None, name: str) -> Model:
    """The model without some ``users`` by a method."""
    output, request = tried.folder / name, Request(ids(tried.dataset, users), method, share)
    certificate = forget(tried.folder / "run", request, output, data=tried.dataset, limits=EVERYTHING)
    return Model(open_run(output, tried.dataset, "cpu")[0], certificate.cost.clients, certificate.cost.seconds)


def alone(
    tried: Experiment, number: int, methods: Sequence[tuple[str, float | None]], again: bool
) -> Iterator[dict[str, Any]]:
    """The first users, each forgotten alone: one line for each method over all of them."""
    users = tried.users[:number]
    before, never = (tried.membership(each, users.tolist()) for each in (tried.before, tried.again.result))
    above, half = before.above(never)
    line: dict[str, Any] = {"alone": users.numel(), "model": "before"}
    reference = exact(tried.config, tried.dataset, users[:1]).result if again else None
    if reference is not None:
        second = exact(tried.config, tried.dataset, users[:1], 1).result
        yield {"alone": 1, "model": "exact, next seed"} | near(second, reference)
        line |= near(tried.before, reference)
    yield line | rounded({"above never": above, "+-": half})
    for method, share in methods:
        values, asked = list[float](), list[int]()
        line = {"alone": users.numel(), "model": method}
        for place, user in enumerate(users.split(1)):
            found = forgotten(tried, user, method, share, f"{method}-{share}-{place}")
            values += tried.membership(found.result, user.tolist()).values
            asked.append(found.clients)
            if reference is not None and not place:
                line |= near(found.result, reference)
        above, half = Membership(tuple(values)).above(never)
        mean = float(np.mean(asked)) / tried.whole.clients
        yield line | rounded({"clients asked": mean, "above never": above, "+-": half})


def near(model: Result, reference: Result) -> dict[str, Any]:
    """The distance of a model without the first user from the one that was trained again without it."""
    apart = measures.distance(model.recommender, reference.recommender, measures.remaining(reference.dataset))
    return rounded({"first: overlap@20": apart.overlap, "scores": apart.scores})


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*DATA], default=["ml-100k", "yelp"], help="data sets")
    parser.add_argument("--preset", default="recommended", help="preset, such as recommended or fedmf")
    parser.add_argument("--users", type=int, help=f"users who are forgotten at once (default: {USERS})")
    parser.add_argument("--methods", type=way, nargs="*", default=[(each, None) for each in METHODS])
    parser.add_argument("--alone", type=int, default=0, help="users who are forgotten alone")
    parser.add_argument("--exact-alone", action="store_true", help="train again without the first user alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run and of the draw of users")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--output", type=Path, help="new folder for runs (default: one that is removed)")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    given = os.environ.get("PERFEDREC_TEST_DATA")
    for name in args.only:
        if name != "synthetic" and not given:
            parser.error(f"{name} needs PERFEDREC_TEST_DATA; expected a folder with ml-100k and yelp")
        dataset = load(DATA[name] if name == "synthetic" else Path(given or "") / DATA[name])
        keep = any(method == "resum" for method, _ in args.methods)
        config = configure(args.preset, run__seed=args.seed, run__rounds=args.rounds, run__keep_uploads=keep)
        users, start = drawn(dataset, args.users or USERS[name], args.seed), time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.output or Path(temporary)) / name
            tried = experiment(config, dataset, users, folder)
            about = {"data": name, "preset": args.preset, "users": users.numel(), "rounds": args.rounds}
            for line in lines(tried, args.methods):
                print(json.dumps(about | line), flush=True)
            for line in alone(tried, args.alone, args.methods, args.exact_alone) if args.alone else ():
                print(json.dumps(about | line), flush=True)
        print(json.dumps({"data": name, "seconds in all": round(time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
