"""Compare repairs of secure sums: accuracy on validation data, bytes, time, and what attacks read from the sums.

    python benchmarks/secure.py --data FOLDER [--rounds 200] [--only NAME ...] [--seeds 0] [--threads 1]

A sum by item shows item lists. Each candidate changes preset ``recommended`` with profile ``secure`` in one way to
prevent that. It is trained in a temporary run folder, and the run of the first seed is audited. Each result is one JSON
line. For each metric of the attacks on sums it has the release that shows most, next to what shuffled sums
(``guessing``) and popularity give. ``--data`` also accepts ``synthetic:users=5000,items=7000``. Test data are not used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from perfedrec import Dataset, Key, PerFedRecPP, Result, Settings, configure, load, train
from perfedrec.audit.attacks import Finding
from perfedrec.audit.audit import audit
from perfedrec.core.aggregate import Aggregate
from perfedrec.core.keys import normal
from perfedrec.core.types import Rows, Update
from perfedrec.data.write import write
from perfedrec.methods.federated.phases import DEGREES
from perfedrec.methods.federated.state import PerFedRecBroadcast, PerFedRecClient
from perfedrec.methods.federated.subspace import ITEMS_PER_COLUMN, S, Subspace, krylov

SUM_METRICS = ("users exposed", "item precision", "users named")


class Threshold(PerFedRecPP):
    """Sums by item without the rows to which fewer than ``fewest`` clients contribute; counts of items remain whole.

    A protocol would have to count the contributors of each row by a sum of its own, before it opens any row. Here the
    updates of a round are remembered instead, block by block, until the sum is opened.
    """

    fewest: ClassVar[int] = 2

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._contributed: dict[str, list[Tensor]] = {}

    def client(
        self, phase: str, broadcast: PerFedRecBroadcast, rows: Rows, client_state: PerFedRecClient, key: Key
    ) -> tuple[Update, PerFedRecClient]:
        update, client_state = super().client(phase, broadcast, rows, client_state, key)
        if update.items is not None and update.segments is not None:
            tables = update.groups[update.segments] if update.tables is None else update.tables
            self._contributed.setdefault(phase, []).append(tables * broadcast.items.shape[0] + update.items)
        return update, client_state

    def compress(self, broadcast: PerFedRecBroadcast, phase: str, aggregate: Aggregate) -> Aggregate:
        """What leaves the clients of their sum: the rows of enough contributors."""
        contributed = self._contributed.pop(phase, [])
        self._contributed.clear()
        if phase == DEGREES.name or not contributed:
            return aggregate
        keys, contributors = torch.cat(contributed).unique(return_counts=True)
        kept = torch.isin(aggregate.keys, keys[contributors >= self.fewest])
        return replace(aggregate, keys=aggregate.keys[kept], sums=aggregate.sums[kept])


class Threshold3(Threshold):
    """Sums of rows with at least 3 contributors."""

    fewest = 3


class Threshold5(Threshold):
    """Sums of rows with at least 5 contributors."""

    fewest = 5


class RandomSubspace(Subspace):
    """A basis that is drawn at random instead of being found by passes over all users."""

    def absorb(self, state: S, aggregate: Aggregate) -> S:
        """The state with the basis. It is the same in every run, because nothing depends on which one it is."""
        if state.basis is not None:
            return state
        every = torch.arange(state.items.shape[0], device=state.items.device)
        rank = max(min(self.privacy.rank, every.numel() // ITEMS_PER_COLUMN), 1)
        return replace(state, basis=krylov(normal(Key(0).fold("basis").spread(every), rank), None, rank))


class RandomBasis(PerFedRecPP):
    """Sums in a random basis. The passes of spectral pre-training stay, because the model starts from them."""

    @cached_property
    def subspace(self) -> Subspace | None:
        return RandomSubspace(self.settings.privacy) if self.settings.privacy.low_rank else None


@dataclass(frozen=True)
class Candidate:
    """A repair: options, the class of this file that has the method (none: PerFedRec++ as it is), and the share of the
    rounds that it is trained for."""

    options: tuple[str, ...] = ()
    method: type[PerFedRecPP] | None = None
    share: float = 1.0


BY_ITEM = "privacy.rank=0"

MEDIANS = {"degrees": 0.2, "spectral": 0.03, "join": 0.02, "training": 0.005}
"""For each release the noise whose standard deviation is about the median absolute number of a client's rows, as a
multiple of the bound on the client's part (Yelp)."""


def noise(multiple: float) -> tuple[str, ...]:
    """Options of noise on every release, as a ``multiple`` of the median absolute number of a client's rows."""
    return (BY_ITEM, *(f"privacy.noise.{name}={multiple * median:g}" for name, median in MEDIANS.items()))


CANDIDATES = {
    "by item": Candidate((BY_ITEM,)),
    "rows of 3 contributors": Candidate((BY_ITEM,), Threshold3),
    "rows of 5 contributors": Candidate((BY_ITEM,), Threshold5),
    "no neighbour sums": Candidate((BY_ITEM, "model.neighbours=false")),
    "cohorts of 1,024": Candidate((BY_ITEM, "selection.n_clients_per_round=1024"), share=0.25),
    "noise of 1 median": Candidate(noise(1)),
    "noise of 4 medians": Candidate(noise(4)),
    "noise of 20 medians": Candidate(noise(20)),
    "random basis": Candidate(("privacy.rank=256",), RandomBasis),
    **{f"rank {rank}": Candidate((f"privacy.rank={rank}",)) for rank in (32, 64, 128, 256)},
    "rank 512": Candidate(("privacy.rank=512", "pretraining.passes=8")),
    **{
        f"rank 256, {fewest} contributors": Candidate(("privacy.rank=256", f"privacy.min_contributors={fewest}"))
        for fewest in (1, 2, 10)
    },
}
"""The candidates by name. Passes are summed for items of at least 5 users unless the name says otherwise."""


def measure(name: str, data: Path, rounds: int, seeds: Sequence[int], threads: int) -> None:
    """Print the figures of a candidate on the data set in the folder ``data``."""
    dataset, results = load(str(data)), list[Result]()
    attacks: dict[str, Any] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            results.append(run(CANDIDATES[name], dataset, data, output, (rounds, seed, threads)))
            if not attacks:
                attacks = summary(audit(output, rounds=(1,), trials=1000).findings)
    print(json.dumps({"candidate": name, **figures(results), "attacks": attacks}), flush=True)


def run(candidate: Candidate, dataset: Dataset, data: Path, output: Path, how: tuple[int, int, int]) -> Result:
    """Train a candidate as ``how`` (rounds, seed, threads) says."""
    rounds, seed, threads = how
    method = None if candidate.method is None else f"{Path(__file__).resolve()}:{candidate.method.__name__}"
    config = configure(
        "recommended",
        privacy="secure",
        overrides=candidate.options,
        algorithm=method,
        data__path=str(data),
        run__rounds=max(round(rounds * candidate.share), 1),
        run__evaluate_every=20,
        run__seed=seed,
        run__threads=threads,
    )
    return train(config.build(), dataset, config.run, output=output, config=config)


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Accuracy, bytes and time of the runs of a candidate, which differ in the seed."""
    training = [each for each in results[0].history if each.report.phase == "train"]
    before = [each.report for each in results[0].history if each.report.phase != "train"]
    last = [next(each.valid for each in reversed(result.history) if each.valid) for result in results]
    up, clients = (sum(getattr(each.report, name) for each in training) for name in ("bytes_up", "clients"))
    return {
        **{
            f"valid_{name}": round(statistics.mean(each.valid[name] for each in results), 4)
            for name in ("recall@20", "ndcg@20")
        },
        "best_round": [each.best_round for each in results],
        "valid_recall@20_at_the_end": round(statistics.mean(each["recall@20"] for each in last), 4),
        "bytes_up_a_round": round(up / max(clients, 1)),
        "bytes_up_before": round(sum(each.bytes_up / max(each.clients, 1) for each in before)),
        "seconds_a_round": round(statistics.median(each.seconds for each in training), 4),
    }


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """For each attack on sums the release that shows most: not the highest value, which popularity may reach as well,
    but the highest above its controls."""
    found = {metric: [each for each in findings if each.metric == metric] for metric in SUM_METRICS}
    found["differences between rounds"] = [each for each in findings if each.attack.startswith("differences between")]
    return {metric: shown(max(those, key=_shows)) for metric, those in found.items() if those}


def _shows(finding: Finding) -> tuple[float, int]:
    """How much a finding shows, for comparison with others of the same metric."""
    return finding.value - max(finding.guessing, finding.popularity or 0.0), finding.cases


def shown(finding: Finding) -> dict[str, Any]:
    """A finding beside its controls."""
    numbers = {name: getattr(finding, name) for name in ("value", "guessing", "popularity")}
    rounded = {name: None if number is None else round(number, 4) for name, number in numbers.items()}
    return {**rounded, "cases": finding.cases, "release": finding.attack}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.txt, valid.txt and test.txt, or synthetic:...")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of training")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), help="candidates (default: all)", metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the runs; the first is attacked")
    parser.add_argument("--threads", type=int, default=1, help="threads of the numerical library")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = load(args.data)
    with tempfile.TemporaryDirectory() as folder:
        # A finished run ranks its test data. In this copy these are pairs of the validation data, which are left out.
        data = write(replace(dataset, test=dataset.valid), Path(folder) / "data")
        for name in args.only or CANDIDATES:
            measure(name, data, args.rounds, args.seeds, args.threads)


if __name__ == "__main__":
    main()
