"""What a coordinator writes down for its operator: how a run is, in ``status.json``, and lines of its begin and end.

``status.json`` is written whenever something has changed, whole or not at all. Whoever looks at the run reads it
(:mod:`perfedrec.federation.status`), and asks the coordinator nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfedrec.core.counted import counted
from perfedrec.core.errors import PerfedrecError
from perfedrec.federation.metrics import COORDINATOR, Figure, plain
from perfedrec.federation.run import FederatedRun
from perfedrec.privacy.report import privacy_block
from perfedrec.runs.files import STATUS
from perfedrec.runs.signals import InterruptedRunError
from perfedrec.runs.summary import Summary
from perfedrec.runtimes.flower import Coordinator

FORMAT = 1


@dataclass
class Record:
    """How a ``run`` with a ``coordinator`` is: ``figures`` gives those of the metrics, ``tell`` receives lines."""

    run: FederatedRun
    coordinator: Coordinator
    figures: Callable[[], Mapping[str, Figure]]
    tell: Callable[[str], None]
    keys: Path | None = None
    """The folder of the nodes' public keys, with the register of nodes."""

    protection: str = ""
    """What the run guarantees once it is over, in one sentence; not known before it begins."""

    def write(self, state: str, why: str = "") -> None:
        """Write the ``state`` of the run: waiting, running, finished, stopped or failed; the last two with a reason."""
        run = self.run
        content = {
            "format": FORMAT,
            "state": state,
            "why": why,
            "written": time.time(),
            "run": run.setup.run,
            "method": run.config.algorithm,
            "phases": run.n_phases,
            "metric": run.config.run.select_by,
            "users": run.progress.users or None,
            "protection": self.protection,
            "delta": run.algorithm.settings.privacy.delta,
            "keys": "" if self.keys is None else str(self.keys.absolute()),
            "nodes": self._nodes(),
            "figures": plain(COORDINATOR, self.figures()),
        }
        run.folder.write(STATUS, json.dumps(content).encode())

    def waiting(self, line: str) -> None:
        """The run waits for nodes; ``line`` says for which."""
        self.tell(line)
        self.write("waiting", line)

    def begin(self) -> None:
        """The first round of this process begins."""
        run, progress = self.run, self.run.progress
        phases = f" after {counted(run.n_phases, 'phase')}" if run.n_phases else ""
        rounds = f"{counted(progress.total - run.n_phases, 'round')} of training{phases}"
        how = f"continues after {progress.place}" if progress.done else "begins"
        who = f"{counted(len(self._hosts), 'node')} with {counted(progress.users, 'user')}"
        self.tell(f"run {run.setup.run} {how}: {run.config.algorithm}, {rounds}, {who}")
        self.protection = self._claim()
        self.write("running")

    def end(self, summary: Summary, instead: str = "") -> None:
        """The run has ended as planned. ``instead`` says which model nodes have where it is not that of the run."""
        metric, best = self.run.config.run.select_by, ""
        if summary.valid:
            number = summary.best_round
            best = f"best round {number}" if number > 0 else f"best phase {number + summary.n_phases} before training"
            best += f", validation {metric} {summary.valid[metric]:.4f}; "
        having = (
            instead or f"its model is on {len(summary.nodes_with_model or ())} of {counted(len(self._hosts), 'node')}"
        )
        self.tell(f"run {self.run.setup.run} has ended after {self.run.progress.place}: {best}{having}")
        self.write("finished", instead)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Write down how the run ends where it does not end as planned."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, InterruptedRunError | KeyboardInterrupt)
            known = isinstance(error, PerfedrecError | KeyboardInterrupt)
            why = str(error) if known and str(error) else "interrupted" if stopped else type(error).__name__
            self.tell(f"run {self.run.setup.run} ends here: {why if stopped else f'failed: {why}'}")
            self.write("stopped" if stopped else "failed", why)
            raise

    @property
    def _hosts(self) -> Mapping[int, Any]:
        return {} if self.coordinator.directory is None else self.coordinator.directory.hosts

    def _nodes(self) -> dict[str, dict[str, Any]]:
        """By name of each node: how many users it hosts, and why it was refused, where that is known."""
        refused = {each.node: each for each in self.coordinator.rejected if each.phase == "registration"}
        found = {}
        unasked = None if self.coordinator.service_client is not None else self.coordinator.service
        for node, name in sorted((self.coordinator.names or {}).items(), key=lambda each: each[1]):
            if node == unasked:
                continue
            users = self._hosts.get(node)
            why = refused.get(node)
            found[name] = {
                "service": node == self.coordinator.service,
                "users": None if users is None else users.numel(),
                "refused": None if why is None else {"reason": why.reason, "detail": why.detail},
            }
            if (apart := self.coordinator.apart.get(node)) is not None:
                found[name]["apart"] = {"state": apart.state, "why": apart.why}
        return found

    def _claim(self) -> str:
        algorithm, users = self.run.algorithm, self.run.progress.users
        releases = algorithm.releases(max(self.run.progress.total - self.run.n_phases, 0), users)
        block = privacy_block(algorithm.settings.privacy, releases, "SecAgg+", algorithm.reports_vectors)
        return str(block["claim"])
