"""What an operator's certificate states about a request to forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from perfedrec.core.counted import counted
from perfedrec.federation.replay import Replayed
from perfedrec.runs.certificate import Certificate, Cost
from perfedrec.runs.folder import Entry

STAYS = (
    "the model: sums that were opened with the user in them stay in it until a run without the user replaces it "
    "(federation forget --new-run or --replay)",
    "the sums themselves, where they were kept (serve --keep-sums), checkpoints, and versions in a registry of models",
    "the user's last vector and edges at a neighbourhood service, where there is one, until it plays another run",
    "copies of the model on nodes and elsewhere, and what other nodes learned from it",
)
"""What the acceptance of a request does not cover."""

OLD = (
    "the folder of the run before, with its model, checkpoints and kept parts: delete it when it is no longer needed, "
    "but keep its forgetting.jsonl",
    "versions of the model before in a registry, and copies of it on nodes until they get the new one",
    "what other nodes learned from the user through the model, and keep: their parts are those that they sent while "
    "the user was there",
)
"""What a run that was summed again does not cover."""


@dataclass(frozen=True)
class Who:
    """Which ``users`` (identities) are forgotten from which ``run``, as a certificate names it, and which ``node`` they
    belong to. ``checked``: the run's own records say that they do."""

    users: list[str]
    run: dict[str, str]
    node: str
    checked: bool = True


def accepted(who: Who) -> Certificate:
    """The certificate of a request that was accepted."""
    nothing = Cost(0, 0, 0, 0, 0.0)
    hosts = " and the nodes of the run's users" if who.checked else ""
    return Certificate(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        users=who.users,
        method="no further part",
        run=who.run,
        done=[
            f"node {who.node} has signed that the user is deleted there; a deleted user takes part in no further round",
            f"the request was checked against the keys of registered nodes{hosts}, and noted in the log",
        ],
        exact=[],
        approximate=[],
        cost=nothing,
        cost_of_run=nothing,
        measured={},
        unmeasured=["everything: the data that figures need are on the nodes"],
        not_covered=[*STAYS, *_unchecked(who)],
    )


def new_run(who: Who, name: str) -> Certificate:
    """The certificate of a request that was accepted, after which the run ``name`` was trained without the user."""
    found = accepted(who)
    done = f"run {name} was trained without the user, who is not among its participants"
    return replace(
        found,
        method="new run",
        done=[*found.done, done],
        exact=["the whole model of the new run"],
        not_covered=found.not_covered[1:],
    )


def replayed(who: Who, made: Replayed, output: Path, history: Sequence[Entry]) -> Certificate:
    """The certificate of a run that was summed again from kept parts, in the folder ``output``."""
    found = accepted(who)
    steps = found.done if "request" in who.run else [f"the operator has decided that node {who.node} is forgotten"]
    others = f"; other users of the same nodes were in these {counted(made.others, 'time')}" if made.others else ""
    reports = [each.report for each in history]
    whole = Cost(
        rounds=len(reports),
        clients=sum(each.clients for each in reports),
        bytes_up=sum(each.bytes_up for each in reports),
        bytes_down=sum(each.bytes_down for each in reports),
        seconds=round(sum(each.seconds for each in history), 3),
    )
    return replace(
        found,
        method="replay",
        run={**who.run, "new folder": output.name},
        done=[
            *steps,
            f"the coordinator's part of {counted(made.rounds, 'round')} was computed again from the kept parts of "
            f"nodes; {made.left_out:,} of {made.parts:,} were left out{others}",
            "before that, all parts together gave the model of the run, bit for bit",
        ],
        exact=["each sum of a round: it is that of the parts that are left, bit for bit"],
        approximate=["what training made: the others' parts are those that they sent while the user was there"],
        cost=replace(found.cost, seconds=made.seconds),
        cost_of_run=whole,
        unmeasured=[
            "distance and membership: the data that they need are on the nodes",
            "how good the model is: nodes measure it when the run goes on in its new folder",
        ],
        not_covered=[*OLD, STAYS[1], *_unchecked(who)],
    )


def _unchecked(who: Who) -> list[str]:
    """What cannot be said where the run has no record of the user's node."""
    if who.checked:
        return []
    return [
        f"whether the user is one of node {who.node}: it was not checked, because the run has no record of which node "
        "hosts the user"
    ]
