"""What the attacks on a run found: its record, as it is stored in the run's folder, printed and reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perfedrec.audit.poisoning.exposure import Exposure
from perfedrec.core.counted import counted
from perfedrec.core.errors import CheckpointError, reason
from perfedrec.runs.folder import RunFolder

FILE = "attack.json"
"""The name of the record in a run's folder."""

ENDED = "ended"
"""Stands in place of figures where an attack has ended the training."""


@dataclass(frozen=True)
class Outcome:
    """What one attack did: its name, the share and number of malicious clients, and the figures afterwards; ``None``
    where the attack has ended the training, because numbers grew too large for a sum. ``options`` of the attack itself
    that were set, as text; none in records of earlier versions."""

    attack: str
    share: float
    malicious: int
    after: Exposure | None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def named(self) -> str:
        """The attack with its options, as in "collusion (varied=true)"."""
        chosen = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.attack} ({chosen})" if chosen else self.attack


@dataclass(frozen=True)
class Attacked:
    """The record of the attacks on one run.

    ``targets`` are ids of items, ``target_users`` how many users each has in training; ``scenario`` are the options of
    the attacks; ``seed`` decided all draws. ``chance`` is the exposure of an item in random lists, k / m. ``before``
    has the figures without an attack, and ``rounds`` is the number of rounds of training.
    """

    targets: tuple[str, ...]
    target_users: tuple[int, ...]
    scenario: dict[str, Any]
    seed: int
    rounds: int
    chance: float
    before: Exposure
    outcomes: tuple[Outcome, ...]

    def plain(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Write the record to a run's folder, in place of an older one."""
        RunFolder(folder).write(FILE, json.dumps(self.plain(), indent=1).encode())

    def continued(self, folder: Path) -> Attacked:
        """This record with the outcomes that are in a run's folder, where they were found in the same way: all but the
        outcomes is equal. A record of another scenario is set aside under the next free name, such as
        ``attack-1.json``; a damaged one is not kept."""
        try:
            older = read_attacks(folder)
        except CheckpointError:
            older = None
        if older is None or not older.outcomes:
            return self
        if replace(older, outcomes=()) == replace(self, outcomes=()):
            return replace(self, outcomes=older.outcomes)
        path, number = folder / FILE, 1
        while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        RunFolder(folder).write(aside.name, path.read_bytes())
        return self

    def having(self, outcome: Outcome) -> Attacked:
        """This record with one more outcome, in place of one of the same attack with the same options and share."""
        mine = outcome.attack, outcome.options, outcome.share
        others = (each for each in self.outcomes if (each.attack, each.options, each.share) != mine)
        return replace(self, outcomes=(*others, outcome))

    @property
    def named_targets(self) -> str:
        """The targets by id, each with its number of users."""
        named = zip(self.targets, self.target_users, strict=True)
        return ", ".join(f"{item} ({counted(users, 'user')})" for item, users in named)

    @property
    def strongest(self) -> Outcome | None:
        """The outcome with the largest exposure; of equal ones the first; ``None`` without any."""
        measured = [each for each in self.outcomes if each.after is not None]
        return max(measured, key=lambda each: each.after.exposure if each.after is not None else 0.0, default=None)

    def line(self) -> str:
        """The record as one sentence."""
        k, worst, before, said = self.before.k, self.strongest, self.before, []
        if worst is not None and worst.after is not None:
            exposure = f"{before.exposure:.4f}, and no attack raised it"
            if worst.after.exposure > before.exposure:
                with_them = f"with {worst.share:.3g} of the clients malicious {worst.after.exposure:.4f}"
                exposure = f"{before.exposure:.4f}, {with_them} ({worst.named})"
            said.append(f"ER@{k} of the target{'' if len(self.targets) == 1 else 's'} {exposure}")
            spoilt, ndcg = min(
                ((each, each.after.ndcg) for each in self.outcomes if each.after is not None), key=lambda each: each[1]
            )
            lowered = f"at worst {ndcg:.4f} ({spoilt.named}, {spoilt.share:.3g})"
            said.append(f"NDCG@{k} {before.ndcg:.4f}, {lowered if ndcg < before.ndcg else 'and no attack lowered it'}")
        if ended := [f"{each.named}, {each.share:.3g}" for each in self.outcomes if each.after is None]:
            said.append(f"the training was ended by {'; '.join(ended)}")
        return "; ".join(said) or "no attack was made"

    def rows(self) -> list[list[str]]:
        """The figures as rows of a table under :meth:`header`, the first one without an attack."""
        found = [["none", "0", "0", *_figures(self.before, self.before)]]
        for each in self.outcomes:
            figures = [ENDED, *[""] * 4] if each.after is None else _figures(each.after, self.before)
            found.append([each.named, f"{each.share:.3g}", str(each.malicious), *figures])
        return found

    def header(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        k = self.before.k
        return ("attack", "share", "clients", f"ER@{k}", f"recall@{k}", "change", f"NDCG@{k}", "change")

    def group_rows(self) -> list[list[str]]:
        """The exposure and NDCG by group of users, without an attack and with the strongest one."""
        worst = self.strongest
        if worst is None or worst.after is None:
            return []
        # Clusters of two trainings are not the same ones: only those of the attacked model are shown.
        before = {each.name: each for each in self.before.groups}
        found = []
        for group in worst.after.groups:
            old = None if group.name.startswith("cluster") else before.get(group.name)
            was = ["", ""] if old is None else [f"{old.exposure:.4f}", f"{old.ndcg:.4f}"]
            found.append([group.name, str(group.users), was[0], f"{group.exposure:.4f}", was[1], f"{group.ndcg:.4f}"])
        return found

    def group_header(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`group_rows`."""
        k = self.before.k
        return ("group", "users", f"ER@{k} before", f"ER@{k}", f"NDCG@{k} before", f"NDCG@{k}")


def _figures(after: Exposure, before: Exposure) -> list[str]:
    def change(now: float, then: float) -> str:
        return f"{100 * (now / then - 1):+.1f} %" if then and after is not before else ""

    return [
        f"{after.exposure:.4f}",
        f"{after.recall:.4f}",
        change(after.recall, before.recall),
        f"{after.ndcg:.4f}",
        change(after.ndcg, before.ndcg),
    ]


def read_attacks(folder: Path) -> Attacked | None:
    """The record in a run's folder; ``None`` where the run was not attacked. Raises :class:`CheckpointError` for a
    damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        outcomes = [
            Outcome(**{**each, "after": None if each["after"] is None else Exposure.read(each["after"])})
            for each in stored["outcomes"]
        ]
        lists: dict[str, Sequence[Any]] = {name: tuple(stored[name]) for name in ("targets", "target_users")}
        return Attacked(**{**stored, **lists, "before": Exposure.read(stored["before"]), "outcomes": tuple(outcomes)})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged record of attacks: {reason(error)}; expected what perfedrec attack writes: remove the "
            "file, or repeat the attack"
        ) from None
