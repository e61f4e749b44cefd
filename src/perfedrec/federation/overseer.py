"""What a coordinator watches for its operator beside the rounds: nodes that stand out, that change their state, and
whose requests were refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from perfedrec.federation.admission import Admission
from perfedrec.federation.hosts import Hosts
from perfedrec.federation.metrics import Watch
from perfedrec.federation.run import FederatedRun
from perfedrec.federation.unusual import GROUP, STATE, Unusual, large_share, standing_out
from perfedrec.runs.progress import round_name
from perfedrec.runtimes.flower import Apart, Coordinator, Refused, Rejection


@dataclass
class Overseer:
    """Watches a ``run`` with a ``coordinator``. ``refused`` reads what the SuperLink has refused."""

    run: FederatedRun
    coordinator: Coordinator
    admission: Admission
    watch: Watch
    refused: Refused
    _apart: dict[int, Apart] = field(default_factory=dict)

    def begin(self, hosts: Mapping[int, Tensor]) -> None:
        """A run begins, or continues, with the users in ``hosts``, which is written down."""
        self.admission.begin(hosts)
        all_, names = self.run.users, self.watch.names
        assert all_ is not None, "the run has not begun"
        Hosts(self.run.folder.path).add({names[node]: all_[users] for node, users in hosts.items()})
        if self.run.progress.done:
            return  # the share was noted when it began
        for each in large_share({self.watch.names[node]: users.numel() for node, users in hosts.items()}):
            self._note(each)

    def look(self, tell: Callable[[str], None]) -> None:
        """Look at the round that was just played; ``tell`` receives a line about all that was found."""
        number, coordinator = self.run.progress.done - 1, self.coordinator
        where = round_name(number, self.run.n_phases)
        found = standing_out(coordinator.seen, self.watch.names)
        coordinator.seen.clear()
        for each in found:
            tell(f"{where}: {' and '.join(each.nodes)} stood out: {each.text}")
            self._note(each)
        for each in self._changes(number):
            tell(f"{where}: node {each.nodes[0]} {each.text}")
            self.run.folder.append_unusual(asdict(each))
        self.admission.waited(self.run.setup.run, number, coordinator.present)
        self._note_refused(number, where, tell)

    def _note(self, each: Unusual) -> None:
        self.run.folder.append_unusual(asdict(each))
        kind = each.statistic if len(each.nodes) == 1 else GROUP
        self.watch.note([(name, kind) for name in each.nodes], ())

    def _changes(self, number: int) -> list[Unusual]:
        """The nodes of which another thing held in this round than in the one before."""
        before, self._apart = self._apart, dict(self.coordinator.apart)
        known, found = self.admission.nodes(), []
        for node in sorted(before.keys() | self._apart.keys()):
            now = self._apart.get(node)
            if (now and now.state) == (before[node].state if node in before else None):
                continue
            name = self.watch.names[node]
            decided = known[name].decision
            why = f" (decision {decided})" if decided is not None else ""
            text = f"takes part in sums from now on{why}" if now is None else f"is {now.state}{why}: {known[name].why}"
            found.append(Unusual(number, "", (name,), STATE, float(now is None), 1.0, None, text))
        return found

    def _note_refused(self, number: int, where: str, tell: Callable[[str], None]) -> None:
        """Write down the nodes whose requests the SuperLink has refused since the last round."""
        for node, why in self.refused.news():
            name = self.watch.names.get(node, str(node))
            line = asdict(Rejection(node, number, "", "limit", f"requests were refused: {why}", 0))
            self.run.folder.append_rejection(line | {"node": name})
            self.watch.note((), [name])
            tell(f"{where}: requests of node {name} were refused: {why}")
