"""A node of a deployment: one long-lived process, to which a coordinator sends the method and its options.

There are three kinds of messages: ``query`` (which users does the node host?), ``train`` (a round), and ``query.model``
(the model to recommend with). Each carries the :class:`~perfedrec.runtimes.flower.codec.Setup` that both sides have to
agree on, so that a node stores nothing about its coordinator and may be restarted at any time. A fourth kind,
``query.told``, is a line for the node's log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.algorithm import EVALUATE, Algorithm
from perfedrec.core.counted import counted
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.extras import MissingExtraError
from perfedrec.evaluation.holdout import rule_in
from perfedrec.privacy.noise import check_source
from perfedrec.privacy.policy import Policy
from perfedrec.privacy.statement import PUBLIC, RECEIVED
from perfedrec.runtimes.flower import evaluation, gate, service
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
from perfedrec.runtimes.flower.diary import Diary, Draft, Owner
from perfedrec.runtimes.flower.node_loop import Activity
from perfedrec.runtimes.flower.sealing import Bundle
from perfedrec.runtimes.flower.secagg import STAGES
from perfedrec.runtimes.flower.secure_sum import RECORD, Stages
from perfedrec.runtimes.node import Store
from perfedrec.runtimes.node.journal import JOIN, MODEL, TABLE


class NodeApp:
    """The app of a node whose users are in a ``store``; ``build`` makes the method that a configuration in TOML
    describes.

    A node refuses to take part where the coordinator has another catalogue or another ``version`` of this package;
    where it has no ``bundle`` and its users' vectors and edges are for a neighbourhood service; and where its ``owner``
    does not allow the method or its options. What it answers and refuses is in the store's journal.
    """

    def __init__(
        self,
        store: Store,
        build: Callable[[str], Algorithm[Any, Any, Any]],
        version: str,
        bundle: Bundle | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.store, self.build, self.version, self.bundle = store, build, version, bundle
        self.owner = owner or Owner()
        self.activity, self.diary = Activity(), Diary(store, self.owner)
        self._joined: tuple[Setup, Sequence[Policy], Algorithm[Any, Any, Any], int] | None = None
        self._last_sum = -1, b""  # the round of the last sum, and the digest of the message that asked for it

    @property
    def description(self) -> str:
        """What it takes part with, in a few words."""
        names = " and ".join(each.profile for each in self.owner.policies())
        least = f", and requires profile {names} or more protection" if names else ""
        return f"{counted(self.store.n_users + len(self.store.unregistered()), 'user')}{least}"

    @property
    def absence(self) -> str | None:
        """Why the node answers nothing now, in a few words; ``None`` where it answers."""
        return self.store.rules.read().absence

    def app(self) -> ClientApp:
        """The ``ClientApp``."""
        app, secret = ClientApp(), b"" if self.bundle is None else self.bundle.vouching
        stages = Stages(secret, lambda nodes: self.store.open_sum(*self._last_sum, nodes))

        @app.query()
        def present(message: Message, context: Context) -> Message:
            draft, join = Draft.of(message, JOIN), self._joining(message.content)
            return self.diary.answer(message, draft, lambda: self._present(message.content, draft), join)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            draft, join = Draft.of(message), self._joining(message.content)
            answer = self.diary.answer(message, draft, lambda: self._train(message.content, draft), join)
            self._count(draft)
            return answer

        def stage(message: Message, context: Context) -> Message:
            return self._answer_stage(message, context, stages)

        for name in STAGES:
            app.train(name)(stage)

        @app.train(service.ORDER_TABLE.partition(".")[2])
        def order_table(message: Message, context: Context) -> Message:
            return self.diary.answer(message, Draft.of(message, TABLE), lambda: self._order_table(message))

        @app.query("model")
        def model(message: Message, context: Context) -> Message:
            draft = Draft.of(message, MODEL)
            return self.diary.answer(
                message,
                draft,
                lambda: self._receive(message.content, draft),
                lambda: self._agreed(Setup.read(message.content)),
            )

        @app.query(gate.TOLD.partition(".")[2])
        def told(message: Message, context: Context) -> Message:
            self.activity.log(f"the coordinator says: {gate.told(message)}")
            return Message(RecordDict(), reply_to=message)

        return app

    def _present(self, content: RecordDict, draft: Draft) -> RecordDict:
        """The users that the node hosts. Users without an identity get those that came with the question."""
        if "identities" in content.array_records:
            given = unpack(content.array_records["identities"])["identities"].tolist()
            self.store.register(dict(zip(self.store.unregistered(), given, strict=False)))
        users, new = self.store.everyone(), len(self.store.unregistered())
        counts = {"items": self.store.n_items, "attributes": self.store.n_user_attributes}
        about = ConfigRecord({**counts, "new": new})
        draft.users, draft.said = users, PUBLIC
        return RecordDict({"about": about, "users": pack({"users": users})})

    def _receive(self, content: RecordDict, draft: Draft) -> RecordDict:
        """The answer of a node that has received the model to recommend with."""
        setup = Setup.read(content)
        algorithm = self._agreed(setup)
        task = self._task(content, algorithm)
        about = setup.run, task.round, setup.configuration, algorithm.inference
        self.store.receive(task.broadcast, task.users[:-1], *about)
        self.activity.end(f"with the model of run {setup.run} after {counted(task.round, 'round')}")
        draft.said = RECEIVED
        return RecordDict()

    def _order_table(self, message: Message) -> RecordDict:
        """A table by token in the order of items."""
        if self.bundle is None:
            raise PerfedrecError("this node has no bundle; expected one, to read which item a token stands for")
        return service.order_table(message, self.bundle).content

    def _train(self, content: RecordDict, draft: Draft) -> RecordDict:
        """The node's part of a round in which sums are taken in the clear."""
        algorithm, number = self._join(Setup.read(content))[0], Task.round_of(content)
        if algorithm.protection.secure:
            raise PerfedrecError("this node hands over secure sums only; expected the stages of secure aggregation")
        if number < 0:  # the rows of the answer would be the items of the node's users
            for policy in self.owner.policies():
                raise UploadError("policy", _objection(policy, "item degrees are asked for without a secure sum"))
        total = self._sum(content, draft)
        draft.others = 0
        if self.bundle is None or not service.needs_service(algorithm):
            return reply(total)
        answer = service.add_sealed(reply(service.for_coordinator(total)), total, number, self.bundle)
        draft.sealed = "private" in answer.array_records
        return answer

    def _answer_stage(self, message: Message, context: Context, stages: Stages) -> Message:
        """The answer to a message of a secure sum."""
        stage = message.metadata.message_type.partition(".")[2]
        draft, masked = Draft.of(message, stage=stage), stage == "masked"
        draft.resent = stages.is_repeated(message)
        if draft.run is None and self._joined is not None:
            draft.run = self._joined[0].run

        def work() -> RecordDict:
            content = stages.answer(message, context, lambda: self._sum(message.content, draft))
            if stage == "unmask":
                present = message.content.config_records[RECORD]["present"]
                draft.others = len(cast(list[int], present)) - 1
            return content

        try:
            answer = self.diary.answer(message, draft, work, self._joining(message.content) if masked else None)
        except BaseException:
            stages.drop()
            raise
        self._count(draft)
        return answer

    def _count(self, draft: Draft) -> None:
        """Count the round of an answer that is stored."""
        if draft.played is not None:
            self.activity.play(*draft.played)

    def _sum(self, content: RecordDict, draft: Draft) -> Aggregate:
        """The sum over the users that a message asks for."""
        algorithm, seed = self._join(Setup.read(content))
        task = self._task(content, algorithm)
        if task.phase == EVALUATE.name:
            self._check_policy(task.phase, algorithm)
            question = evaluation.read_question(content, task.round)
            self._last_sum = question.number, digest(content, without=RECORD)
            total, draft.users = evaluation.answer(self.store, algorithm, task, question)
            return total
        self._check_phase(task, algorithm)
        self._last_sum = task.round, digest(content, without=RECORD)
        total, draft.users = answer_once(self.store, algorithm, task, self._last_sum[1], seed)
        draft.repeated = draft.users is None
        if task.round >= 0:
            draft.played = Setup.read(content).run, task.round
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
        for policy in self.owner.policies():
            if why := policy.objection_to(phase, algorithm):
                raise UploadError("policy", _objection(policy, why))

    def _task(self, content: RecordDict, algorithm: Algorithm[Any, Any, Any]) -> Task[Any]:
        task = Task.read(content, BroadcastLayout.of(algorithm), self.store.device)
        if self.bundle is None or not service.needs_service(algorithm):
            return task
        return service.add_private(task, content, self.bundle, self.store.n_items)

    def _joining(self, content: RecordDict) -> Callable[[], Algorithm[Any, Any, Any]]:
        """What joins the run of a message."""
        return lambda: self._join(Setup.read(content))[0]

    def _join(self, setup: Setup) -> tuple[Algorithm[Any, Any, Any], int]:
        """The method of a setup that this node agrees to, and the seed of its users' draws."""
        policies = self.owner.policies()
        if self._joined is None or self._joined[:2] != (setup, policies):
            algorithm = self._method(setup, policies)
            rule, text = rule_in(setup.configuration), setup.configuration
            seed = self.store.join_run(algorithm, setup.run, configuration=text, hold_out=rule)
            self._joined = setup, policies, algorithm, seed
        self.activity.begin(setup.run, type(self._joined[2]).__name__)
        return self._joined[2:]

    def _agreed(self, setup: Setup) -> Algorithm[Any, Any, Any]:
        """The method of a setup whose model this node takes: a coordinator may give the model of another run, which
        this node need not take part in."""
        policies, joined = self.owner.policies(), self._joined
        same = joined is not None and joined[:2] == (setup, policies)
        return joined[2] if joined is not None and same else self._method(setup, policies)

    def _method(self, setup: Setup, policies: Sequence[Policy]) -> Algorithm[Any, Any, Any]:
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
        for policy in policies:
            if why := policy.objection(algorithm):
                raise UploadError("policy", _objection(policy, why))
        if self.bundle is None and service.needs_service(algorithm):
            raise UploadError(
                "bundle", "this node has no bundle; expected one: vectors are for a neighbourhood service only"
            )
        return algorithm


def _objection(policy: Policy, why: str) -> str:
    return f"this node requires the protection of profile {policy.profile} at least, and {why}"


def answer_once(
    store: Store, algorithm: Algorithm[Any, Any, Any], task: Task[Any], request: bytes, seed: int
) -> tuple[Aggregate, Tensor | None]:
    """The sum over the users of a ``task`` who are in the ``store``, whose message has the digest ``request``, and
    these users [b] by identity. It is computed once, and repeated where the same message comes again: then ``None``
    stands for the users.

    Users who were forgotten since the coordinator learnt of them have dropped out. It is not told who they are, only
    how many clients are in the sum.
    """
    users: Tensor | None = None

    def total() -> Aggregate:
        nonlocal users
        here = torch.isin(task.users, store.everyone())
        users = task.users[here]
        return sum_of_users(algorithm, store, task if bool(here.all()) else task.of(here), seed)

    if task.round < 0:  # before the first round no noise is drawn and no state changes
        with store.transaction():
            return total(), users
    made = store.answer_round(task.round, request, lambda: dump(total()))
    assert made is not None
    return load(made), users
