"""Measure CPU seconds of secure aggregation, all in one process and without a network; print one JSON line per figure.

    python benchmarks/secagg.py [--nodes 4] [--items 7597] [--dim 64] [--tables 1] [--gone 0] [--repeat 5]

``--tables`` is the number of item tables in a round's sum (clusters, and layers of neighbour sums). ``--gone`` is the
number of nodes that drop out after they have shared their secrets, which is the most expensive time to do so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

import numpy as np

from perfedrec.runtimes.flower import secagg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, text in (
        ("nodes", 4, "number of nodes"),
        ("items", 7597, "rows of a table"),
        ("dim", 64, "columns of a table"),
        ("tables", 1, "item tables that a round sums"),
        ("gone", 0, "nodes that drop out after they have shared their secrets"),
        ("repeat", 5, "number of sums, of which the median is printed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args()
    size = args.items * args.dim * args.tables
    drawn = np.random.default_rng(0).integers(-(2**45), 2**45, (args.nodes, size)).view(np.uint64)
    vectors = dict(enumerate(drawn))
    spent: dict[str, float] = defaultdict(float)  # seconds in each stage, summed over all nodes

    class Timed(secagg.Participant):
        def __getattribute__(self, name: str) -> object:
            found = super().__getattribute__(name)
            if name not in ("keys", "shares", "receive", "mask", "unmask"):
                return found

            def timed(*values: object, **named: object) -> object:
                start = time.process_time()
                try:
                    return found(*values, **named)
                finally:
                    spent["masked" if name in ("receive", "mask") else name] += time.process_time() - start

            return timed

    secagg.Participant = Timed  # type: ignore[misc]
    rounds = []
    for _ in range(args.repeat):
        spent.clear()
        start = time.process_time()
        total, present = secagg.Together({"masked": range(args.gone)}).sum(vectors)
        whole = time.process_time() - start
        assert np.array_equal(total, sum(vectors[node] for node in present))
        stages = {f"node, {stage}": seconds / args.nodes for stage, seconds in spent.items()}
        rounds.append({"coordinator": whole - sum(spent.values()), **stages, "all in one process": whole})
    for figure in rounds[0]:
        value = statistics.median(each[figure] for each in rounds)
        print(json.dumps({"figure": figure, "cpu_seconds": round(value, 4), "nodes": args.nodes, "words": size}))


if __name__ == "__main__":
    main()
