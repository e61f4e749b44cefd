"""A node: the data and states of the users that it hosts, and the ``ClientApp`` that works on them."""

from __future__ import annotations

from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from perfedrec.core.aggregate import Aggregate, check_aggregator, reduce
from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.runtimes.flower import service
from perfedrec.runtimes.flower.codec import BroadcastLayout, Task, reply
from perfedrec.runtimes.flower.sealing import Bundle
from perfedrec.runtimes.flower.secagg import STAGES
from perfedrec.runtimes.flower.secure_sum import answer_stage
from perfedrec.runtimes.population import Population, Users
from perfedrec.runtimes.round import contribute, round_key


def client_app(
    algorithm: Algorithm[S, B, C],
    population: Population[C],
    layout: BroadcastLayout[B],
    seed: int,
    bundle: Bundle | None = None,
) -> ClientApp:
    """The ``ClientApp`` of a node whose users are in ``population``, where their states are kept.

    All noise and all draws of its users follow from ``seed``. It stays on the node, because with it the noise could be
    removed from what was sent. Losses stay on the node as well, because nothing protects them. Where sums are secure,
    the node answers only the stages of secure aggregation, and never in the clear. With a ``bundle`` it seals what is
    for the neighbourhood service; without one the coordinator is the service as well.
    """
    app = ClientApp()

    def read(message: Message) -> Task[B]:
        return Task.read(message.content, layout, population.offsets.device)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if algorithm.protection.secure:
            raise PerfedrecError("this node hands over secure sums only; expected the stages of secure aggregation")
        task = read(message)
        if bundle is None:
            return Message(reply(sum_of_users(algorithm, population, task, seed)), reply_to=message)
        task = service.add_private(task, message.content, bundle, population.n_items)
        total = sum_of_users(algorithm, population, task, seed)
        content = service.add_sealed(reply(service.for_coordinator(total)), total, task.round, bundle)
        return Message(content, reply_to=message)

    def stage(message: Message, context: Context) -> Message:
        secret = b"" if bundle is None else bundle.vouching
        return answer_stage(message, context, lambda: sum_of_users(algorithm, population, read(message), seed), secret)

    for name in STAGES:
        app.train(name)(stage)
    if bundle is not None:
        app.train(service.ORDER_TABLE.partition(".")[2])(lambda message, context: service.order_table(message, bundle))
    return app


def sum_of_users(algorithm: Algorithm[S, B, C], population: Users[C], task: Task[B], seed: int) -> Aggregate:
    """The sum over the users of a task, with noise, as it leaves the node."""
    check_aggregator(algorithm.aggregator, algorithm.protection.secure)
    if algorithm.aggregator.separate and task.users.numel() > 1:
        raise ConfigError(
            f"{type(algorithm.aggregator).__name__} compares single clients, and a node sends the sum of its users; "
            "expected nodes with one user each"
        )
    key = round_key(seed, task.round)
    update, _ = contribute(algorithm, task.phase, task.broadcast, population, task.users, key)
    # Where the coordinator sent the blocks of some groups alone, it numbered these anew.
    if not algorithm.protection.sums and BroadcastLayout.of(algorithm).per_group:
        update = replace(update, groups=task.present[update.groups])
    total = reduce(update, population.n_items, task.n_groups)
    total = algorithm.compress(task.broadcast, task.phase, total)
    own = key.fold("release").fold("node", int(task.users.min())) if task.users.numel() else key
    return algorithm.protection.add_noise(task.phase, total, task.asked, own)
