"""What many clients cost: seconds, memory and disk of a simulation without evaluation, one JSON line per size.

    python benchmarks/scale.py --users 100000 1000000 [--items 100000] [--algorithm fedmf] [--rounds 60]

``start_seconds`` are those from the call to the first round: drawing the data, and making the simulator;
``start_processor_seconds`` is their processor time. ``peak_mb`` is the most memory of a process of its own for each
size, and ``own_mb`` what it has at the end without files, which the system may take from memory. ``checkpoint_mb`` is
the size of a checkpoint after the rounds, and ``clients_mb`` what the next one, a round later, writes of client states.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from perfedrec import configure, load
from perfedrec.runs import checkpoint
from perfedrec.runtimes.simulator import Simulator


def measure(users: int, items: int, algorithm: str, rounds: int) -> dict[str, Any]:
    """The figures of one size."""
    start = time.perf_counter()
    dataset = load(f"synthetic:users={users},items={items}")
    read = time.perf_counter()
    simulator: Simulator[Any, Any, Any] = Simulator(configure(algorithm).build(), dataset, seed=0, device="cpu")
    made, busy_start = time.perf_counter(), time.process_time()
    del dataset
    wall, processor = [], []
    for _ in range(simulator.n_phases + rounds):
        before, busy = time.perf_counter(), time.process_time()
        simulator.play()
        wall.append(time.perf_counter() - before)
        processor.append(time.process_time() - busy)
    with tempfile.TemporaryDirectory() as folder:
        before, path = time.perf_counter(), Path(folder) / "round-000001"
        checkpoint.save(path, simulator.records(), {}, {})
        stored, size = time.perf_counter() - before, sum(each.stat().st_size for each in path.iterdir())
        simulator.play()
        checkpoint.save(path.with_name("round-000002"), simulator.records(), {}, {})
        new = [each.stat() for each in path.with_name("round-000002").glob("memory-*")]
        changed = sum(each.st_size for each in new if each.st_nlink == 1)
    return {
        "users": users,
        "items": items,
        "algorithm": algorithm,
        "data_seconds": round(read - start, 1),
        "start_seconds": round(made - start, 1),
        "start_processor_seconds": round(busy_start, 1),
        "round_ms": round(1e3 * statistics.median(wall[-rounds:]), 2),
        "round_processor_ms": round(1e3 * statistics.median(processor[-rounds:]), 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "own_mb": own_memory(),
        "checkpoint_seconds": round(stored, 2),
        "checkpoint_mb": round(size / 1e6, 1),
        "clients_mb": round(changed / 1e6, 2),
    }


def own_memory() -> int:
    """Megabytes of memory of this process that no file stands behind (0 where the system does not tell)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--algorithm", default="fedmf")
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if len(given.users) == 1:
        print(json.dumps(measure(given.users[0], given.items, given.algorithm, given.rounds)), flush=True)
        return
    for users in given.users:
        same = ["--items", given.items, "--algorithm", given.algorithm, "--rounds", given.rounds]
        subprocess.run([sys.executable, __file__, "--users", str(users), *map(str, same)], check=True)


if __name__ == "__main__":
    main()
