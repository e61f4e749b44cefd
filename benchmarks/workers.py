"""Measure what workers on this machine gain over one worker; print one JSON line for each number of workers.

    python benchmarks/workers.py --data DATA [--workers 1 2] [--cohort 2048] [--rounds 30] [--set section.key=value ...]

All of them play the same rounds in turn, so that other load on the machine affects all alike. ``ratio`` is the median
duration of a round with the first number of workers, divided by that with this one; give it a quiet machine.

The rest are times a round. ``driver_ms`` is the processor time of the process that plays the rounds, in which workers
wait; ``ray_ms`` that of Ray's threads in this process, which run at any time; ``worker_ms`` that of each worker.
``processor_ratio`` is what the ratio would be if nothing but the first and the last took time. Other load on the
machine changes it little.

``copy_ms`` is how long all client states that have changed in the rounds take to be copied to the driver, and
``copied`` how many users these are.
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

BEFORE = 3
"""Rounds of training that are played before those that are measured."""


class Measured:
    """A simulator with its work spread over a number of ``workers``, and what its rounds take."""

    def __init__(self, given: argparse.Namespace, dataset: Any, workers: int) -> None:
        options = [f"selection.n_clients_per_round={given.cohort}", *given.set]
        method = configure(given.preset, overrides=options).build()
        self.workers, self.simulator = workers, Simulator[Any, Any, Any](method, dataset, device="cpu", threads=1)
        self.simulator.spread(Machines(workers))
        self.seconds, self.driver, self.ray, self.busy = list[float](), 0.0, 0.0, [0.0] * workers
        for _ in range(self.simulator.n_phases + BEFORE):
            self.simulator.play()
        self.clients: Any = self.simulator.clients
        self.clients.up_to_date()

    def processor(self) -> list[float]:
        """The processor time of each worker so far, in seconds."""
        ask = [each.__ray_call__.remote(lambda self: time.process_time()) for each in self.clients._workers]
        return list(loaded().get(ask))

    def play(self) -> None:
        """Play a round. What Ray's threads take between rounds is not counted."""
        before = self.processor()
        wall, own, every = time.perf_counter(), time.thread_time(), time.process_time()
        self.simulator.play()
        self.seconds.append(time.perf_counter() - wall)
        own = time.thread_time() - own
        self.driver += own
        self.ray += time.process_time() - every - own
        ends = zip(self.busy, before, self.processor(), strict=True)
        self.busy = [total + end - start for total, start, end in ends]

    def line(self) -> dict[str, Any]:
        """What was measured. The states are copied with that."""
        rounds = len(self.seconds)
        copied = sum(self.clients._log.users(shard).numel() for shard in range(self.workers))
        start = time.perf_counter()
        self.clients.up_to_date()
        return {
            "workers": self.workers,
            "round_ms": 1e3 * statistics.median(self.seconds),
            "fastest_ms": 1e3 * min(self.seconds),
            "driver_ms": 1e3 * self.driver / rounds,
            "ray_ms": 1e3 * self.ray / rounds,
            "worker_ms": [1e3 * each / rounds for each in self.busy],
            "copy_ms": 1e3 * (time.perf_counter() - start),
            "copied": copied,
        }


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
    dataset = load(given.data)
    made = [Measured(given, dataset, workers) for workers in given.workers]
    for _ in range(given.rounds):
        for each in made:
            each.play()
    tables = flatten(made[0].simulator.state)[0]
    lines = [each.line() for each in made]
    for each, line in zip(made, lines, strict=True):
        state, method = each.simulator.state, each.simulator.algorithm
        same = all(torch.equal(tables[name], other) for name, other in flatten(state)[0].items())
        ms = {name: rounded(value) for name, value in line.items() if name.endswith("_ms")}
        ratios = {
            "ratio": round(lines[0]["round_ms"] / line["round_ms"], 3),
            "fastest_ratio": round(lines[0]["fastest_ms"] / line["fastest_ms"], 3),
            "processor_ratio": round(busy(lines[0]) / busy(line), 3),
            "same_bits": same,
            "broadcast_mb": round(nbytes(method.broadcast(state, torch.arange(0))) / 1e6, 2),
        }
        print(json.dumps(line | ms | ratios), flush=True)
    for each in made:
        each.simulator.close()
    loaded().shutdown()


def busy(line: dict[str, Any]) -> float:
    """Milliseconds of a round in which the driver or the busiest worker computes."""
    return float(line["driver_ms"] + max(line["worker_ms"]))


def rounded(value: Any) -> Any:
    """A number, or each of several."""
    return [rounded(each) for each in value] if isinstance(value, list) else round(value, 2)


if __name__ == "__main__":
    main()
