"""What an operator should look at: the conditions of the table of alerts in ``docs/deployment.md``, computed from how a
run is. They have the names of the rules for Prometheus there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfedrec.core.counted import counted

HOSTILE = ("not finite", "shape", "size", "keys", "users", "range", "malformed")
"""Reasons that a broken or hostile node gives."""

DISAGREES = ("version", "catalogue", "policy", "noise")
"""Reasons for which a node and the coordinator cannot work together until a person has done something."""

RECENT = 10
"""The rounds that count as recent."""

IN_A_ROW = 3
"""The rounds after which a lack is no accident."""

OFTEN = 3
"""How often a node stands out in the recent rounds before that is no accident."""

LATE, FEW, SOON = 10, 0.8, 30 * 86400.0
"""Rounds in which one node was late; the least share of clients that answer; seconds before a certificate expires."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Alert:
    """The ``name`` of a rule that holds, and what is the matter in one sentence."""

    name: str
    text: str


def alerts(view: Line, now: float) -> list[Alert]:
    """The alerts of a run that :func:`perfedrec.federation.status.look` describes, at a time in seconds since 1970."""
    live = view["state"] in ("waiting", "running")
    figures, history, without = view["figures"], view["history"], view["without"]
    first = view["done"] - RECENT
    recent = [each for each in without if each["round"] >= first or (live and each["phase"] == "registration")]
    found = [*_of_process(view, figures, now, live), *_of_rounds(history, view, live)]
    found += _of_reasons("BrokenOrHostileNode", HOSTILE, recent, "sent what cannot be part of a sum")
    found += _of_reasons("NodeDisagrees", DISAGREES, recent, "and the coordinator do not agree")
    found += _of_reasons("NodeUnvouched", ("unvouched",), recent, "received keys for which their node does not vouch")
    found += _of_reasons("NodeOverLimit", ("limit",), recent, "goes beyond a limit")
    found += _of_nodes(view, first, live)
    late = Counter(each["node"] for each in without if each["reason"] == "late")
    found += [
        Alert("NodeLate", f"{node} was late in {counted(count, 'round')}.")
        for node, count in sorted(late.items())
        if count >= LATE
    ]
    return found


def _of_process(view: Line, figures: Line, now: float, live: bool) -> Iterator[Alert]:
    """The coordinator itself, its SuperLink, its certificates, and what the run may spend."""
    if view["state"] == "gone":
        yield Alert("ProcessGone", "The coordinator has ended without a word; start it again with --resume.")
    if view["state"] == "failed":
        yield Alert("ProcessGone", f"The coordinator has failed: {view['why']}")
    last, deadline = figures.get("last_round_timestamp_seconds"), figures.get("deadline_seconds", 0.0)
    if view["state"] == "running" and last is not None and now - last > IN_A_ROW * deadline:
        yield Alert("NoRounds", f"No round has ended for three deadlines, {IN_A_ROW * deadline:.0f} s.")
    if live and figures.get("superlink_restarts_total", 0):
        yield Alert(
            "SuperLinkRestarted",
            f"The SuperLink was started again {counted(figures['superlink_restarts_total'], 'time')}.",
        )
    for each in figures.get("certificate_expiry_timestamp_seconds", ()):
        if live and each["value"] - now < SOON:
            days = (each["value"] - now) / 86400
            yield Alert("CertificateExpires", f"{each['certificate']} expires in {counted(round(days), 'day')}.")
    spent, planned = figures.get("epsilon"), figures.get("epsilon_planned")
    if spent is not None and planned is not None and spent > planned * (1 + 1e-9):
        yield Alert("EpsilonAbovePlan", f"The run has spent epsilon {spent:.3g}, and {planned:.3g} was planned.")


def _of_rounds(history: Sequence[Line], view: Line, live: bool) -> Iterator[Alert]:
    """The last rounds, and the nodes that were missing in them."""
    last = history[-IN_A_ROW:]
    if len(last) == IN_A_ROW and all(each["clients"] < FEW * each["cohort"] for each in last):
        clients, cohort = (sum(each[name] for each in last) for name in ("clients", "cohort"))
        yield Alert("FewClients", f"{clients} of {cohort} clients are in the sums of the last {IN_A_ROW} rounds.")
    for each in history[-RECENT:]:
        if each["aborted"]:
            yield Alert("RoundAborted", f"{each['name'].capitalize()} was aborted: {each['aborted']}.")
    numbers = {each["round"] for each in last}
    for node in view["nodes"]:
        own = [each for each in view["without"] if each["node"] == node["name"] and each["reason"] != "limit"]
        missing = {each["round"] for each in own} & numbers
        if view["state"] == "running" and node["state"] == "away":
            yield Alert("NodeAway", f"{node['name']} is not connected.")
        elif live and len(numbers) == IN_A_ROW and missing == numbers:
            yield Alert("NodeAway", f"{node['name']} was missing in the last {IN_A_ROW} rounds.")


def _of_nodes(view: Line, first: int, live: bool) -> Iterator[Alert]:
    """Nodes that wait for a decision, and those that stand out again and again since the round ``first``. About an
    excluded node the operator has decided."""
    for node in view["nodes"]:
        if live and node["state"] == "held":
            yield Alert("NodeHeld", f"{node['name']} waits for your decision: {node['detail']}.")
    decided = {node["name"] for node in view["nodes"] if node["state"] == "excluded"}
    lines = [each for each in view["unusual"] if each["round"] >= first and each["statistic"] != "state"]
    alone = [each for each in lines if len(each["nodes"]) == 1]
    groups = [each for each in lines if len(each["nodes"]) > 1]
    for name, count in sorted(Counter(each["nodes"][0] for each in alone).items()):
        if count >= OFTEN and name not in decided:
            last = [each for each in alone if name in each["nodes"]][-1]
            yield Alert("NodeStandsOut", f"{name} stood out {count} times, last in {last['name']}: {last['text']}.")
    shared = Counter(node for each in groups for node in each["nodes"])
    for name, count in sorted(shared.items()):
        # Groups are drawn anew in each round: a node that makes them large is in more of them than the others.
        if count >= OFTEN and count == max(shared.values()) and name not in decided:
            yield Alert("NodeStandsOut", f"{name} was in {count} of the {len(groups)} groups that stood out.")


def _of_reasons(name: str, reasons: Sequence[str], lines: Sequence[Line], text: str) -> Iterator[Alert]:
    """One alert for each node that one of these reasons was given for, with the last detail."""
    last = {each["node"]: each for each in lines if each["reason"] in reasons}
    for node, each in sorted(last.items()):
        yield Alert(name, f"{node} {text}: {each['reason']}: {each['detail']}.")
