"""Time rounds of federated matrix factorisation in a simulation of Flower, one client a user, as its users write it. It
runs in a virtual environment of its own, and is called by benchmarks/peers.py.

    python flower_round.py DATA.npz --dim 64 --cohort 256 --rounds 3

The file has ``users`` and ``items``, one of each per interaction, and ``shape``. A client receives the item table,
makes one step of BPR on its own vector, which stays with it, and on the table, and sends the table back; the server
averages. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def local_step(table: np.ndarray, vector: np.ndarray, own: np.ndarray, rng: np.random.Generator, rate: float) -> float:
    """One step of BPR on all of a user's items, each with a random other one; changes ``table`` and ``vector``."""
    others = rng.integers(0, len(table), own.size)
    difference = table[others] - table[own]
    slopes = 1 / (1 + np.exp(-difference @ vector))
    gradient = slopes @ difference
    np.add.at(table, own, rate * slopes[:, None] * vector)
    np.add.at(table, others, -rate * slopes[:, None] * vector)
    vector -= rate * gradient
    return float(-np.log1p(-slopes.clip(max=1 - 1e-7)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--cohort", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    given = parser.parse_args()
    with np.load(given.data) as stored:
        users, items, shape = stored["users"], stored["items"], tuple(stored["shape"].tolist())
    limits = np.searchsorted(users, np.arange(shape[0] + 1))
    client, server, times = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        user = int(context.node_config["partition-id"])
        rng = np.random.default_rng([user, int(message.content["config"]["server-round"])])
        known = context.state["user"]["vector"].numpy() if "user" in context.state else None
        vector = rng.normal(0, 0.1, given.dim) if known is None else known
        table = message.content["arrays"]["items"].numpy().copy()
        own = items[limits[user] : limits[user + 1]]
        loss = local_step(table, vector, own, rng, 0.1)
        context.state["user"] = ArrayRecord({"vector": Array(vector)})
        content = {
            "arrays": ArrayRecord({"items": Array(table)}),
            "metrics": MetricRecord({"loss": loss, "num-examples": own.size}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, *arguments: Any, **named: Any) -> Any:
            times.append(time.perf_counter())
            return super().configure_train(*arguments, **named)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        share = given.cohort / shape[0]
        strategy = Timed(share, 0, given.cohort, 0, shape[0])
        table = np.random.default_rng(0).normal(0, 0.1, (shape[1], given.dim)).astype(np.float32)
        strategy.start(grid, ArrayRecord({"items": Array(table)}), given.rounds + 1)
        times.append(time.perf_counter())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    try:
        run_simulation(server, client, shape[0], backend_config=resources)
    except Exception as error:  # the thread of the server waits for answers for ever
        print(f"{type(error).__name__}: {error.__cause__ or error}", file=sys.stderr, flush=True)
        os._exit(1)
    seconds = np.diff(times)[1:]  # the first round starts the worker processes
    if seconds.size != given.rounds:
        sys.exit(f"{seconds.size} rounds were played, expected {given.rounds}")
    print(json.dumps({"seconds_a_round": float(np.median(seconds))}))


if __name__ == "__main__":
    main()
