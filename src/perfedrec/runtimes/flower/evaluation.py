"""Evaluation by the nodes: the coordinator's question, and a node's answer, which is a sum over its users.

The question travels as a round does, with the model that would be served at that moment. Sums are secure wherever there
are two nodes or more, whatever the method's other sums are: what a user finds good is nobody's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, reduce
from perfedrec.core.algorithm import EVALUATE, Algorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.keys import Key, words_of
from perfedrec.core.scoring import RANKED_AT_ONCE
from perfedrec.evaluation import Held, RandomOrder
from perfedrec.evaluation.ranking import cutoffs
from perfedrec.evaluation.sample import in_sample
from perfedrec.runtimes.evaluation import PARTS, Question, Wanted, evaluate_users
from perfedrec.runtimes.flower.codec import Instructions, Task, UploadError, read_reply
from perfedrec.runtimes.flower.exchange import Rejection, Traffic
from perfedrec.runtimes.flower.rounds import Directory, Federation
from perfedrec.runtimes.flower.secagg import AbortedError
from perfedrec.runtimes.flower.secure_sum import secure_sum
from perfedrec.runtimes.node import Store
from perfedrec.runtimes.round import too_few

RECORD = "question"


@dataclass(frozen=True)
class Answers:
    """What a question has brought: for each setting of the model (``choices``) the metrics as means over users, nothing
    where no figure is opened; ``why`` it is not, in a few words; bytes up and down; and the nodes whose answers are
    missing."""

    choices: tuple[dict[str, float], ...]
    why: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    rejections: tuple[Rejection, ...] = ()


# --- the coordinator ---


def ask(
    grid: Grid, federation: Federation[Any, Any, Any], directory: Directory, state: Any, question: Question, alone: bool
) -> Answers:
    """Put a ``question`` about the served ``state`` to all users of a ``directory``. ``alone``: there is one node only,
    whose sum is open.

    A figure over fewer users than ``privacy.min_clients`` is not opened.
    """
    algorithm, hosts = federation.algorithm, {node: users for node, users in directory.hosts.items() if users.numel()}
    clients = {node: users.numel() for node, users in hosts.items()}
    traffic = Traffic(grid, state.round, EVALUATE.name, federation.deadline, clients)
    made = Instructions(algorithm, state, EVALUATE.name, sum(clients.values()), directory.identities, federation.setup)
    contents = {node: made.content(users) for node, users in hosts.items()}
    if (client := federation.service_client) is not None:
        contents = {node: client.add(node, each, serving=True) for node, each in contents.items()}
    for content in contents.values():
        content[RECORD] = ConfigRecord(
            {
                "part": question.part,
                "ks": list(question.ks),
                "keep": list(question.keep),
                "metric": question.metric,
                "share": question.share,
            }
        )
    example, least = question.empty(algorithm, federation.n_items), algorithm.settings.privacy.min_clients
    try:
        if alone:
            total = _in_the_clear(traffic, contents, directory, example, least)
        else:
            run = "" if federation.setup is None else federation.setup.run
            label = f"{run} {question.number}"
            total = secure_sum(traffic.ask, traffic.refuse, contents, clients, example, least, label)
        found, why = tuple(question.means(total)), ""
    except AbortedError as error:
        found, why = (), str(error)
    up, rejections = sum(traffic.up.values()), tuple(traffic.rejections)
    return Answers(found, why, up, traffic.down, rejections)


def _in_the_clear(
    traffic: Traffic, contents: Mapping[int, RecordDict], directory: Directory, example: Aggregate, least: int
) -> Aggregate:
    """The sum of the only node."""
    total = example
    for node, content in traffic.ask("train", contents):
        try:
            total = read_reply(content, directory.identities[directory.hosts[node]], example)
        except UploadError as error:
            traffic.refuse(node, str(error), error.reason)
    if total.clients < least:
        raise AbortedError(EVALUATE.name, too_few(total.clients, least))
    return total


# --- a node ---


def read_question(content: RecordDict, played: int) -> Question:
    """The question in a message. Raises :class:`UploadError` where it cannot be read."""
    try:
        record: dict[str, Any] = dict(content.config_records[RECORD].items())
        keep = tuple(int(each) for each in record["keep"])
        metric, share = str(record["metric"]), float(record["share"])
        question = Question(str(record["part"]), cutoffs(record["ks"]), played, keep, metric, share)
    except (KeyError, PerfedrecError, TypeError, ValueError) as error:
        raise UploadError("malformed", f"the question of an evaluation cannot be read: {error!r}") from error
    if question.part not in PARTS:
        raise UploadError("malformed", f"an evaluation of the part {question.part}; expected {' or '.join(PARTS)}")
    if not 0 < question.share <= 1 or not set(question.squared) <= set(question.names):
        raise UploadError("malformed", f"an evaluation of a share {question.share} of users by {question.metric!r}")
    return question


def answer(
    store: Store, algorithm: Algorithm[Any, Any, Any], task: Task[Any], question: Question
) -> tuple[Aggregate, Tensor]:
    """The sum over those users of a ``task`` who are in the ``store`` and hold out items, and these users [b] by
    identity. States do not change."""
    names = {identity: name for name, identity in store.user_ids().items()}
    total, users = question.empty(algorithm, store.n_items), [task.users[:0]]
    if question.part == "valid":
        store.keep_states(question.played, question.keep)
    for block in torch.arange(task.users.numel()).split(RANKED_AT_ONCE):
        with store.transaction():  # nobody is forgotten meanwhile
            here = task.users[block]
            here = here[torch.isin(here, store.everyone())]
            tested = store.held_out(here, PARTS[question.part]).offsets.diff() > 0
            counted = here[tested & in_sample(words_of(names[each] for each in here.tolist()), question.share)]
            if counted.numel():
                own = task.of(torch.isin(task.users, counted))
                ids = np.array([names[each] for each in own.users.tolist()], dtype=object)
                total = total + _sum(store, algorithm, own, question, RandomOrder(ids, store.item_ids))
                users.append(own.users)
    return replace(total, weights=torch.zeros_like(total.weights)), torch.cat(users)


def _sum(
    store: Store, algorithm: Algorithm[Any, Any, Any], task: Task[Any], question: Question, order: RandomOrder
) -> Aggregate:
    """The sum over the users of a task, who all hold out items."""
    users, everyone = task.users, torch.arange(task.users.numel())
    rows, _ = store.rows(users)
    held, nothing = store.held_out(users, PARTS[question.part]), Held(users.new_zeros(users.numel() + 1), users[:0])
    hidden = store.held_out(users, PARTS["valid"]) if question.part == "test" else nothing
    client_state = store.find_client_states(users, question.played).client_state
    wanted = Wanted(held, hidden, order, question.ks)
    asked = question.n_choices(algorithm), question.squared
    update, _ = evaluate_users(algorithm, task.broadcast, rows, client_state, everyone, wanted, *asked)
    update = algorithm.protection.upload(EVALUATE.name, update, Key(0))
    return reduce(update, store.n_items, 1)
