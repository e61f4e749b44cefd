"""Train a graph model of the public SELFRec and time its epochs. It runs in a virtual environment of its own, and is
called by benchmarks/peers.py.

    python selfrec.py CHECKOUT DATA.npz --model BUIR --epochs 3 [--every 1] [--seed 0] [--learning-rate 0.001]

The file has ``users`` and ``items``, one of each per training interaction, ``shape``, and the held-out pairs
``valid_users``, ``valid_items``, ``test_users`` and ``test_items``. The code asks for a GPU everywhere: what it moves
there stays where it is. In place of its own evaluation, which takes the test data after each epoch, validation and
test NDCG@20 are computed here: training items are not recommended, and validation items not in the test. Prints one
JSON line: the processor seconds of each epoch, without evaluation, and both figures of those that are evaluated.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

K = 20

CLUSTERS = 100
"""Of NCL, as here: its configuration has 2000, which is more than small data have users."""


def ndcg(scores: np.ndarray, hidden: np.ndarray, held: np.ndarray) -> float:
    """The mean NDCG@20 of users with ``held`` items, bool [n, m]; ``hidden`` ones are not recommended."""
    order = np.argsort(-np.where(hidden, -np.inf, scores), axis=1, kind="stable")[:, :K]
    gains = np.take_along_axis(held, order, 1) / np.log2(np.arange(2, K + 2))
    best = np.cumsum(1 / np.log2(np.arange(2, K + 2)))
    wanted = held.sum(1)
    users = wanted > 0
    return float((gains.sum(1)[users] / best[np.minimum(wanted[users], K) - 1]).mean())


Measure = Callable[[Path, dict[str, np.ndarray], argparse.Namespace], dict[str, Any]]
"""What a program measures with a checkout, the arrays of its file and its arguments."""


def main(description: str | None, measure: Measure) -> None:
    """Read the arguments, measure, and print the result."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data")
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--every", type=int, default=1, help="epochs between evaluations, from the first; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="step of Adam (default: that of the configuration)")
    parser.add_argument("--gamma", type=float, help="of DirectAU (default: that of the configuration)")
    given = parser.parse_args()
    with np.load(given.data) as stored:
        data = dict(stored)
    code = given.folder.resolve()
    os.chdir(tempfile.mkdtemp())  # the code writes its log and results below the working directory
    sys.path.insert(0, str(code))
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(code, data, given)
    print(json.dumps(result))


def configuration(code: Path, given: argparse.Namespace) -> Any:
    """The public configuration of a model, with the given epochs and step."""
    conf = importlib.import_module("util.conf").ModelConf(str(code / "conf" / f"{given.model}.yaml"))
    conf.config |= {"max.epoch": given.epochs, "output": "./results/", "item.ranking.topN": [K]}
    if given.learning_rate:
        conf.config["learning.rate"] = given.learning_rate
    if given.gamma is not None:
        conf.config["DirectAU"] = conf.config["DirectAU"] | {"gamma": given.gamma}
    return conf


def recommender(conf: Any, data: dict[str, np.ndarray], given: argparse.Namespace, **tables: Any) -> Any:
    """A public model for the training interactions, and perhaps more ``tables``."""
    random.seed(given.seed)
    np.random.seed(given.seed)  # noqa: NPY002
    pairs = [[str(user), str(item), 1.0] for user, item in zip(data["users"], data["items"], strict=True)]
    return getattr(importlib.import_module(f"model.graph.{given.model}"), given.model)(conf, pairs, pairs[:1], **tables)


def observed(
    model: Any,
    data: dict[str, np.ndarray],
    given: argparse.Namespace,
    predicting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Train a model. Returns the seconds of its epochs, and the figures of those that are evaluated, ``predicting`` in
    a context of its own."""
    held = {part: np.zeros(tuple(data["shape"]), bool) for part in ("train", "valid", "test")}
    held["train"][data["users"], data["items"]] = True
    for part in ("valid", "test"):
        held[part][data[f"{part}_users"], data[f"{part}_items"]] = True
    users = [u for u in range(held["train"].shape[0]) if str(u) in model.data.user]
    places = np.array([int(model.data.id2item[i]) for i in range(len(model.data.id2item))])
    seconds: list[float] = []
    figures: list[tuple[float, float]] = []
    last, start = -1, time.process_time()

    def evaluate(epoch: int) -> None:
        nonlocal last, start
        seconds.append((time.process_time() - start) / (epoch - last))
        last = epoch
        model.save()
        if not given.every or epoch % given.every:
            start = time.process_time()
            return
        scores = np.full(held["train"].shape, -np.inf)
        with predicting():
            for user in users:
                scores[user, places] = model.predict(str(user))
        test = ndcg(scores, held["train"] | held["valid"], held["test"])
        figures.append((ndcg(scores, held["train"], held["valid"]), test))
        start = time.process_time()

    model.fast_evaluation = evaluate
    model.build()
    model.train()
    return {"seconds": seconds, "valid": [each[0] for each in figures], "test": [each[1] for each in figures]}


def measure(code: Path, data: dict[str, np.ndarray], given: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    for each in (torch.Tensor, torch.nn.Module):
        each.cuda = lambda self, *args, **kwargs: self  # type: ignore[attr-defined,method-assign,assignment]
    torch.manual_seed(given.seed)
    conf = configuration(code, given)
    if given.model == "NCL":
        conf.config["NCL"]["num_clusters"] = CLUSTERS
    return observed(recommender(conf, data, given), data, given, torch.no_grad)


if __name__ == "__main__":
    main(__doc__, measure)
