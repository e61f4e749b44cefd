"""Attacks on everything that a coordinator opens in a run: the sums of all rounds, and who took part in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from perfedrec.audit import sums
from perfedrec.audit.attacks import Finding, precision_at_own
from perfedrec.core.counted import counted
from perfedrec.runs.opened import Opened

FOLLOWED = 200  # users whose contributions are estimated from differences between rounds


@dataclass
class Found:
    """What the attacks found in the releases of one kind, and what they found in shuffled sums."""

    exposures: list[sums.Exposure] = field(default_factory=list)
    controls: list[sums.Exposure] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    chains: sums.Follower = field(default_factory=sums.Follower)
    control_chains: sums.Follower = field(default_factory=sums.Follower)


class SumAttacks:
    """The attacks on the sums of a run, which are given round by round to :meth:`see`.

    ``degrees`` [m] are the items' popularities, ``lists`` the users' lists as CSR arrays, by which results are judged
    (without them groups are counted only); ``rounds`` are those on which the slow attacks are made as well; ``rank`` is
    the number of directions in which one client's rows of training lie (local steps + 2).
    """

    def __init__(
        self, degrees: Tensor, lists: tuple[Tensor, Tensor] | None, rounds: Sequence[int], rank: int, seed: int = 0
    ) -> None:
        self.degrees, self.lists, self.rounds, self.rank = degrees, lists, set(rounds), rank
        self.found: dict[str, Found] = defaultdict(Found)
        self.slow: list[Finding] = []
        self.passes: list[Opened] = []
        self.kept: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.lift: Tensor | None = None
        self._random = torch.Generator().manual_seed(seed)

    def see(self, opened: Opened) -> None:
        """Attack what was opened in one round."""
        if opened.sums.shape[2] < 2:
            return  # counts
        for kind, place, rows in opened.tables():
            self._group(kind, rows, opened)
            if opened.phase == "train":
                self.lift = opened.lift
                self.kept[kind, place if kind == "neighbour sums" else 0].append((opened.sums[place], opened.cohort))
            if opened.number in self.rounds or opened.phase != "train":
                self._slowly(kind, rows, opened)
            if opened.number in self.rounds and kind == "training":
                self._along_directions(opened.sums[place], opened)
        if opened.phase == "spectral":
            self.passes.append(opened)

    def _group(self, kind: str, rows: Tensor, opened: Opened) -> None:
        known = rows.any(1).nonzero().squeeze(1)
        pair = rows[known], sums.shuffled(rows[known], self._random)
        real, control = (sums.collinear(each, known) for each in pair)
        found = self.found[kind]
        found.groups.append((len(real), len(control)))
        found.chains.see(real, opened.cohort)
        found.control_chains.see(control, opened.cohort)
        if self.lists is not None:
            for groups, into in ((real, found.exposures), (control, found.controls)):
                into.append(sums.exposed(groups, *self.lists, opened.cohort, self.degrees))

    def _slowly(self, kind: str, rows: Tensor, opened: Opened) -> None:
        """Subspaces of few directions, and rows of few contributors."""
        if self.lists is None:
            return
        known = rows.any(1).nonzero().squeeze(1)
        rank, number = (self.rank if kind == "training" else 1), opened.number
        results = []
        for each in (rows[known], sums.shuffled(rows[known], self._random)):
            alone = sums.collinear(each, known)
            # The rows of a client's negatives lie in one direction less than those of its own items.
            grouped = sums.same_subspace(each, known, rank, 1e-6, smallest=rank - 1) if rank > 1 else alone
            few = sums.few_contributors(each, known, alone)
            results.append([sums.exposed(g, *self.lists, opened.cohort, self.degrees) for g in (grouped, few)])
        for name, found, control in zip(("rows in few directions", "rows of few contributors"), *results, strict=True):
            self.slow += sums.exposure_findings(f"{name} of {kind}", found, control, number)

    def _along_directions(self, table: Tensor, opened: Opened) -> None:
        """Singular directions of one sum, for those who took part and for as many others."""
        if self.lists is None:
            return
        order = torch.randperm(self.lists[0].numel() - 1, generator=self._random)
        others = order[~torch.isin(order, opened.cohort)][: opened.cohort.numel()]
        if not others.numel():
            return
        present, absent = (self._lists(users) for users in (opened.cohort, others))
        means = [float(sums.by_directions(table, opened.lift, own).mean()) for own in (present, absent)]
        every = torch.arange(self.degrees.numel())
        popular = [
            precision_at_own(self.degrees, torch.isin(every, own), own.numel()) for own in present if own.numel()
        ]
        name, n = "directions of one sum of training", opened.cohort.numel()
        popularity = float(np.mean(popular))
        self.slow.append(Finding(name, "precision at |I_u|", means[0], means[1], popularity, n, opened.number))

    def _lists(self, users: Tensor) -> list[Tensor]:
        """The items of each of ``users`` [B]."""
        assert self.lists is not None
        offsets, items = self.lists
        return [items[offsets[user] : offsets[user + 1]] for user in users.tolist()]

    def findings(self) -> list[Finding]:
        """What all attacks found, over all rounds."""
        self._passes_together()
        result = []
        for kind, found in self.found.items():
            result += self._over_rounds(f"collinear rows of {kind}", found)
        return [*result, *self.slow, *self._differences()]

    def _passes_together(self) -> None:
        """Passes side by side: a client's rows are one long vector times a number in all of them."""
        if len(self.passes) > 1:
            wide = torch.cat([each.sums[0] for each in self.passes], dim=1)
            self._group("all passes together", wide, self.passes[-1])

    def _over_rounds(self, attack: str, found: Found) -> list[Finding]:
        releases, chains, control = len(found.groups), found.chains.named(), found.control_chains.named()
        if self.lists is None:
            counts = [float(np.mean(each)) for each in zip(*found.groups, strict=True)]
            return [
                Finding(attack, "groups of rows", counts[0], counts[1], None, releases),
                Finding(attack, "users named", len(chains), len(control), None, releases),
            ]
        real, null = _means(found.exposures), _means(found.controls)
        return [
            Finding(attack, "users exposed", real["users"], null["users"], real["popular_users"], releases),
            Finding(
                attack,
                "item precision",
                real["precision"],
                null["precision"],
                real["popularity"] if real["groups"] else None,
                int(real["groups"] * releases),
            ),
            Finding(attack, "share of list", real["share"], null["share"], None, releases),
            *sums.naming_findings(attack, chains, control, *self.lists)[:1],
        ]

    def _differences(self) -> list[Finding]:
        """Attack by differences between rounds, on those users who took part most often."""
        if self.lists is None:
            return []
        n_users, result = self.lists[0].numel() - 1, []
        for (kind, place), rounds in self.kept.items():
            if len(rounds) < 2:
                continue
            took_part = torch.zeros(len(rounds), n_users, dtype=torch.bool)
            for number, (_, cohort) in enumerate(rounds):
                took_part[number, cohort] = True
            often = took_part.sum(0).argsort(descending=True, stable=True)[:FOLLOWED]
            scores = sums.by_cohorts(torch.stack([each for each, _ in rounds]), took_part, self.lift, often)
            own = self._lists(often)
            where = f"{counted(len(rounds), 'round')} of {kind}" + (
                f", layer {place}" if kind == "neighbour sums" else ""
            )
            result.append(sums.infer_by_cohorts(scores, own, self.degrees, where))
        return result


def _means(found: Sequence[sums.Exposure]) -> dict[str, float]:
    """Means over releases. Those of precisions are weighted by the number of groups."""
    groups = np.array([each.groups for each in found], dtype=float)

    def weighted(values: Sequence[float]) -> float:
        return float(np.average(values, weights=groups)) if groups.any() else 0.0

    return {
        "users": float(np.mean([len(each.users) for each in found])),
        "popular_users": float(np.mean([each.popular_users for each in found])),
        "share": float(np.mean([each.share for each in found])),
        "groups": float(groups.mean()),
        "precision": weighted([each.precision for each in found]),
        "popularity": weighted([each.popularity for each in found]),
    }
