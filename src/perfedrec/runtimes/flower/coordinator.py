"""The coordinator of a deployment: which nodes take part, the rounds, and the model that nodes receive afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from perfedrec.core.aggregate import from_fixed
from perfedrec.core.algorithm import Algorithm
from perfedrec.core.counted import counted
from perfedrec.core.errors import PerfedrecError
from perfedrec.core.types import NEWCOMER, Plan, RoundReport
from perfedrec.runtimes.evaluation import Question
from perfedrec.runtimes.flower import evaluation
from perfedrec.runtimes.flower.codec import SERVING, Instructions, Setup, UploadError, array_bytes
from perfedrec.runtimes.flower.connection import AwayError
from perfedrec.runtimes.flower.evaluation import Answers
from perfedrec.runtimes.flower.exchange import BYTES_A_SECOND, POLL, Rejection, exchange
from perfedrec.runtimes.flower.gate import Apart, Gate, Open, tell
from perfedrec.runtimes.flower.registration import Registration
from perfedrec.runtimes.flower.rounds import Directory, Federation, Round, Seen, play_round
from perfedrec.runtimes.flower.service_client import ServiceClient


@dataclass
class Coordinator:
    """Plays the rounds of a ``federation`` over a ``grid``, with the nodes that agree to its setup.

    Nodes whose answers were missing in a round are appended to ``rejected``.
    """

    grid: Grid
    federation: Federation[Any, Any, Any]
    names: Mapping[int, str] | None = None
    """The nodes that may take part, with their names (``None``: all nodes). This is needed because everybody who can
    reach a SuperLink's control API can register nodes."""

    known: Tensor | None = None
    """The users [n] of a run that is continued: no other user joins it, and those whose nodes are not connected do not
    take part."""

    service: int | None = None
    """The node that is registered as the neighbourhood service: it hosts no users."""

    gate: Gate = field(default_factory=Open)
    """Who decides which nodes count. Users of nodes that do not are in no sum, and are asked for nothing in rounds."""

    directory: Directory | None = None
    rejected: list[Rejection] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    """What was seen of single nodes' sums in rounds, until somebody clears it."""

    present: frozenset[int] = frozenset()
    """The nodes that were connected when the coordinator last looked: it looks while it waits for nodes, and at the
    start of each round."""

    apart: Mapping[int, Apart] = field(default_factory=dict)
    """The nodes that did not count when the coordinator last looked."""

    @property
    def algorithm(self) -> Algorithm[Any, Any, Any]:
        """The method that is played."""
        return self.federation.algorithm

    @property
    def service_client(self) -> ServiceClient | None:
        """What asks the neighbourhood service; ``None`` where the method needs none."""
        return self.federation.service_client

    def assemble(
        self,
        min_nodes: int,
        min_users: int,
        seconds: float,
        log: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Directory:
        """Wait until ``min_nodes`` nodes and ``min_users`` users are present, and the service where it is needed.
        ``log`` receives one line for each change. Only nodes that count are waited for.

        A node that hosts a user of another node is refused. Raises
        :class:`~perfedrec.runtimes.flower.connection.AwayError` after ``seconds``, and once ``stopped`` is true.
        """

        def refuse(node: int, error: UploadError) -> None:
            self.rejected.append(Rejection(node, -1, "registration", error.reason, str(error), 0))
            log(f"node {node if self.names is None else self.names[node]} is refused: {error}")

        end, last = time.monotonic() + seconds, ""
        registration = Registration(self.grid, self.federation, self.known, self.service, refuse, self.gate.claim)
        while True:
            present = self._look()
            registration.ask(present)
            registration.read()
            self._set_apart()  # what a node has answered may decide whether it counts
            counting = present - self.apart.keys()
            here = [users.numel() for node, users in registration.users.items() if node in counting]
            served = self.service_client is None or registration.service_agrees
            line = (
                f"{counted(len(here), 'node')} and {counted(sum(here), 'user')} are present (needed: {min_nodes} "
                f"and {min_users})"
            )
            apart = sum(node in self.apart for node in present)
            line += f", beside {counted(apart, 'that does not count', 'that do not count')}" if apart else ""
            line += "" if served else ", and the neighbourhood service is not"
            if line != last:
                log(last := line)
            if len(here) >= min_nodes and sum(here) >= min_users and served:
                break
            if stopped() or time.monotonic() > end:
                raise AwayError(f"gave up waiting: {line}")
            time.sleep(4 * POLL)
        self.directory = registration.directory()
        return self.directory

    def _look(self) -> set[int]:
        """The nodes that are connected and may be asked something."""
        present = set(self.grid.get_node_ids())
        if self.service_client is None:  # the service is asked nothing
            present -= {self.service}
        self.present = frozenset(present if self.names is None else present & self.names.keys())
        self._set_apart()
        return {node for node in self.present if node not in self.apart or not self.apart[node].excluded}

    def _set_apart(self) -> None:
        """Ask the gate which nodes do not count, and tell those for which that has changed."""
        before, self.apart = self.apart, dict(self.gate.apart())
        for node in sorted(self.present & (before.keys() | self.apart.keys())):
            if (now := self.apart.get(node)) != before.get(node):
                said = "what this node sends counts" if now is None else f"this node takes no part in sums: {now.why}"
                tell(self.grid, node, said, self.federation.deadline)

    def _counting(self, directory: Directory) -> Directory:
        """The directory of those nodes that are connected and count."""
        present = self._look() - self.apart.keys()
        return replace(directory, hosts={node: users for node, users in directory.hosts.items() if node in present})

    def _assembled(self) -> Directory:
        assert self.directory is not None, "expected assemble() before rounds"
        return self.directory

    # --- states ---

    def blank(self) -> Any:
        """A state of the right kind and sizes, which gives a stored state its types."""
        return self._start(torch.ones(self.federation.n_items))

    def begin(self) -> Any:
        """The state before the first round.

        Where the method needs item degrees, and clients do not release them in a phase of their own, the nodes are
        asked for them: in a secure sum, whatever the method's other sums are, unless there is one node only. Raises
        :class:`PerfedrecError` where no node answers, or too few for a secure sum.
        """
        state, directory = self.blank(), self._assembled()
        if not self.algorithm.needs_degrees:
            return state
        plan = Plan("degrees", torch.arange(directory.identities.numel()))
        before = replace(state, round=-1)  # before the first round; nodes answer this question once
        hosts = {node: users for node, users in directory.hosts.items() if node not in self.apart}
        asked = replace(directory, hosts=hosts)
        question = Round(self.grid, replace(self.federation, service_client=None, keeper=None), asked, before, plan)
        total = question.collect(secure=sum(users.numel() > 0 for users in hosts.values()) > 1)
        self.rejected += question.traffic.rejections
        if not total.clients:
            why = "; ".join(dict.fromkeys(each.detail for each in question.traffic.rejections))
            raise PerfedrecError(f"no node has sent its users' item degrees: {why}")
        degrees = torch.zeros(self.federation.n_items)
        return self._start(degrees.index_copy_(0, total.keys, from_fixed(total.sums).squeeze(1)))

    def _start(self, degrees: Tensor) -> Any:
        """The first state. It has no tokens where there is a service: the coordinator must not know them."""
        state = self.federation.first(self._assembled().identities.numel(), degrees)
        return state if self.service_client is None else self.federation.served_algorithm.without_tokens(state)

    # --- rounds ---

    def play(self, state: Any) -> tuple[Any, RoundReport]:
        """Play the next round with the nodes that are connected and count: see
        :func:`~perfedrec.runtimes.flower.rounds.play_round`."""
        directory = self._assembled()
        counting = self._counting(directory)
        for node in sorted(directory.hosts.keys() - self.present - self.apart.keys()):
            self.rejected.append(Rejection(node, state.round, "", "away", "it is not connected", 0))
        return play_round(self.grid, self.federation, counting, state, self.rejected, self.seen)

    def evaluate(self, served: Any, question: Question) -> Answers:
        """Put a ``question`` about a ``served`` state to all users whose nodes are connected and count. Nodes whose
        answers are missing are appended to ``rejected``."""
        directory = self._assembled()
        alone = sum(users.numel() > 0 for users in directory.hosts.values()) < 2
        answers = evaluation.ask(self.grid, self.federation, self._counting(directory), served, question, alone)
        self.rejected += answers.rejections
        return answers

    def hand_out(self, state: Any) -> list[int]:
        """Send every connected node the model that it recommends with, and return the nodes that received it."""
        directory, setup = self._assembled(), self.federation.setup
        served = self.algorithm.serving(state)
        instructions = Instructions(self.algorithm, served, SERVING, 0, directory.identities, setup)
        return self._give(instructions, directory.hosts, self.service_client)

    def hand_out_other(self, algorithm: Algorithm[Any, Any, Any], state: Any, users: Tensor, setup: Setup) -> list[int]:
        """Send every connected node the served ``state`` of another run with this ``setup``, and return the nodes that
        received it. ``users`` [n] are the identities of those who took part in that run, ascending (of a simulation
        each is :data:`NEWCOMER`); others are served as new users. The method's users must need nothing from a
        neighbourhood service.
        """
        directory, hosts = self._assembled(), {}
        for node, hosted in directory.hosts.items():
            here = directory.identities[hosted]
            hosts[node] = torch.searchsorted(users, here[torch.isin(here, users)])
        return self._give(Instructions(algorithm, algorithm.serving(state), SERVING, 0, users, setup), hosts, None)

    def _give(
        self, instructions: Instructions[Any], hosts: Mapping[int, Tensor], service_client: ServiceClient | None
    ) -> list[int]:
        """Send the model of some ``instructions`` to the connected nodes, for the users in ``hosts`` and new ones."""
        present, newcomer = self._look(), torch.tensor([NEWCOMER])
        contents = {
            node: instructions.content(torch.cat([users, newcomer])) for node, users in hosts.items() if node in present
        }
        if service_client is not None:
            contents = {node: service_client.add(node, each, serving=True) for node, each in contents.items()}
        messages = [
            Message(content, dst_node_id=node, message_type="query.model") for node, content in contents.items()
        ]
        sent = sum(array_bytes(content) for content in contents.values())
        answers = exchange(self.grid, messages, self.federation.deadline + sent / BYTES_A_SECOND)
        return sorted(node for node, answer in answers if not answer.has_error())
