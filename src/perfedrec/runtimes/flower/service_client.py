"""What the coordinator asks the neighbourhood service for, and what it passes on between the service and the nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Published
from perfedrec.runtimes.flower.codec import Setup, pack, unpack
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.sealing import SEALED
from perfedrec.runtimes.flower.service import BY_TOKEN, BY_USER, ORDER_TABLE, SERVE, ServiceTask

ATTEMPTS = 2
"""How often the service is asked for its part of a round: it may be restarted while it works on it."""

Ask = Callable[[str, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict]]]
"""Sends contents to nodes, as messages of a type, and yields the contents of their answers."""


@dataclass
class ServiceClient:
    """The coordinator's side of its messages with the service, which is the node ``service``.

    ``held`` is what the service published last, all sealed: tables for all nodes by their names (``neighbours``), and
    what is for the users of one node (``start NODE``). The latter is kept by the ``names`` of nodes, because to Flower
    a node with a new key is a new node.
    """

    service: int
    held: dict[str, ArrayRecord] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, as tensors of bytes that are kept with the coordinator's state."""
        return {name: unpack(record)[SEALED] for name, record in self.held.items()}

    @staticmethod
    def of(service: int, tensors: Mapping[str, Tensor], names: Mapping[int, str] | None = None) -> ServiceClient:
        """The client that held these ``tensors``; ``names`` are the present names of the nodes."""
        return ServiceClient(service, {name: pack({SEALED: tensor}) for name, tensor in tensors.items()}, names or {})

    def add(self, node: int, content: RecordDict, serving: bool = False) -> RecordDict:
        """An instruction with what the service has published for the ``node``; with the neighbourhood model too where
        users are scored (``serving``)."""
        for name in ("neighbours", "low_rank") if serving else ("neighbours",):
            if name in self.held:
                content[name] = self.held[name]
        for name in ("start", "near") if serving else ("start",):
            if (record := self.held.get(f"{name} {self._name(node)}")) is not None:
                content[name] = record
        return content

    def consult(
        self, ask: Ask, task: ServiceTask, table: Tensor, setup: Setup | None = None
    ) -> tuple[Published, dict[int, str]]:
        """Have the service play its part of a round. Returns what the coordinator may know of what it published, and
        the nodes that it refused, with the reasons.

        ``table`` [m, d] has the sizes of a pre-trained table. Raises
        :class:`~perfedrec.runtimes.flower.connection.AwayError` where the service does not answer.
        """
        content = task.content(setup)
        for _ in range(ATTEMPTS):
            if answers := dict(ask(SERVE, {self.service: content})):
                break
        else:
            raise AwayError(f"the neighbourhood service, node {self.service}, does not answer")
        answer = answers[self.service]
        arrays, nodes = answer.array_records, list(task.sealed)
        self.held |= {name: arrays[name] for name in BY_TOKEN if name in arrays}
        for name in BY_USER:
            self.held |= {f"{name} {self._name(node)}": own for node in nodes if (own := arrays.get(f"{name} {node}"))}
        published = Published()
        if "clusters" in arrays:
            found = unpack(arrays["clusters"], table.device)
            published = replace(published, labels=found.get("labels"), centroids=found["centroids"])
        if "table" in arrays:
            scale = answer.config_records.get("scale", ConfigRecord()).get("user_init_scale")
            ordered = _by_item(ask, arrays["table"], nodes, table)
            published = replace(published, table=ordered, user_init_scale=_length(scale))
        refused = {int(node): str(why) for node, why in answer.config_records["refused"].items()}
        return published, refused

    def _name(self, node: int) -> str:
        return self.names.get(node, str(node))


def _length(scale: object) -> float | None:
    """The first length of user vectors, if the service has published a positive number."""
    return scale if isinstance(scale, float) and 0 < scale < inf else None


def _by_item(ask: Ask, sealed: ArrayRecord, nodes: list[int], like: Tensor) -> Tensor:
    """A table by token in the order of items, from the first node that can read it."""
    for node in nodes:
        for _, content in ask(ORDER_TABLE, {node: RecordDict({"table": sealed})}):
            table = unpack(content.array_records.get("table", ArrayRecord()), like.device).get("table")
            if table is not None and table.shape == like.shape and bool(table.isfinite().all()):
                return table
    raise PerfedrecError(
        "no node brought the pre-trained table into the order of items; expected one that is connected"
    )
