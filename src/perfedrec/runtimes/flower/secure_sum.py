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

RECORD, VECTOR = "secagg", "vector"


def secure_sum(
    ask: Callable[[str, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict]]],
    refuse: secagg.Refuse,
    instructions: Mapping[int, RecordDict],
    clients: Mapping[int, int],
    like: Aggregate,
    aborted: Callable[[int], bool],
    label: str = "",
) -> Aggregate:
    """The sum over the nodes that ``instructions`` are for, with the sizes of ``like``, and nothing else of any node.

    ``ask`` sends contents to nodes, as messages of a type, and gives the contents of at most one answer of each.
    ``clients``: how many of each node's users take part. ``label`` names the sum. A sum of so few that it is
    ``given_up`` is not opened. Raises :class:`~perfedrec.runtimes.flower.secagg.AbortedError` for that, and where too
    few nodes are left.
    """
    if like.reports is not None or like.edges is not None:
        raise PerfedrecError("secure aggregation takes sums, and this phase has user vectors or edges in it")
    counted = 0

    def send(stage: str, tasks: Mapping[int, Values]) -> Iterator[tuple[int, Values]]:
        contents = {node: RecordDict({RECORD: ConfigRecord(task)}) for node, task in tasks.items()}
        if stage == "masked":
            contents = {node: RecordDict({**instructions[node], **own}) for node, own in contents.items()}
        for node, content in ask(f"train.{stage}", contents):
            try:
                values: Values = dict(content.config_records.get(RECORD, {}).items())
                if VECTOR in content.array_records:
                    vector = unpack(content.array_records[VECTOR])[VECTOR].cpu().numpy()
                    values[VECTOR] = vector.view(np.uint64) if vector.dtype == np.int64 else vector
            except (KeyError, PerfedrecError) as error:
                refuse(node, f"stage {stage}: {error}")
                continue
            yield node, values

    def check(present: Collection[int]) -> None:
        nonlocal counted
        counted = sum(clients[node] for node in present)
        if aborted(counted):
            raise AbortedError("masked", f"{counted} clients are too few for a sum")

    total = secagg.secure_sum(send, list(instructions), to_words(like).numel(), check, refuse, label.encode())
    try:
        return from_words(torch.from_numpy(total.view(np.int64)).to(like.sums.device), counted, like)
    except PerfedrecError as error:
        raise AbortedError("unmask", f"what was opened is no sum: {error}") from error


class Stages:
    """A node's answers to the stages. The last one is kept: what a SuperLink has forgotten is asked again, and must be
    answered as before, while a stage that comes again with another content is out of turn.

    ``secret`` and ``opens`` as in :func:`take_part`."""

    def __init__(self, secret: bytes, opens: Callable[[list[int]], None]) -> None:
        self.secret, self.opens = secret, opens
        self._last: tuple[tuple[str, str], RecordDict] | None = None

    def answer(self, message: Message, context: Context, vector: Callable[[], Aggregate]) -> Message:
        """See :func:`take_part`."""
        record = message.content.config_records.get(RECORD)
        asked = message.metadata.message_type, "" if record is None else record.object_id
        if self._last is None or self._last[0] != asked:
            self._last = None  # what is kept is large
            self._last = asked, take_part(message, context, vector, self.secret, self.opens).content
        return Message(self._last[1], reply_to=message)


def take_part(
    message: Message,
    context: Context,
    vector: Callable[[], Aggregate],
    secret: bytes = b"",
    opens: Callable[[list[int]], None] = lambda nodes: None,
) -> Message:
    """A node's answer to a message of any stage; ``vector`` gives what it has to add, when it comes to that.

    ``secret`` is what nodes have in common to vouch for their keys. ``opens`` is told with which nodes the vector is in
    a sum before the node helps to open it, and may raise. Raises :class:`PerfedrecError` where the message is out of
    turn, or asks for what must not be told.
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
            words = to_words(vector()).cpu().numpy().view(np.uint64)
            content[VECTOR] = pack({VECTOR: torch.from_numpy(participant.mask(words).view(np.int64))})
        else:
            known = {"secret": secret} if stage in ("keys", "shares") else {}
            content[RECORD] = ConfigRecord(getattr(participant, stage)(**asked, **known))
        if stage == "unmask":
            opens(asked["present"])
    except (KeyError, TypeError, ValueError) as error:
        raise PerfedrecError(f"stage {stage} of secure aggregation cannot be read: {error!r}") from error
    context.state[RECORD] = ConfigRecord(participant.record())
    return Message(content, reply_to=message)
