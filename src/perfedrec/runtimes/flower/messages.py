"""How a message travels between our processes and a SuperLink: in as few objects as possible.

Flower moves every record, array and chunk of a message as an object of its own, with a request for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


class Bundler:
    """Turns each array record of a message into one object. A record that several messages share stays one object."""

    _MARK = "arrays"

    def __init__(self) -> None:
        self._made: dict[int, tuple[ArrayRecord, ConfigRecord]] = {}

    def bundle(self, message: Message) -> Message:
        """The message as it travels. It is changed in place."""
        if message.has_content():
            for name, record in list(message.content.array_records.items()):
                if id(record) not in self._made:
                    values: dict[str, int | bytes] = {self._MARK: len(record)}
                    for key, array in record.items():
                        values[f"{array.dtype} {','.join(map(str, array.shape))} {key}"] = array.data
                    # The record is kept as well: while it lives, no other record can have its id.
                    self._made[id(record)] = record, ConfigRecord(dict(values))
                del message.content[name]  # Flower warns of a record that is replaced
                message.content[name] = self._made[id(record)][1]
        return message

    @classmethod
    def unbundle(cls, message: Message) -> Message:
        """The message as it was before :meth:`bundle`. It is changed in place. The arrays are neither read nor checked
        here: that is done by the code that uses them."""
        if message.has_content():
            for name, record in list(message.content.config_records.items()):
                if cls._MARK in record and len(record) == 1 + int(cast(int, record[cls._MARK])):
                    arrays = ArrayRecord()
                    for key, data in record.items():
                        if isinstance(data, bytes):
                            kind, shape, own = key.split(" ", 2)
                            sizes = tuple(int(each) for each in shape.split(",") if each)
                            arrays[own] = Array(kind, sizes, "numpy.ndarray", data)
                    del message.content[name]
                    message.content[name] = arrays
        return message


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
