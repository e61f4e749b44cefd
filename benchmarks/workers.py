"""Measure what workers on this machine gain over one worker; print one JSON line for each number of workers.

    python benchmarks/workers.py --data DATA [--workers 1 2] [--cohort 2048] [--rounds 30] [--set section.key=value ...]

All of them play the same rounds in turn, so that other load on the machine affects all alike. ``ratio`` is the median
duration of a round with the first number of workers, divided by that with this one; give it a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from perfedrec import configure, load
from perfedrec.core.records import flatten, nbytes
from perfedrec.runtimes.cluster import Machines, connect, loaded
from perfedrec.runtimes.simulator import Simulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="fedmf")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cohort", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    given = parser.parse_args()
    torch.set_num_threads(1)
    connect(loaded(), Machines(sum(given.workers)))
    dataset, made = load(given.data), dict[int, Simulator[Any, Any, Any]]()
    options = [f"selection.n_clients_per_round={given.cohort}", *given.set]
    for workers in given.workers:
        method = configure(given.preset, overrides=options).build()
        made[workers] = Simulator(method, dataset, seed=0, device="cpu", threads=1)
        made[workers].spread(Machines(workers))
    seconds: dict[int, list[float]] = {workers: [] for workers in made}
    first = next(iter(made.values()))
    for number in range(first.n_phases + 3 + given.rounds):
        for workers, each in made.items():
            start = time.perf_counter()
            each.play()
            if number >= first.n_phases + 3:
                seconds[workers].append(time.perf_counter() - start)
    tables = flatten(first.state)[0]
    for workers, each in made.items():
        median = statistics.median(seconds[workers])
        same = all(torch.equal(tables[name], other) for name, other in flatten(each.state)[0].items())
        print(
            json.dumps(
                {
                    "workers": workers,
                    "round_ms": round(1e3 * median, 2),
                    "ratio": round(statistics.median(seconds[given.workers[0]]) / median, 3),
                    "fastest_ratio": round(min(seconds[given.workers[0]]) / min(seconds[workers]), 3),
                    "same_bits": same,
                    "broadcast_mb": round(nbytes(each.algorithm.broadcast(each.state, torch.arange(0))) / 1e6, 2),
                }
            ),
            flush=True,
        )
    for each in made.values():
        each.close()
    loaded().shutdown()


if __name__ == "__main__":
    main()
