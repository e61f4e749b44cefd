"""Which items of a user a node holds out of training, so that a federation can be evaluated.

The rule is the same on all nodes, and needs nothing but a user's own items: a node has no times, and it does not know
the other users. A user's items come in a pseudo-random order that is a function of the id of the user and the ids of
the items, and of nothing else, so that all runs hold out the same items. The last ones are for testing, the ones before
them for validation. A user with fewer than three items holds out none, and is in no figure.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from perfedrec.core.errors import ConfigError, DataError
from perfedrec.core.keys import Key, fold_in
from perfedrec.core.settings import Settings
from perfedrec.data import parse_ratio
from perfedrec.data.split import FEWEST, RATIO

SECTION = "evaluation"
"""The name of the section of :class:`EvaluationSettings` in a configuration."""

TRAIN, VALID, TEST = 0, 1, 2
"""The parts of a user's items."""

ORDER = Key(0).fold("hold out")


@dataclass(frozen=True)
class HoldOut:
    """The rule: "leave-one-out" (one item is tested, one validates), or the shares ``ratio`` of train, valid, test."""

    how: str
    ratio: tuple[float, float, float] = RATIO

    def parts(self, segments: Tensor, counts: Tensor, user_words: Tensor, item_words: Tensor) -> Tensor:
        """[R] the part of each of B users' items: :data:`TRAIN`, :data:`VALID` or :data:`TEST`.

        ``segments`` [R] ascending, the user of each item; ``counts`` [B] the users' numbers of items; ``user_words``
        [B] and ``item_words`` [R] int64 words of their ids (:func:`perfedrec.core.keys.words_of`).
        """
        words = fold_in(ORDER.spread(user_words)[segments], item_words)
        order = words.argsort(stable=True)
        order = order[segments[order].argsort(stable=True)]
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(segments)
        place[order] = torch.arange(segments.numel(), device=segments.device) - starts[segments]
        if self.how == "leave-one-out":
            train_end, valid_end = counts - 2, counts - 1
        else:  # rounded as perfedrec.data.split does it
            wide = counts.to(torch.float64)
            train_end = (wide * self.ratio[0]).round().to(torch.int64).clamp(min=1)
            valid_end = (wide * (1 - self.ratio[2]) - 0.5).ceil().to(torch.int64)
            valid_end = torch.maximum(train_end, valid_end)
        short = counts < FEWEST
        train_end, valid_end = torch.where(short, counts, train_end), torch.where(short, counts, valid_end)
        return (place >= train_end[segments]).to(torch.int64) + (place >= valid_end[segments])


class EvaluationSettings(Settings):
    """How a federation of nodes is evaluated. A simulation has the split of its data for that."""

    hold_out: Literal["auto", "leave-one-out", "ratio", "none"] = Field(
        "auto",
        description="items of each user that nodes hold out of training: one to validate and one to test "
        "(leave-one-out), shares of them (ratio), or none; auto: leave-one-out, but none where privacy puts noise on "
        "all sums. Data that are split already keep their split",
    )
    ratio: tuple[float, float, float] | None = Field(
        None, description="shares of train, valid and test, for ratio (default: [0.8, 0.1, 0.1])"
    )

    @field_validator("ratio", mode="before")
    @classmethod
    def _three(cls, value: Any) -> Any:
        """Three numbers, also as text: 0.8,0.1,0.1."""
        try:
            found = value if value is None or isinstance(value, str) else ",".join(map(str, value))
            return found if found is None else parse_ratio(found)
        except (DataError, TypeError):
            raise ValueError("expected three shares, such as [0.8, 0.1, 0.1]") from None

    @model_validator(mode="after")
    def _possible(self) -> EvaluationSettings:
        if self.ratio is not None and self.hold_out != "ratio":
            raise ValueError(f"ratio changes nothing with hold_out = {self.hold_out}; expected hold_out = ratio")
        if self.ratio is not None and (min(self.ratio) <= 0 or abs(sum(self.ratio) - 1) > 1e-8):
            raise ValueError("ratio: expected three shares above 0 that add up to 1")
        return self

    @property
    def rule(self) -> HoldOut | None:
        """The rule; ``None`` where nothing is held out. :meth:`resolved` settings have one."""
        if self.hold_out == "none":
            return None
        return HoldOut("leave-one-out" if self.hold_out == "auto" else self.hold_out, self.ratio or RATIO)

    def resolved(self, noisy: bool) -> EvaluationSettings:
        """The settings without "auto". ``noisy``: whether privacy puts noise on all sums over users.

        The sums of an evaluation have no noise: raises :class:`ConfigError` where they are asked for beside noise.
        """
        if self.hold_out == "auto":
            return EvaluationSettings(hold_out="none" if noisy else "leave-one-out")
        if noisy and self.hold_out != "none":
            raise ConfigError(
                f"evaluation.hold_out = {self.hold_out} opens sums of hits without noise, and privacy promises noise "
                "on all sums; expected evaluation.hold_out = none"
            )
        return self


def rule_in(configuration: str) -> HoldOut | None:
    """The rule in the configuration that nodes receive, as TOML; ``None`` where it has none.

    Raises :class:`ConfigError` for a section that is not valid.
    """
    try:
        section = tomllib.loads(configuration).get(SECTION, {"hold_out": "none"})
        return EvaluationSettings.model_validate(section).rule
    except ValueError as error:  # of TOML, and of pydantic
        why = " ".join(str(error).split())
        raise ConfigError(f"the section {SECTION} of the federation's configuration cannot be read: {why}") from None
