"""Nodes that stand out among the others of a round, by what the coordinator sees of each sum that it opens.

In the clear that is the sum of each node; under secure aggregation nothing is seen of a single node, and only sums over
several that are opened by themselves can be compared. A node that stands out need not be hostile: a single busy user
does as well, most of all without a clip. So this is written down, and the operator decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfedrec.runtimes.flower import Seen

STATISTICS = ("norm", "rows", "share")
"""With what a node can stand out: the norm of its sum and the number of its rows, each per client, in a round; and its
share of all users, in a run."""

GROUP = "group"
"""As what a node is counted that was in a group which stood out: it need not be the one that was large."""

STATE = "state"
"""The statistic of a line that says that a node counts, or does not count, from now on."""

LEAST = 5
"""The fewest sums that can be compared: of fewer the median of the deviations says nothing."""

LIMIT, FLOOR = 6.0, 0.3
"""From which robust z on a value stands out; and the least deviation by which it is divided, of the logarithm: where
all nodes are alike, one still has to be six times as large (``exp(LIMIT * FLOOR)``)."""

MOST_OF = 0.5
"""A node with more than this share of all users stands out: what is learned is then mostly its own."""

MAD = 1.4826
"""The standard deviation of a normal law, divided by its median absolute deviation."""


@dataclass(frozen=True)
class Unusual:
    """Nodes that stood out in a ``round``, alone or as a group, with a ``statistic`` of this ``value``; the ``median``
    of all, the robust ``z`` where there is one, and all of it as a ``text``."""

    round: int
    phase: str
    nodes: tuple[str, ...]
    statistic: str
    value: float
    median: float
    z: float | None
    text: str


def standing_out(seen: Sequence[Seen], names: Mapping[int, str]) -> list[Unusual]:
    """The sums of one round that stand out for being large.

    With ``x`` the logarithm of a statistic per client, ``z = (x - median) / (1.4826 MAD)``, where MAD is the median of
    the absolute deviations (Iglewicz and Hoaglin 1993), but at least :data:`FLOOR`.
    """
    found = list[Unusual]()
    for statistic in ("norm", "rows"):
        values = [(each, getattr(each, statistic) / each.clients) for each in seen if each.clients]
        values = [(each, value) for each, value in values if value > 0]
        if len(values) < LEAST:
            continue
        logs = [log(value) for _, value in values]
        middle = median(logs)
        spread = max(MAD * median(abs(each - middle) for each in logs), FLOOR)
        for (each, value), own in zip(values, logs, strict=True):
            if (z := (own - middle) / spread) > LIMIT:
                who, usual = tuple(names.get(node, str(node)) for node in each.nodes), exp(middle)
                text = f"{_WHAT[statistic]} per client is {value:.3g}, {value / usual:.3g} times the median {usual:.3g}"
                text += f" of {len(values)} {'nodes' if len(each.nodes) == 1 else 'groups'} (robust z {z:.1f})"
                found.append(Unusual(each.round, each.phase, who, statistic, value, usual, z, text))
    return found


_WHAT = {"norm": "the norm of its sum", "rows": "the number of rows in its sum"}


def large_share(users: Mapping[str, int]) -> list[Unusual]:
    """The node that hosts more than :data:`MOST_OF` of all ``users`` (by node), where there are three nodes or more."""
    total = sum(users.values())
    if len(users) < 3 or not total:
        return []
    middle = median(users.values()) / total
    return [
        Unusual(
            round=-1,
            phase="registration",
            nodes=(name,),
            statistic="share",
            value=count / total,
            median=middle,
            z=None,
            text=f"it hosts {count:,} of {total:,} users, more than half: what is learned is mostly what it sends",
        )
        for name, count in sorted(users.items())
        if count > MOST_OF * total
    ]
