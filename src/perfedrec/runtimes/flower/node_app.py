"""A node of a deployment: one long-lived process, to which a coordinator sends the method and its options.

There are three kinds of messages: ``query`` (which users does the node host?), ``train`` (a round), and ``query.model``
(the model to recommend with). Each carries the :class:`~perfedrec.runtimes.flower.codec.Setup` that both sides have to
agree on, so that a node stores nothing about its coordinator and may be restarted at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import EVALUATE, Algorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.extras import MissingExtraError
from perfedrec.evaluation.holdout import rule_in
from perfedrec.privacy.noise import check_source
from perfedrec.privacy.policy import Policy
from perfedrec.runtimes.flower import evaluation, service
from perfedrec.runtimes.flower.client_app import sum_of_users
from perfedrec.runtimes.flower.codec import (
    BroadcastLayout,
    Setup,
    Task,
    UploadError,
    digest,
    dump,
    load,
    pack,
    reply,
    unpack,
)
from perfedrec.runtimes.flower.node_loop import Activity
from perfedrec.runtimes.flower.sealing import Bundle
from perfedrec.runtimes.flower.secagg import STAGES
from perfedrec.runtimes.flower.secure_sum import RECORD, Stages
from perfedrec.runtimes.node import Store


class NodeApp:
    """The app of a node whose users are in a ``store``; ``build`` makes the method that a configuration in TOML
    describes.

    A node refuses to take part where the coordinator has another catalogue or another ``version`` of this package;
    where it has no ``bundle`` and its users' vectors and edges are for a neighbourhood service; and where its owner's
    ``policy`` does not allow the method or its options.
    """

    def __init__(
        self,
        store: Store,
        build: Callable[[str], Algorithm[Any, Any, Any]],
        version: str,
        bundle: Bundle | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.store, self.build, self.version, self.bundle, self.policy = store, build, version, bundle, policy
        self.activity = Activity()
        self._joined: tuple[Setup, Algorithm[Any, Any, Any], int] | None = None
        self._last_sum = -1, b""  # the round of the last sum, and the digest of the message that asked for it

    @property
    def description(self) -> str:
        """What it takes part with, in a few words."""
        least = "" if self.policy is None else f", and requires profile {self.policy.profile} or more protection"
        return f"{self.store.n_users + len(self.store.unregistered())} users{least}"

    def app(self) -> ClientApp:
        """The ``ClientApp``."""
        app, secret = ClientApp(), b"" if self.bundle is None else self.bundle.vouching
        stages = Stages(secret, lambda nodes: self.store.open_sum(*self._last_sum, nodes))

        @app.query()
        def present(message: Message, context: Context) -> Message:
            return Message(self._present(message.content), reply_to=message)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return Message(self._train(message.content), reply_to=message)

        def stage(message: Message, context: Context) -> Message:
            def vector() -> Aggregate:
                return self._sum(message.content, *self._join(Setup.read(message.content)))

            return stages.answer(message, context, vector)

        for name in STAGES:
            app.train(name)(stage)

        @app.train(service.ORDER_TABLE.partition(".")[2])
        def order_table(message: Message, context: Context) -> Message:
            if self.bundle is None:
                raise PerfedrecError("this node has no bundle; expected one, to read which item a token stands for")
            return service.order_table(message, self.bundle)

        @app.query("model")
        def model(message: Message, context: Context) -> Message:
            setup = Setup.read(message.content)
            # A coordinator may give the model of another run, which this node need not take part in.
            joined = self._joined
            algorithm = joined[1] if joined is not None and joined[0] == setup else self._method(setup)
            task = self._task(message.content, algorithm)
            about = setup.run, task.round, setup.configuration, algorithm.inference
            self.store.receive(task.broadcast, task.users[:-1], *about)
            self.activity.end(f"with the model of run {setup.run} after {task.round} rounds")
            return Message(RecordDict(), reply_to=message)

        return app

    def _present(self, content: RecordDict) -> RecordDict:
        """The users that the node hosts. Users without an identity get those that came with the question."""
        self._join(Setup.read(content))
        if "identities" in content.array_records:
            given = unpack(content.array_records["identities"])["identities"].tolist()
            self.store.register(dict(zip(self.store.unregistered(), given, strict=False)))
        users, new = self.store.everyone(), len(self.store.unregistered())
        counts = {"items": self.store.n_items, "attributes": self.store.n_user_attributes}
        about = ConfigRecord({**counts, "new": new})
        return RecordDict({"about": about, "users": pack({"users": users})})

    def _train(self, content: RecordDict) -> RecordDict:
        """The node's part of a round in which sums are taken in the clear."""
        algorithm, seed = self._join(Setup.read(content))
        number = Task.round_of(content)
        if algorithm.protection.secure:
            raise PerfedrecError("this node hands over secure sums only; expected the stages of secure aggregation")
        if self.policy is not None and number < 0:  # the rows of the answer would be the items of the node's users
            raise UploadError("policy", self._objection(self.policy, "item degrees are asked for without a secure sum"))
        total = self._sum(content, algorithm, seed)
        if self.bundle is None or not service.needs_service(algorithm):
            return reply(total)
        return service.add_sealed(reply(service.for_coordinator(total)), total, number, self.bundle)

    def _sum(self, content: RecordDict, algorithm: Algorithm[Any, Any, Any], seed: int) -> Aggregate:
        """The sum over the users that a message asks for."""
        task = self._task(content, algorithm)
        if task.phase == EVALUATE.name:
            self._check_policy(task.phase, algorithm)
            question = evaluation.read_question(content, task.round)
            self._last_sum = question.number, digest(content, without=RECORD)
            return evaluation.answer(self.store, algorithm, task, question)
        self._check_phase(task, algorithm)
        self._last_sum = task.round, digest(content, without=RECORD)
        total = answer_once(self.store, algorithm, task, self._last_sum[1], seed)
        if task.round >= 0:
            self.activity.play(Setup.read(content).run, task.round)
        return total

    def _check_phase(self, task: Task[Any], algorithm: Algorithm[Any, Any, Any]) -> None:
        """Refuse a phase in the wrong round: the ledger counts a release once, so it must not be asked for again."""
        if task.round >= 0:
            due = next((each.name for each in algorithm.phases[task.round :]), "train")
        else:  # one question before the first round, where no phase of the method releases the degrees
            due = "degrees" if task.round == -1 and algorithm.needs_degrees else "no phase"
        if task.phase != due:
            raise UploadError("phase", f"phase {task.phase} came in round {task.round}; expected {due}")
        self._check_policy(task.phase, algorithm)

    def _check_policy(self, phase: str, algorithm: Algorithm[Any, Any, Any]) -> None:
        """Refuse a phase that the node's owner does not allow."""
        if self.policy is not None and (why := self.policy.objection_to(phase, algorithm)):
            raise UploadError("policy", self._objection(self.policy, why))

    @staticmethod
    def _objection(policy: Policy, why: str) -> str:
        return f"this node requires the protection of profile {policy.profile} at least, and {why}"

    def _task(self, content: RecordDict, algorithm: Algorithm[Any, Any, Any]) -> Task[Any]:
        task = Task.read(content, BroadcastLayout.of(algorithm), self.store.device)
        if self.bundle is None or not service.needs_service(algorithm):
            return task
        return service.add_private(task, content, self.bundle, self.store.n_items)

    def _join(self, setup: Setup) -> tuple[Algorithm[Any, Any, Any], int]:
        """The method of a setup that this node agrees to, and the seed of its users' draws."""
        if self._joined is None or self._joined[0] != setup:
            algorithm = self._method(setup)
            rule, text = rule_in(setup.configuration), setup.configuration
            seed = self.store.join_run(algorithm, setup.run, configuration=text, hold_out=rule)
            self._joined = setup, algorithm, seed
        self.activity.begin(setup.run, type(self._joined[1]).__name__)
        return self._joined[1:]

    def _method(self, setup: Setup) -> Algorithm[Any, Any, Any]:
        """The method of a setup. Raises :class:`UploadError` with the reason where the node does not agree to it."""
        if setup.version != self.version:
            raise UploadError("version", f"this node runs version {self.version}, the coordinator {setup.version}")
        if setup.catalogue != self.store.catalogue:
            raise UploadError(
                "catalogue", f"this node has the catalogue {self.store.catalogue}, the coordinator {setup.catalogue}"
            )
        try:
            algorithm = self.build(setup.configuration)
        except PerfedrecError as error:
            raise UploadError(
                "configuration", f"this node cannot use the coordinator's configuration: {error}"
            ) from error
        try:
            check_source(algorithm.settings.privacy)
        except MissingExtraError as error:  # its message names paths on this node, which are not the coordinator's
            raise UploadError("noise", f"this node cannot draw its noise: it lacks the extra {error.extra}") from error
        if self.policy is not None and (why := self.policy.objection(algorithm)):
            raise UploadError("policy", self._objection(self.policy, why))
        if self.bundle is None and service.needs_service(algorithm):
            raise UploadError(
                "bundle", "this node has no bundle; expected one: vectors are for a neighbourhood service only"
            )
        return algorithm


def answer_once(
    store: Store, algorithm: Algorithm[Any, Any, Any], task: Task[Any], request: bytes, seed: int
) -> Aggregate:
    """The sum over the users of a ``task`` who are in the ``store``, whose message has the digest ``request``. It is
    computed once, and repeated where the same message comes again.

    Users who were forgotten since the coordinator learnt of them have dropped out. It is not told who they are, only
    how many clients are in the sum.
    """

    def total() -> Aggregate:
        here = torch.isin(task.users, store.everyone())
        return sum_of_users(algorithm, store, task if bool(here.all()) else task.of(here), seed)

    if task.round < 0:  # before the first round no noise is drawn and no state changes
        with store.transaction():
            return total()
    made = store.answer_round(task.round, request, lambda: dump(total()))
    assert made is not None
    return load(made)
