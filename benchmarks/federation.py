"""Measure a federation of real processes on this machine, with TLS and keys, and print JSON lines.

    python benchmarks/federation.py --data FOLDER --nodes 4 --users 256 --rounds 10

It prints one line per round and a summary: seconds per round (median over training), processor seconds of each role,
and bytes per node and round, beside the bytes that the simulator counts for the same nodes and for nodes of one user.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from perfedrec.core.keys import Key
from perfedrec.core.types import RoundReport, Spec
from perfedrec.data import Dataset, read_catalogue
from perfedrec.federation import local
from perfedrec.federation.agreement import federated
from perfedrec.federation.coordinator import Deployment, Terms, serve
from perfedrec.federation.local import parted
from perfedrec.runs import config
from perfedrec.runs.config import open_data
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Progress, Quiet
from perfedrec.runtimes.flower import needs_service
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.round import play_round


class Clock(Quiet):
    """Records the processor seconds that this process and its children have used after each round."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def round(self, progress: Progress) -> None:
        used = {"coordinator": sum(psutil.Process().cpu_times()[:2])}
        for child in psutil.Process().children():
            command = child.cmdline()
            role = "service" if "service" in command else "nodes"
            role = "superlink" if any(each.endswith("superlink.py") for each in command) else role
            used[role] = used.get(role, 0.0) + sum(child.cpu_times()[:2])
        self.seen.append(used)


def simulated(
    algorithm: Any, dataset: Dataset, users: int, rounds: int, nodes: torch.Tensor | None = None
) -> list[RoundReport]:
    """Reports of the rounds of training that the simulator plays with the same users.

    ``nodes`` [n] is the node of each user; without it every user is a node with one user.
    """
    train = dataset.train
    offsets = torch.tensor(train.offsets[: users + 1])
    population = Population(offsets, torch.tensor(train.items[: int(offsets[-1])]), train.n_items)
    degrees = torch.bincount(population.items, minlength=train.n_items)
    state = algorithm.init(Spec(users, train.n_items, degrees), Key(0).fold("init"))
    population.init_clients(algorithm, 0)
    reports = []
    for _ in range(rounds):
        state, report = play_round(algorithm, state, population, 0, nodes=nodes)
        reports.append(report)
    return [each for each in reports if each.phase == "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic:users=256,items=2000", help="as perfedrec train --data")
    parser.add_argument("--nodes", type=int, default=4, help="number of nodes")
    parser.add_argument("--users", type=int, default=256, help="number of users on all nodes together")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of training")
    parser.add_argument("--preset", default="recommended", help="preset to start from")
    parser.add_argument("--privacy", default=None, help="privacy profile (default: the preset's own protection)")
    parser.add_argument("--set", action="append", default=[], help="section.key=value; may be repeated")
    given = parser.parse_args()
    os.environ |= local.environment()
    overrides = [f'data.path="{given.data}"', *given.set]
    resolved = config.load(given.preset, None, overrides, privacy=given.privacy, run__rounds=given.rounds)
    dataset = open_data(resolved.data)
    with tempfile.TemporaryDirectory() as scratch:
        folder, clock, port = Path(scratch) / "federation", Clock(), local.free_port()
        os.environ["FLWR_HOME"] = scratch
        local.lay_out(folder, dataset, given.nodes, given.users)
        with local.nodes(folder, port, needs_service(federated(resolved))):
            ids, terms = read_catalogue(folder / local.CATALOGUE), Terms(port=port, min_nodes=given.nodes)
            files, keys = folder / "certificates", folder / "keys"
            serve(Deployment(resolved, ids, Path(scratch) / "run", files, keys, terms), clock, lambda line: None)
        history = RunFolder(Path(scratch) / "run").history()
    for entry in history:
        print(json.dumps({"round": entry.report.round, "phase": entry.report.phase, "seconds": entry.seconds}))
    training = [entry for entry in history if entry.report.phase == "train"]
    first, last, count = clock.seen[len(history) - len(training)], clock.seen[-1], max(len(training) - 1, 1)
    places = np.repeat(np.arange(given.nodes), [len(each) for each in parted(dataset.train, given.nodes, given.users)])
    alone = simulated(resolved.build(), dataset, given.users, len(history))
    counted = simulated(resolved.build(), dataset, given.users, len(history), torch.from_numpy(places))
    uploads = sum(entry.report.clients for entry in training)
    summary = {
        "nodes": given.nodes,
        "users": given.users,
        "seconds_a_round": statistics.median(entry.seconds for entry in training),
        "processor_seconds_a_round": {role: (last[role] - first[role]) / count for role in last},
        "bytes_up_per_node": sum(entry.report.bytes_up for entry in training) / len(training) / given.nodes,
        "bytes_up_per_user": sum(entry.report.bytes_up for entry in training) / uploads,
        "bytes_down_per_node": sum(entry.report.bytes_down for entry in training) / len(training) / given.nodes,
        "simulated_bytes_up_per_node": sum(each.bytes_up for each in counted) / len(counted) / given.nodes,
        "simulated_bytes_down_per_node": sum(each.bytes_down for each in counted) / len(counted) / given.nodes,
        "simulated_bytes_up_per_user": sum(each.bytes_up for each in alone) / uploads,
        "simulated_bytes_down_per_user": sum(each.bytes_down for each in alone) / uploads,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
