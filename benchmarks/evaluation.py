"""Measure an evaluation of this build against an earlier one and against the machine; print one JSON line per figure.

    python benchmarks/evaluation.py --data FOLDER --against REV [--dim 64] [--times 5]

A vector model with random vectors ranks all items for all users who hold out validation items, on one thread. Both
builds run at the same time and take turns, so that other load on the machine affects both alike. The earlier one is
taken from the history of this repository, and uses the same installed packages. Figures are processor time.

``against`` is the earlier build's median divided by this one's: 3 means three times as fast. ``limit`` is this build's
median divided by the time of 2 n m d operations at the machine's speed in products of matrices that fit into the cache,
a median of times in turns with the evaluations: 1 means that ranking costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def worker(data: str, dim: int) -> None:
    """Evaluate once for each line of the standard input, and answer with the processor time in seconds."""
    import torch

    import perfedrec
    from perfedrec import load
    from perfedrec.evaluation import Held, Recommender

    source = os.environ["PYTHONPATH"]
    if not Path(perfedrec.__file__).is_relative_to(source):
        raise SystemExit(f"perfedrec was imported from {perfedrec.__file__}; expected it from {source}")
    torch.set_num_threads(1)
    dataset, draws = load(data), torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, dim, generator=draws) for size in (dataset.n_users, dataset.n_items)]

    class Model(Recommender):
        """The vector model, as centralised methods have it."""

        def raw_scores(self, users: torch.Tensor) -> torch.Tensor:
            return vectors[0][users] @ vectors[1].T

        def scoring(self, users: torch.Tensor) -> Any:
            from perfedrec.core.scoring import Scoring

            return Scoring.product(vectors[0][users], vectors[1])

        def unused(self, *given: Any, **named: Any) -> Any:
            raise NotImplementedError

        explain = for_new_users = records = with_records = unused

    train, valid = dataset.train, dataset.valid
    model = Model(torch.tensor(train.offsets), torch.tensor(train.items), dataset.n_items)
    held = Held.of(valid.offsets, valid.items, torch.device("cpu"))
    tested = int((held.offsets.diff() > 0).sum())
    print(json.dumps([tested, dataset.n_items]), flush=True)
    for _ in sys.stdin:
        spent = time.process_time()
        found = model.evaluate(held)
        print(json.dumps([time.process_time() - spent, found["recall@20"]]), flush=True)


def product_speed(dim: int) -> float:
    """Operations a second in products of matrices that fit into the cache: the median of the fastest size."""
    import torch

    torch.set_num_threads(1)
    speeds = []
    for rows, columns in ((256, 2048), (512, 2048), (1024, 1024)):
        a, b, out = torch.randn(rows, dim), torch.randn(columns, dim), torch.empty(rows, columns)
        times = []
        for _ in range(100):
            spent = time.process_time()
            torch.mm(a, b.T, out=out)
            times.append(time.process_time() - spent)
        speeds.append(2 * rows * columns * dim / statistics.median(times))
    return max(speeds)


def start(source: Path, data: str, dim: int) -> subprocess.Popen[str]:
    """A process that evaluates with the package in the folder ``source``."""
    command = [sys.executable, __file__, "--data", data, "--dim", str(dim), "--worker"]
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def asked(process: subprocess.Popen[str]) -> list[float]:
    """The answer of a process to one more line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return [float(each) for each in json.loads(process.stdout.readline())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set, as perfedrec train --data takes it")
    parser.add_argument("--against", help="revision of the earlier build (default: no comparison)")
    parser.add_argument("--dim", type=int, default=64, help="length of the vectors")
    parser.add_argument("--times", type=int, default=5, help="evaluations of each build after the first one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.data, args.dim)
        return
    with tempfile.TemporaryDirectory() as folder:
        sources = {"here": ROOT / "src"}
        if args.against:
            tree = subprocess.run(["git", "archive", args.against, "src"], cwd=ROOT, check=True, capture_output=True)
            with tarfile.open(fileobj=BytesIO(tree.stdout)) as archive:
                archive.extractall(folder, filter="data")
            sources[args.against] = Path(folder, "src")
        builds = {name: start(source, args.data, args.dim) for name, source in sources.items()}
        sizes = [json.loads(each.stdout.readline()) for each in builds.values() if each.stdout is not None]
        (n, m), spent, figures, speeds = sizes[0], {name: list[float]() for name in builds}, {}, []
        for number in range(args.times + 1):
            for name, process in builds.items():
                seconds, figures[name] = asked(process)
                if number:  # the first one compiles, and touches memory for the first time
                    spent[name].append(seconds)
            speeds.append(product_speed(args.dim))
        for process in builds.values():
            process.communicate()
    medians, speed = {name: statistics.median(each) for name, each in spent.items()}, statistics.median(speeds)
    limit = 2 * n * m * args.dim / speed
    for name, median in medians.items():
        print(json.dumps({"figure": "evaluation_s", "build": name, "value": round(median, 3), "users": n, "items": m}))
    print(json.dumps({"figure": "limit", "value": round(medians["here"] / limit, 2), "gflops": round(speed / 1e9, 1)}))
    if args.against:
        ratio = round(medians[args.against] / medians["here"], 2)
        same = round(abs(figures["here"] - figures[args.against]), 6)
        print(json.dumps({"figure": "against", "value": ratio, "build": args.against, "difference_of_recall@20": same}))


if __name__ == "__main__":
    main()
