"""How a message travels between our processes and a SuperLink: in few objects.

Flower moves every record, array and chunk of a message as an object of its own, with a request for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

PART_BYTES = 8 * 2**20
"""The most bytes of arrays in one object. A SuperLink and its clients hold an object in memory several times, and do
nothing else while they copy it: with large ones, heartbeats would wait. Protobuf ends at 2 GiB."""


class Bundler:
    """Turns each array record of a message into one object, or into several if it has more than :data:`PART_BYTES`. A
    record that several messages share stays the same objects."""

    _MARK, _NUMBER = "arrays", "part"

    def __init__(self) -> None:
        self._made: dict[int, tuple[ArrayRecord, list[ConfigRecord]]] = {}

    def bundle(self, message: Message) -> Message:
        """The message as it travels. It is changed in place."""
        if message.has_content():
            for name, record in list(message.content.array_records.items()):
                if id(record) not in self._made:
                    # The record is kept as well: while it lives, no other record can have its id.
                    self._made[id(record)] = record, self._parts(record)
                del message.content[name]  # Flower warns of a record that is replaced
                for number, part in enumerate(self._made[id(record)][1]):
                    message.content[f"{name} part {number}"] = part
        return message

    @classmethod
    def _parts(cls, record: ArrayRecord) -> list[ConfigRecord]:
        """The arrays of a record, cut into parts. An array may be in several of them, one after the other."""
        made, room = [dict[str, int | bytes]()], PART_BYTES
        for key, array in record.items():
            name, rest = f"{array.dtype} {','.join(map(str, array.shape))} {key}", memoryview(array.data)
            while True:
                made[-1][name], rest, room = bytes(rest[:room]), rest[room:], room - len(rest[:room])
                if not rest:
                    break
                made.append({})
                room = PART_BYTES
        return [
            ConfigRecord({cls._MARK: len(values), cls._NUMBER: number, **values}) for number, values in enumerate(made)
        ]

    @classmethod
    def unbundle(cls, message: Message) -> Message:
        """The message as it was before :meth:`bundle`. It is changed in place. The arrays are neither read nor checked
        here: that is done by the code that uses them. Records that :meth:`bundle` did not make stay as they are."""
        if not message.has_content():
            return message
        parts = dict[str, dict[int, ConfigRecord]]()
        for name, record in message.content.config_records.items():
            base, mark, number = name.rpartition(" part ")
            if mark and number.isdecimal() and {cls._MARK, cls._NUMBER} <= record.keys():
                parts.setdefault(base, {})[int(number)] = record
        for base, records in parts.items():
            with suppress(ValueError):
                arrays = cls._joined([record for _, record in sorted(records.items())])
                for each in records:
                    del message.content[f"{base} part {each}"]
                message.content[base] = arrays
        return message

    @staticmethod
    def _joined(parts: list[ConfigRecord]) -> ArrayRecord:
        """The arrays in the parts of a record, which are in order."""
        pieces, arrays = dict[str, list[bytes]](), ArrayRecord()
        for part in parts:
            for key, data in part.items():
                if isinstance(data, bytes):
                    pieces.setdefault(key, []).append(data)
        for key, found in pieces.items():
            kind, shape, own = key.split(" ", 2)
            sizes = tuple(int(each) for each in shape.split(",") if each)
            arrays[own] = Array(kind, sizes, "numpy.ndarray", found[0] if len(found) == 1 else b"".join(found))
        return arrays


@dataclass(frozen=True)
class Parts:
    """A message taken apart: its ``head`` without content, the ``tree`` of names of its objects, and the ``objects`` by
    name."""

    head: ProtoMessage
    tree: ObjectTree
    objects: Mapping[str, InflatableObject]


def take_apart(message: Message) -> Parts:
    """A bundled message as it is sent.

    Call it, and use the objects, within Flower's ``no_object_id_recompute``: each object is hashed again otherwise.
    """
    message.metadata.__dict__["_message_id"] = message.object_id
    head = message_to_proto(remove_content_from_message(message))
    return Parts(head, get_object_tree(message), get_all_nested_objects(message))


def put_together(name: str, contents: dict[str, bytes]) -> Message:
    """The message with the ``name`` whose objects have these ``contents``, unbundled."""
    message = cast(Message, inflate_object_from_contents(name, contents))
    message.metadata.__dict__["_message_id"] = name
    return Bundler.unbundle(message)
