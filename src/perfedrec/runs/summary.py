"""What a finished run says about itself: the content of ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL, SAMPLED = "full ranking", "{} sampled negatives"
"""Names of the protocols of evaluation. They stand beside all figures: figures of different protocols cannot be
compared."""


@dataclass(frozen=True)
class Summary:
    """The summary of a run.

    ``n_phases`` rounds were played before training, and ``best_round`` counts rounds of training: 0 and below are
    rounds before it. ``communication`` has bytes and uploads, ``privacy`` the privacy block.

    A simulated run has metrics of validation and test, the latter also of popularity and, if asked for, among sampled
    negatives, and the names of the ``protocols``. A federation has none of these. It has its number of ``users`` and
    the names of the nodes that received the model, ``nodes_with_model``.
    """

    algorithm: str
    n_phases: int
    best_round: int
    communication: dict[str, float]
    privacy: dict[str, Any]
    valid: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    test_sampled: dict[str, float] | None = None
    protocols: dict[str, str] = field(default_factory=dict)
    popularity: dict[str, float] = field(default_factory=dict)
    users: int | None = None
    nodes_with_model: list[str] | None = None

    def stored(self) -> dict[str, Any]:
        """As ``result.json`` has it, where ``n_phases`` is called "prelude"."""
        simulated = ["valid", "test", "test_sampled", "protocols", "popularity"]
        names = simulated if self.nodes_with_model is None else ["users", "nodes_with_model"]
        return {
            "algorithm": self.algorithm,
            "prelude": self.n_phases,
            "best_round": self.best_round,
            **{name: getattr(self, name) for name in names},
            "communication": self.communication,
            "privacy": self.privacy,
        }

    @staticmethod
    def read(stored: Mapping[str, Any]) -> Summary:
        """The summary that :meth:`stored` gave. Raises :class:`KeyError` or :class:`TypeError` for other content."""
        names = [name for name in Summary.__dataclass_fields__ if name in stored]
        return Summary(n_phases=stored["prelude"], **{name: stored[name] for name in names})
