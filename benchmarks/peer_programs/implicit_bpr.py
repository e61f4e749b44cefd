"""Time BPR of `implicit`. It runs in a virtual environment of its own, and is called by benchmarks/peers.py.

    python implicit_bpr.py TRAIN.npz --dim 64 --epochs 3

The file has ``users`` and ``items``, one of each per interaction. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from implicit.cpu.bpr import BayesianPersonalizedRanking
from scipy import sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    given = parser.parse_args()
    with np.load(given.train) as stored:
        users, items = stored["users"], stored["items"]
    matrix = sparse.csr_matrix((np.ones(users.size, np.float32), (users, items)))
    seconds = []
    for epochs in (1, 1 + given.epochs):  # the difference has nothing of what happens once
        model = BayesianPersonalizedRanking(factors=given.dim, iterations=epochs, num_threads=1, random_state=0)
        start = time.process_time()
        model.fit(matrix, show_progress=False)
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": (seconds[1] - seconds[0]) / given.epochs}))


if __name__ == "__main__":
    main()
