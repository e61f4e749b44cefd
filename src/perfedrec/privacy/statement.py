"""What protects one answer of a node, in plain words, and epsilon after the answers so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

from perfedrec.core.algorithm import EVALUATE, AnyAlgorithm
from perfedrec.privacy.ledger import Epsilon, Ledger
from perfedrec.privacy.mechanisms import Guarantee
from perfedrec.privacy.protection import Protection, evaluations

PUBLIC = (
    "The coordinator learns how many users this node has and by which numbers the federation knows them. Nothing else "
    "about them leaves the node."
)
"""The statement of a node that tells who takes part."""

RECEIVED = "The node has received a model, and has sent nothing about its users."
"""The statement of a node that receives the model that it recommends with."""

ORDERED = "The node has brought a table of items into the order of the catalogue. It has nothing of its users in it."
"""The statement of a node that helps a neighbourhood service with the names of items."""

AGAINST = "the coordinator, and everybody who receives the model"
"""Whom an epsilon against the coordinator holds against: others see only what the coordinator makes of it."""


def statement(protection: Protection, phase: str, secure: bool, sealed: bool = False) -> str:
    """What the coordinator can learn from an answer in a ``phase``, as sentences.

    ``secure``: whether the answer is a part of a secure sum; ``sealed``: whether vectors of users and edges for the
    neighbourhood service come with it.
    """
    return " ".join(_sentences(protection, phase, secure, sealed))


def _sentences(protection: Protection, phase: str, secure: bool, sealed: bool) -> Iterator[str]:
    settings = protection.settings
    if phase == EVALUATE.name:
        yield "The answer says how well lists rank the items that users hold out, as sums of metrics over users."
    if secure:
        grouped = protection.groups and protection.low_rank(phase)
        whom = "a group of the nodes, drawn at random for this round" if grouped else "all nodes that take part"
        yield (
            f"The coordinator learns the sum over {whom}, and nothing else of this node's part (secure aggregation, "
            "SecAgg+)."
        )
        yield from _opened(protection, phase)
    else:
        yield "The coordinator sees the sum over this node's users; with one user, it is this user's part."
        if phase != EVALUATE.name:
            yield _rows(protection)
    if sealed:
        yield (
            "Vectors of this node's users, and which items they have under tokens in place of ids, are sealed for the "
            "neighbourhood service, which reads them; the coordinator does not."
        )
    if phase != EVALUATE.name:
        yield from _bounds(protection, phase)
    found = protection.guarantee(phase)
    if phase == EVALUATE.name or secure != protection.secure:  # a question beside what the options protect
        found = evaluations(1).guarantee if secure else Guarantee(reason="the coordinator sees the sum of each node")
    yield from (f"It holds {each}." for each in found.narrower)
    if found.law is None:
        yield f"There is no guarantee of differential privacy: {found.reason}."
    else:
        yield f"Epsilon is that of differential privacy for a user, at delta {settings.delta:g}."


def _opened(protection: Protection, phase: str) -> Iterator[str]:
    """What of a secure sum is opened."""
    settings, opens = protection.settings, protection.phases[phase].opens
    if opens == "all":
        yield "It is opened in full."
    elif not settings.low_rank:
        yield "It has a row for every item, and such sums can show items of single users."
    elif opens == "basis":
        yield f"It is opened in at most {settings.rank} columns, so that no number of it belongs to one item."
    else:
        yield f"It has a row for each item that {settings.min_contributors} users or more have."
    yield f"A sum over fewer than {settings.min_clients} users is not opened."


def _rows(protection: Protection) -> str:
    """What the rows of a sum in the clear tell."""
    settings = protection.settings
    if protection.sums:
        return "It has a row for every item."
    hidden = [
        text
        for text, used in (
            ("decoys are among them", settings.pseudo_items or settings.randomised_response),
            ("some are left out", settings.masking or settings.randomised_response),
        )
        if used
    ]
    how = f" ({', and '.join(hidden)})" if hidden else ""
    return f"It shows which items they have{how}."


def _bounds(protection: Protection, phase: str) -> Iterator[str]:
    """How much one user can change the answer, and the noise on it."""
    settings, bound, noise = protection.settings, protection.bound(phase), protection.multiplier(phase)
    law = "Gaussian" if settings.norm == "l2" else "Laplace"
    if bound is not None:
        yield f"One user's part has an {settings.norm.upper()} norm of at most {bound:g}."
    if noise and bound is not None:
        whose = "the sum over all nodes" if protection.secure else "each user's part"
        yield f"There is {law} noise of {noise:.3g} times that bound on {whose}."
        if settings.noise_source == "simulation":
            yield "It is the noise of simulations, which is not cryptographic."
    elif settings.noise_scale and settings.clip is not None and not protection.sums:
        yield f"Each number is at most {settings.clip:g}, with Laplace noise of scale {settings.noise_scale:g}."
    else:
        yield "There is no noise."


def so_far(algorithm: AnyAlgorithm, answers: Mapping[str, int]) -> Epsilon:
    """Epsilon against the coordinator after a number of ``answers`` by phase that have a user in them."""
    releases, phases = algorithm.releases(1, 1), cast(Protection, algorithm.protection).phases
    counts: dict[str, int] = {}
    for phase, count in answers.items():
        counts[phases[phase].release] = counts.get(phases[phase].release, 0) + count
    found = [
        replace(each, times=counts[each.name], participations=counts[each.name])
        for each in releases
        if counts.get(each.name)
    ]
    if counts.get(EVALUATE.release):
        found.append(evaluations(counts[EVALUATE.release]))
    return Ledger(found, algorithm.settings.privacy.delta).epsilon("coordinator")


def accountable(algorithm: AnyAlgorithm) -> bool:
    """Whether anything that users send has a guarantee, so that an epsilon can be counted."""
    return any(each.guarantee.law is not None for each in algorithm.releases(1, 1))
