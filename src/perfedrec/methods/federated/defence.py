"""The defence of a federated method against malicious clients: its options, and what it does to a method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from perfedrec.core import robust
from perfedrec.core.aggregate import Aggregate, Aggregator, Sum
from perfedrec.core.algorithm import TRAIN, Phase
from perfedrec.core.dotted import as_text
from perfedrec.core.errors import ConfigError
from perfedrec.core.settings import Settings
from perfedrec.core.small_groups import SmallGroups
from perfedrec.methods.federated.phases import CLUSTERS, DEGREES, SPECTRAL
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings


class DefenceSettings(Settings):
    """Options against malicious clients. By default nothing is done (docs/hostile.md)."""

    rule: robust.Name = Field(
        "none",
        description="how the parts of a round of training become one: none is their exact sum. A part is what one "
        "client sends or, with groups, the sum of a group",
    )
    malicious: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="trimmed-mean, krum, bulyan, shortest, and degrees with group_size: share of the parts (clients or "
        "groups) that may be malicious",
    )
    threshold: float = Field(
        3.0,
        gt=0,
        description="clip: longest part, as a multiple of the median length; robust-z: largest score of a part",
    )
    quorum: int = Field(2, ge=1, description="quorum: least number of parts that change a row together")
    groups: int = Field(
        0,
        ge=0,
        description="number of groups into which a cohort is split at random, with a sum of its own for each, where "
        "sums are taken in a basis (secure sums with privacy.rank); a group never has fewer than privacy.min_clients "
        "clients (0: one sum)",
    )
    group_size: int = Field(
        0,
        ge=0,
        description="number of clients, or more, in a group before training, where sums are secure: all clients are "
        "split once, at random, and degrees and passes over all users are summed by item for each group, which shows "
        "the lists of a group's clients without their names (docs/privacy.md); bounded then are an item's count in a "
        "group and a group's row of it (0: one sum over all clients)",
    )
    group_rows: float = Field(
        1.0,
        gt=0,
        description="group_size: longest row of an item in a group's pass, as a multiple of the median of rows of "
        "items that about as many groups have",
    )
    row_clip: float | None = Field(
        None,
        gt=0,
        description="largest norm of what a client changes in one item row in a round of training; off: no bound",
    )
    row_length: float | None = Field(
        None,
        gt=0,
        description="longest row of an item table after a round of training, as a multiple of the median length of its "
        "rows; in a pass of clients over all users, as a multiple of what is usual for the item's degree; off: no "
        "bound",
    )
    row_step: float | None = Field(
        None,
        gt=0,
        description="largest norm of the mean change of one item row in a round of training, which the server's "
        "optimiser receives; off: no bound",
    )
    sparse: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the items with changes that are applied in a round of training, those with the largest "
        "ones; what is left waits at the server and is added to later changes; off: all are applied",
    )
    report_length: float | None = Field(
        None,
        gt=0,
        description="longest user vector that the neighbourhood service takes, as a multiple of the median length of "
        "those that come with it; off: no bound",
    )
    max_edges: int | None = Field(
        None,
        ge=1,
        description="most items of one user that the neighbourhood service uses, a random choice where there are more; "
        "off: all",
    )
    alike: float | None = Field(
        None,
        gt=0,
        le=1,
        description="users whose lists have this share or more in common (Jaccard) count as one user together where "
        "the neighbourhood service counts pairs of items; off: each counts",
    )
    holders: int = Field(
        3,
        ge=3,
        description="least number of users who have both items of a pair that the neighbourhood service uses where it "
        "pre-trains, and for the neighbourhood model that everybody receives",
    )

    @property
    def given(self) -> str:
        """The options that are not the default, as in ``row_clip = 0.3, alike = 0.5``; nothing for no defence."""
        usual = type(self)()
        changed = {name: value for name, value in self if value != getattr(usual, name)}
        return ", ".join(f"{name} = {as_text(value)}" for name, value in changed.items())

    @property
    def made(self) -> robust.Rule | None:
        """The rule; ``None`` for the exact sum."""
        return robust.rule_of(self.rule, self.malicious, self.threshold, self.quorum)


OF_RULES: dict[str, tuple[robust.Name, ...]] = {
    "malicious": ("trimmed-mean", "krum", "bulyan", "shortest"),
    "threshold": ("clip", "robust-z"),
    "quorum": ("quorum",),
}
"""By name of an option the rules that use it."""

OF_THE_SERVICE = ("report_length", "max_edges", "alike", "holders")
"""Options that the neighbourhood service alone uses. Where clients contribute only to sums, it is not asked."""


def check_defence(privacy: PrivacySettings, defence: DefenceSettings, asked: int) -> None:
    """Raise ValueError for a rule that has nothing to compare, for options that would defend nothing, and for groups
    whose sums would tell more than the privacy settings allow."""
    _check_idle(privacy, defence)
    _check_small_groups(privacy, defence)
    if defence.groups and not privacy.low_rank:
        raise ValueError(
            "defence.groups opens the sum of each group, and without a basis it shows the items of its clients; "
            "expected privacy.aggregation = secure with privacy.rank above 0, or defence.groups = 0"
        )
    if defence.groups and (privacy.noise.any or privacy.epsilon):
        raise ValueError(
            "defence.groups opens sums of fewer clients, whose noise is that of the whole cohort; expected no noise "
            "and no epsilon, or defence.groups = 0"
        )
    if defence.groups and defence.rule == "none":
        raise ValueError("defence.groups has no effect without a rule over groups; expected a defence.rule")
    if defence.groups and defence.groups < robust.FEWEST:
        raise ValueError(f"no rule compares fewer than {robust.FEWEST} groups; expected more, or defence.groups = 0")
    if defence.groups and asked < robust.FEWEST * privacy.min_clients:
        raise ValueError(
            f"{robust.FEWEST} groups of privacy.min_clients = {privacy.min_clients} clients or more cannot be made; "
            f"expected selection.n_clients_per_round of at least {robust.FEWEST * privacy.min_clients}, or "
            "defence.groups = 0"
        )
    if privacy.aggregation == "secure" and defence.rule != "none" and not defence.groups:
        raise ValueError(
            f"defence.rule = {defence.rule} compares single clients, and secure aggregation shows only their sum; "
            "expected defence.groups (with privacy.rank), or defence.rule = none"
        )


def _check_small_groups(privacy: PrivacySettings, defence: DefenceSettings) -> None:
    """Raise ValueError for groups before training where sums are of another kind, have noise, or are too small."""
    if not defence.group_size:
        return
    if not privacy.low_rank:
        raise ValueError(
            f"defence.group_size = {defence.group_size} is for secure sums in a basis; expected privacy.aggregation = "
            "secure with privacy.rank above 0, or defence.group_size = 0"
        )
    if privacy.noise.any or privacy.epsilon:
        raise ValueError(
            "defence.group_size opens sums of fewer clients, whose noise is that of all of them; expected no noise and "
            "no epsilon, or defence.group_size = 0"
        )
    if defence.group_size < privacy.min_clients:
        raise ValueError(
            f"defence.group_size = {defence.group_size} is below privacy.min_clients = {privacy.min_clients}, and no "
            f"sum of fewer clients is opened; expected at least {privacy.min_clients}, or defence.group_size = 0"
        )


def _check_idle(privacy: PrivacySettings, defence: DefenceSettings) -> None:
    """Raise ValueError for an option that has no effect: whoever sets it would believe in a defence."""
    usual = DefenceSettings()
    idle = [name for name in OF_THE_SERVICE if getattr(defence, name) != getattr(usual, name)]
    if idle and privacy.sums:
        given = ", ".join(f"defence.{name} = {getattr(defence, name)}" for name in idle)
        have, it = ("has", "it") if len(idle) == 1 else ("have", "them")
        raise ValueError(
            f"{given} {have} no effect: the neighbourhood service uses {it}, and with privacy.aggregation = "
            f"{privacy.aggregation} it is not asked; expected {', '.join(map(_unset, idle))}, or "
            "privacy.aggregation = sparse"
        )
    if defence.group_rows != usual.group_rows and not defence.group_size:
        raise ValueError(
            f"defence.group_rows = {defence.group_rows} has no effect without groups before training; expected a "
            f"defence.group_size, or {_unset('group_rows')}"
        )
    for name, rules in OF_RULES.items():
        if name == "malicious" and defence.group_size:
            continue
        if (value := getattr(defence, name)) != getattr(usual, name) and defence.rule not in rules:
            raise ValueError(
                f"defence.{name} = {value} has no effect with defence.rule = {defence.rule}; expected defence.rule = "
                f"{' or '.join(rules)}, or {_unset(name)}"
            )


def _unset(name: str) -> str:
    """The option ``name`` as whoever has set it takes it back, by ``--set`` too."""
    value = getattr(DefenceSettings(), name)
    return f"defence.{name} = {'off' if value is None else value}"


def remarks_on(
    defence: DefenceSettings, protection: Protection, asked: int, serves: bool, n_users: int = 0
) -> list[str]:
    """What is different from what the options seem to say, as sentences, in a training with ``n_users`` that asks
    ``asked`` clients a round; ``serves`` whether the method has a neighbourhood service."""
    found = []
    usual = DefenceSettings()
    idle = [name for name in OF_THE_SERVICE if getattr(defence, name) != getattr(usual, name)]
    if idle and not serves:
        found.append(
            f"defence.{', defence.'.join(idle)}: without effect, because this method has no neighbourhood service"
        )
    if defence.row_clip is not None and protection.settings.aggregation == "secure":
        found.append(
            "defence.row_clip: nobody sees what one client of a secure sum sends, so honest clients keep this bound "
            "and malicious ones need not, which can make an attack stronger (docs/hostile.md)"
        )
    made = protection.n_groups(TRAIN.name, asked)
    if 0 < made < defence.groups:
        least = protection.settings.min_clients
        found.append(
            f"defence.groups: a cohort of {asked:,} clients has {made:,} groups, not {defence.groups:,}, because a "
            f"group has privacy.min_clients = {least} clients or more"
            + (f"; of fewer than {robust.FEWEST} groups no rule compares the sums" if made < robust.FEWEST else "")
        )
    if defence.group_size and (small := n_users // defence.group_size) < robust.FEWEST:
        found.append(
            f"defence.group_size: {n_users:,} users are {max(small, 1)} groups before training, and of fewer than "
            f"{robust.FEWEST} no rule compares the sums"
        )
    return found


def aggregator_of(
    defence: DefenceSettings, protection: Protection, phases: Iterable[Phase], own: Aggregator
) -> Aggregator:
    """The aggregator of a method with these ``phases`` before training, whose ``own`` one is the exact sum.

    Single clients are compared in training alone: what they send before it are parts of sums over all users. Groups are
    compared in all phases whose sums are taken in a basis. Raises :class:`ConfigError` for a method with a rule of its
    own.
    """
    rule = defence.made
    if rule is None and not defence.group_size:
        return own
    if type(own) is not Sum and rule is None:
        raise ConfigError(
            f"defence.group_size sums groups, and {type(own).__name__} is the method's own rule of aggregation; "
            "expected defence.group_size = 0"
        )
    if type(own) is not Sum:
        raise ConfigError(
            f"defence.rule = {defence.rule} would replace {type(own).__name__}, the method's own rule of aggregation; "
            "expected defence.rule = none"
        )
    grouped = {each.name for each in (*phases, TRAIN) if protection.low_rank(each.name)}
    names = frozenset(grouped if defence.groups else {TRAIN.name})
    factors = robust.factors_of(defence.rule, defence.threshold)
    found = own if rule is None else robust.Robust(rule, names, not defence.groups, defence.groups, factors)
    if not defence.group_size:
        return found
    counts, rows = frozenset((DEGREES.name,)), frozenset((SPECTRAL.name,))
    return SmallGroups(found, counts, rows, defence.malicious, defence.group_rows)


def sizes_of(defence: DefenceSettings) -> dict[str, int]:
    """By name the phases before training in which all clients are split into small groups, with the least number of
    clients of a group. Cluster models are among them where a rule compares groups."""
    names = (DEGREES.name, SPECTRAL.name, *((CLUSTERS.name,) if defence.groups else ()))
    return dict.fromkeys(names, defence.group_size) if defence.group_size else {}


def hold_tables(items: Tensor, offsets: Tensor | None, multiple: float | None) -> None:
    """Bound the length of the rows of all item tables, in place: of ``items`` [m, d], and of its sum with each of the
    other ones, ``offsets`` [K m, d].

    Adam moves a row that one client alone changes as far as any other, so that the rows of items of few users could
    otherwise grow without limit. ``None``: no bound.
    """
    if multiple is None:
        return
    robust.hold_lengths(items, multiple)
    if offsets is None:
        return
    n_items = items.shape[0]
    for own, lengths in zip(offsets.split(n_items), robust.row_lengths(items, offsets).split(n_items), strict=True):
        over, factors = robust.long_rows(lengths, multiple)
        if over.numel():
            own[over] = (items[over] + own[over]) * factors - items[over]


def hold_pass(aggregate: Aggregate, degrees: Tensor, exponent: float, multiple: float | None) -> Aggregate:
    """A pass over all users, by item, with its rows bounded by what items of their ``degrees`` [m] usually have.

    Honest parts of an item's users add up to a row whose length grows with ``d_i^(1 - exponent)``. A row is at most
    ``multiple`` times the median of this length for the item's degree; ``None``: no bound. A secret sum shows nobody
    who sends a part of ten, but it shows its row.
    """
    if multiple is None or not aggregate.keys.numel():
        return aggregate
    usual = degrees[aggregate.keys].to(torch.float64).clamp(min=1.0) ** (1 - exponent)
    lengths = aggregate.sums.square().sum(1).sqrt() / usual
    known = lengths > 0
    if not bool(known.any()):
        return aggregate
    longest = multiple * lengths[known].median()
    factors = (longest / lengths.clamp(min=1e-30)).clamp(max=1.0)
    return replace(aggregate, sums=(aggregate.sums * factors[:, None]).round())


def distinct_edges(edges: Tensor) -> Tensor:
    """The ``edges`` [E, 3], each once: an honest user sends an item once. Without repetitions they stay as they
    are."""
    once = edges.unique(dim=0)
    return edges if once.shape[0] == edges.shape[0] else once


def hold_reports(reports: Tensor, multiple: float | None) -> Tensor:
    """The ``reports`` [c, L, d] with each vector scaled to at most ``multiple`` times the median length of its layer;
    ``None``: no bound."""
    if multiple is None or not reports.numel():
        return reports
    lengths = torch.linalg.vector_norm(reports, dim=2)
    factors: Tensor = multiple * lengths.median(dim=0).values / lengths.clamp(min=1e-30)
    return reports * factors.clamp(max=1.0)[:, :, None]
