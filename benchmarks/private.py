"""Measure the accuracy of profile private (user-level differential privacy) over epsilons and populations.

    python benchmarks/private.py --data FOLDER [--dim 8] [--epsilons 2 4 8] [--seeds 0 1 2] [--copies 10] [--threads 2]

``--data`` also accepts ``synthetic:users=50000,items=7000``. ``--copies N`` makes a larger population of a data set by
counting each of its users N times. Each result is one JSON line: popularity (the lower bound), the test metrics of the
round that validation chose without noise (the upper bound), the same for each epsilon, and the ratios to both bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from perfedrec import Config, Dataset, Interactions, configure, load, train
from perfedrec.runs.result import popularity

NOISELESS = ("privacy.epsilon=off", "privacy.noise.degrees=1e-9", "privacy.noise.spectral=1e-9")
"""The same computation, with noise that is too small to matter."""


def repeated(part: Interactions, copies: int) -> Interactions:
    """The same interactions with every user repeated ``copies`` times."""
    sizes = np.diff(part.offsets)
    return replace(
        part,
        user_ids=np.arange(part.n_users * copies),
        offsets=np.concatenate([[0], np.cumsum(np.tile(sizes, copies))]),
        items=np.tile(part.items, copies),
        timestamps=None,
    )


def measure(dataset: Dataset, label: str, seeds: Sequence[int], overrides: Sequence[str]) -> float:
    """Print figures of profile private with ``overrides`` under ``label``; return the mean test NDCG@20."""
    tests, valids, start = [], [], time.perf_counter()
    for seed in seeds:
        config = private(*overrides, f"run.seed={seed}")
        result = train(config.build(), dataset, config.run)
        tests.append(result.evaluate("test"))
        valids.append(result.valid["ndcg@20"])
    values = [test["ndcg@20"] for test in tests]
    details = {
        "users": dataset.n_users,
        "test_ndcg@20": [round(value, 4) for value in values],
        "test_recall@20": round(statistics.mean(test["recall@20"] for test in tests), 4),
        "valid_ndcg@20": round(statistics.mean(valids), 4),
        "seconds_a_run": round((time.perf_counter() - start) / len(seeds), 1),
    }
    print(json.dumps({"figure": label, "value": round(statistics.mean(values), 5), **details}), flush=True)
    return statistics.mean(values)


def private(*overrides: str) -> Config:
    return configure("recommended", privacy="private", overrides=overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.txt, valid.txt and test.txt, or synthetic:...")
    parser.add_argument("--copies", type=int, default=1, help="how many times each user is counted")
    parser.add_argument("--dim", type=int, default=8, help="embedding dimension")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0], help="epsilons at delta 1e-5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="more options, as section.key=value")
    parser.add_argument("--threads", type=int, default=2, help="threads of the numerical library")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = load(args.data)
    if args.copies > 1:
        parts = {part: repeated(getattr(dataset, part), args.copies) for part in ("train", "valid", "test")}
        dataset = replace(dataset, name=f"{dataset.name} x {args.copies}", **parts)
    overrides = [f"model.embedding_dim={args.dim}", *args.overrides]
    floor = popularity(dataset)["ndcg@20"]
    print(json.dumps({"figure": "popularity", "value": round(floor, 5), "users": dataset.n_users}), flush=True)
    ceiling = measure(dataset, "without noise", args.seeds, [*NOISELESS, *overrides])
    for epsilon in args.epsilons:
        value = measure(dataset, f"epsilon {epsilon:g}", args.seeds, [f"privacy.epsilon={epsilon}", *overrides])
        ratios = {"over_popularity": round(value / floor, 2), "of_noiseless": round(value / ceiling, 3)}
        print(json.dumps({"figure": f"epsilon {epsilon:g}, ratios", "dim": args.dim, **ratios}), flush=True)


if __name__ == "__main__":
    main()
