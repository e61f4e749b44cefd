"""Virtual nodes: the apps that Flower's simulation engine (Ray) runs, for populations that outgrow one process.

The engine may hand a message to any of its worker processes, with the number of the node's partition. So the users of a
node and their states are in a store file of that partition, which is opened for each message. All runs on one machine:
the coordinator is the neighbourhood service as well, and gives the seed of all draws to the nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import EVALUATE, Algorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.evaluation.holdout import rule_in
from perfedrec.runtimes.flower import evaluation
from perfedrec.runtimes.flower.codec import BroadcastLayout, Setup, Task, digest, reply
from perfedrec.runtimes.flower.exchange import POLL, exchange
from perfedrec.runtimes.flower.node_app import answer_once
from perfedrec.runtimes.flower.secagg import STAGES
from perfedrec.runtimes.flower.secure_sum import RECORD, answer_stage
from perfedrec.runtimes.node import Store


def virtual_client(
    hosted: Callable[[Mapping[str, Any], int], tuple[Store, int]], build: Callable[[str], Algorithm[Any, Any, Any]]
) -> ClientApp:
    """The app of all virtual nodes. ``hosted`` opens the store of a partition, from the run's options and the number of
    the partition, and returns it with the seed of the run. ``build`` makes the method that a configuration in TOML
    describes."""
    app = ClientApp()

    @app.query()
    def partition(message: Message, context: Context) -> Message:
        about = ConfigRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict({"about": about}), reply_to=message)

    def sum_of(message: Message, context: Context) -> Aggregate:
        torch.set_num_threads(1)  # the engine has a worker for each processor
        setup = Setup.read(message.content)
        algorithm = build(setup.configuration)
        store, seed = hosted(context.run_config, int(context.node_config["partition-id"]))
        with store:
            store.join_run(algorithm, setup.run, seed, hold_out=rule_in(setup.configuration))
            task = Task.read(message.content, BroadcastLayout.of(algorithm), store.device)
            if task.phase == EVALUATE.name:
                question = evaluation.read_question(message.content, task.round)
                return evaluation.answer(store, algorithm, task, question)[0]
            return answer_once(store, algorithm, task, digest(message.content, without=RECORD), seed)[0]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(reply(sum_of(message, context)), reply_to=message)

    def stage(message: Message, context: Context) -> Message:
        return answer_stage(message, context, lambda: sum_of(message, context))

    for name in STAGES:
        app.train(name)(stage)

    @app.query("model")
    def model(message: Message, context: Context) -> Message:
        setup = Setup.read(message.content)
        store, _ = hosted(context.run_config, int(context.node_config["partition-id"]))
        with store:
            algorithm = build(setup.configuration)
            task = Task.read(message.content, BroadcastLayout.of(algorithm), store.device)
            about = setup.run, task.round, setup.configuration, algorithm.inference
            store.receive(task.broadcast, task.users[:-1], *about)
        return Message(RecordDict(), reply_to=message)

    return app


def virtual_server(play: Callable[[Grid, Mapping[str, Any]], None]) -> ServerApp:
    """The app that calls ``play`` with a grid and the run's options."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        play(grid, context.run_config)

    return app


def partitions(grid: Grid, seconds: float) -> dict[int, int]:
    """The partition of every node, by the number of the node.

    Raises :class:`PerfedrecError` where there is no node after ``seconds``, or one has not answered."""
    end = time.monotonic() + seconds
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > end:
            raise PerfedrecError(
                "there are no virtual nodes; expected at least one, set num-supernodes of the federation"
            )
        time.sleep(POLL)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    found: dict[int, int] = {}
    for node, answer in exchange(grid, asked, seconds):
        if answer.has_error():
            raise PerfedrecError(f"virtual node {node} failed: {answer.error.reason}")
        found[node] = int(answer.content.config_records["about"]["partition"])  # type: ignore[arg-type]
    if len(found) < len(nodes) or sorted(found.values()) != list(range(len(nodes))):
        raise PerfedrecError(
            f"{len(found)} of {len(nodes)} virtual nodes sent their partition; expected a different one from each"
        )
    return found
