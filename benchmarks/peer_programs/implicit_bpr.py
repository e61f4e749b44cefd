"""Time BPR of `implicit`, or train it. It runs in a virtual environment of its own, called by benchmarks/peers.py.

    python implicit_bpr.py TRAIN.npz --dim 64 --epochs 3 [--rate 0.01] [--l2 0.01] [--every 2 --output VECTORS.npz]

The file has ``users`` and ``items``, one of each per interaction, and the ``shape`` of the whole. Without --output, the
seconds of an epoch are printed. With it, the vectors of every epoch that --every asks for are stored, as ``users``
[k, n, d + 1] and ``items`` [k, m, d + 1], whose last column is the items' bias, and the seconds until then are printed.
One JSON line of processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from implicit.cpu.bpr import BayesianPersonalizedRanking
from scipy import sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--l2", type=float, default=0.01, help="weight of the L2 term")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--output")
    given = parser.parse_args()
    with np.load(given.train) as stored:
        users, items, shape = stored["users"], stored["items"], tuple(stored["shape"])
    matrix = sparse.csr_matrix((np.ones(users.size, np.float32), (users, items)), shape=shape)

    def model(epochs: int) -> Any:
        options = {"learning_rate": given.rate, "regularization": given.l2, "num_threads": 1, "random_state": 0}
        return BayesianPersonalizedRanking(factors=given.dim, iterations=epochs, **options)

    seconds = []
    if given.output is None:
        for epochs in (1, 1 + given.epochs):  # the difference has nothing of what happens once
            start = time.process_time()
            model(epochs).fit(matrix, show_progress=False)
            seconds.append(time.process_time() - start)
        print(json.dumps({"seconds": (seconds[1] - seconds[0]) / given.epochs}))
        return
    trained, kept = model(given.epochs), []
    spent, start = 0.0, time.process_time()

    def after(epoch: int, *others: object) -> None:
        nonlocal spent, start
        spent += time.process_time() - start
        if (epoch + 1) % given.every == 0:
            kept.append((trained.user_factors.copy(), trained.item_factors.copy()))
            seconds.append(spent)
        start = time.process_time()

    trained.fit(matrix, show_progress=False, callback=after)
    stacked = dict(zip(("users", "items"), map(np.stack, zip(*kept, strict=True)), strict=True))
    np.savez(given.output, **stacked)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
