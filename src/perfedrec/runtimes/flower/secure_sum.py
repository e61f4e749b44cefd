"""Secure aggregation as messages: what the coordinator sends in the four stages, and how a node answers.

Stage ``s`` travels as a message of type ``train.s``. What a node has to remember from one stage to the next is in the
context that Flower keeps for it, so that each message may be answered by a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from perfedrec.core.aggregate import Aggregate
from perfedrec.core.errors import PerfedrecError
from perfedrec.privacy.aggregation import from_words, to_words
from perfedrec.runtimes.flower import secagg
from perfedrec.runtimes.flower.codec import pack, unpack
from perfedrec.runtimes.flower.secagg import AbortedError, Participant, Values
from perfedrec.runtimes.round import too_few

RECORD, VECTOR, CLIENTS = "secagg", "vector", "clients"


# --- the coordinator ---


def secure_sum(
    ask: Callable[[str, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict]]],
    refuse: secagg.Refuse,
    instructions: Mapping[int, RecordDict],
    clients: Mapping[int, int],
    example: Aggregate,
    least: int,
    label: str = "",
) -> Aggregate:
    """The sum over the nodes that ``instructions`` are for, and nothing else of any node.

    ``ask`` sends contents to nodes, as messages of a type, and yields the contents of at most one answer of each.
    ``clients`` is the number of each node's users that are asked, ``example`` has the sizes of the sum, and ``label``
    names it. A sum of fewer than the ``least`` number of clients is not opened. Raises
    :class:`~perfedrec.runtimes.flower.secagg.AbortedError` then, and where too few nodes are left, and
    :class:`PerfedrecError` where the phase has user vectors or edges in it.
    """
    if example.reports is not None or example.edges is not None:
        raise PerfedrecError("secure aggregation takes sums, and this phase has user vectors or edges in it")
    counted, answered = 0, dict(clients)

    def send(stage: str, tasks: Mapping[int, Values]) -> Iterator[tuple[int, Values]]:
        contents = {node: RecordDict({RECORD: ConfigRecord(task)}) for node, task in tasks.items()}
        if stage == "masked":
            contents = {node: RecordDict({**instructions[node], **own}) for node, own in contents.items()}
        for node, content in ask(f"train.{stage}", contents):
            try:
                values = _values(content)
            except (KeyError, PerfedrecError) as error:
                refuse(node, f"stage {stage}: {error}")
                continue
            if stage == "masked":  # users may have left the node since it was asked for them
                answered[node] = values.pop(CLIENTS, -1)
                if type(answered[node]) is not int or not 0 <= answered[node] <= clients[node]:
                    refuse(node, f"stage masked: expected the number of its clients, at most {clients[node]}")
                    continue
            yield node, values

    def check(present: Collection[int]) -> None:
        nonlocal counted
        counted = sum(answered[node] for node in present)
        if counted < least:
            raise AbortedError("masked", too_few(counted, least))

    total = secagg.secure_sum(send, list(instructions), to_words(example).numel(), check, refuse, label.encode())
    try:
        return from_words(torch.from_numpy(total.view(np.int64)).to(example.sums.device), counted, example)
    except PerfedrecError as error:
        raise AbortedError("unmask", f"what was opened is not a sum: {error}") from error


def _values(content: RecordDict) -> Values:
    """What a node answered in a stage."""
    values: Values = dict(content.config_records.get(RECORD, {}).items())
    if VECTOR in content.array_records:
        vector = unpack(content.array_records[VECTOR])[VECTOR].cpu().numpy()
        values[VECTOR] = vector.view(np.uint64) if vector.dtype == np.int64 else vector
    return values


# --- a node ---


class Stages:
    """A node's answers to the stages, of which the last is kept.

    A message that a SuperLink has forgotten is sent again, and is answered as before. A stage that comes again with
    another content is out of turn. ``secret`` and ``before_opening`` are those of :func:`answer_stage`.
    """

    def __init__(self, secret: bytes, before_opening: Callable[[list[int]], None]) -> None:
        self.secret, self.before_opening = secret, before_opening
        self._last: tuple[tuple[str, str], RecordDict] | None = None

    def is_repeated(self, message: Message) -> bool:
        """Whether this message was the last to be answered."""
        return self._last is not None and self._last[0] == _asked(message)

    def answer(self, message: Message, context: Context, vector: Callable[[], Aggregate]) -> RecordDict:
        """The content of the answer: see :func:`answer_stage`."""
        if self._last is None or not self.is_repeated(message):
            self._last = None  # an answer is large: the old one is freed before the new one is made
            content = answer_stage(message, context, vector, self.secret, self.before_opening).content
            self._last = _asked(message), content
        return self._last[1]

    def drop(self) -> None:
        """Keep no answer: the last one could not be stored, and must not be sent."""
        self._last = None


def _asked(message: Message) -> tuple[str, str]:
    record = message.content.config_records.get(RECORD)
    return message.metadata.message_type, "" if record is None else record.object_id


def answer_stage(
    message: Message,
    context: Context,
    vector: Callable[[], Aggregate],
    secret: bytes = b"",
    before_opening: Callable[[list[int]], None] = lambda nodes: None,
) -> Message:
    """A node's answer to a message of any stage. ``vector`` computes what the node adds to the sum; it is called in
    stage "masked" only.

    ``secret`` is shared by the nodes, which vouch for their keys with it. ``before_opening`` receives the nodes that
    are in the sum before this node helps to open it, and may raise. Raises :class:`PerfedrecError` where the message is
    out of turn, or asks for what must stay secret.
    """
    stage = message.metadata.message_type.partition(".")[2]
    try:
        asked: dict[str, Any] = dict(message.content.config_records[RECORD].items())
        if stage == "keys":
            participant = Participant(message.metadata.dst_node_id, asked.pop("session"))
        else:
            participant = Participant(**cast(Any, context.state.config_records[RECORD]))
        content = RecordDict()
        if stage == "masked":
            participant.receive(**asked)
            part = vector()
            words = to_words(part).cpu().numpy().view(np.uint64)
            content[RECORD] = ConfigRecord({CLIENTS: part.clients})
            content[VECTOR] = pack({VECTOR: torch.from_numpy(participant.mask(words).view(np.int64))})
        else:
            known = {"secret": secret} if stage in ("keys", "shares") else {}
            content[RECORD] = ConfigRecord(getattr(participant, stage)(**asked, **known))
        if stage == "unmask":
            before_opening(asked["present"])
    except (KeyError, TypeError, ValueError) as error:
        raise PerfedrecError(f"stage {stage} of secure aggregation cannot be read: {error!r}") from error
    context.state[RECORD] = ConfigRecord(participant.record())
    return Message(content, reply_to=message)
