"""What the coordinator asks the neighbourhood service for, and what it passes on between the service and the nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import Published
from perfedrec.runtimes.flower.codec import Setup, pack, unpack
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.sealing import SEALED
from perfedrec.runtimes.flower.service import ORDER_TABLE, SERVE, ServiceTask

ATTEMPTS = 2
"""How often the service is asked for its part of a round: it may be restarted while it works on it."""

Ask = Callable[[str, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict]]]
"""Sends contents to nodes, as messages of a type, and yields the contents of their answers."""


@dataclass
class ServiceClient:
    """The coordinator's side of its messages with the service, which is the node ``service``.

    ``neighbours`` are the sums that the service published last, and ``starts`` the pre-trained vectors by node, all
    sealed. The latter are kept by the ``names`` of nodes, because to Flower a node with a new key is a new node.
    """

    service: int
    neighbours: ArrayRecord | None = None
    starts: dict[str, ArrayRecord] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, as tensors of bytes that are kept with the coordinator's state."""
        held = {f"start {name}": record for name, record in self.starts.items()}
        if self.neighbours is not None:
            held["neighbours"] = self.neighbours
        return {name: unpack(record)[SEALED] for name, record in held.items()}

    @staticmethod
    def of(service: int, tensors: Mapping[str, Tensor], names: Mapping[int, str] | None = None) -> ServiceClient:
        """The client that held these ``tensors``; ``names`` are the present names of the nodes."""
        held = {name: pack({SEALED: tensor}) for name, tensor in tensors.items()}
        starts = {name.partition(" ")[2]: record for name, record in held.items() if name.startswith("start ")}
        return ServiceClient(service, held.get("neighbours"), starts, names or {})

    def add(self, node: int, content: RecordDict, serving: bool = False) -> RecordDict:
        """An instruction with what the service has published for the ``node``; ``serving``: without what is only needed
        in training."""
        if self.neighbours is not None:
            content["neighbours"] = self.neighbours
        if (name := self._name(node)) in self.starts and not serving:
            content["start"] = self.starts[name]
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
        self.neighbours = arrays.get("neighbours", self.neighbours)
        self.starts |= {self._name(node): arrays[f"start {node}"] for node in nodes if f"start {node}" in arrays}
        published = Published()
        if "clusters" in arrays:
            published = replace(published, **unpack(arrays["clusters"], table.device))
        if "table" in arrays:
            published = replace(published, table=_by_item(ask, arrays["table"], nodes, table))
        refused = {int(node): str(why) for node, why in answer.config_records["refused"].items()}
        return published, refused

    def _name(self, node: int) -> str:
        return self.names.get(node, str(node))


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
