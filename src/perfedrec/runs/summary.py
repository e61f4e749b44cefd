"""What a finished run says about itself: the content of ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from perfedrec.core.counted import counted
from perfedrec.evaluation.sample import ERROR

FULL = "full ranking"
"""The name of the protocol of full ranking. The names of protocols stand beside all figures: figures of different
protocols cannot be compared."""


def sampled(negatives: tuple[int, int] | None) -> str:
    """The name of the protocol of sampled negatives, for the smallest and the largest number of negatives of a case:
    there are fewer than were asked for where a user has few unseen items."""
    low, high = negatives or (0, 0)
    return f"{high} sampled negatives" if low == high else f"{low} to {high} sampled negatives"


def communication(bytes_up: float, bytes_down: float, uploads: float, users: int) -> dict[str, float]:
    """Bytes and uploads of a whole run: in total, and as means over ``users`` and over uploads."""
    return {
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
        "uploads": uploads,
        "uploads_per_client": uploads / max(users, 1),
        "bytes_up_per_upload": bytes_up / max(uploads, 1),
        "bytes_down_per_upload": bytes_down / max(uploads, 1),
    }


@dataclass(frozen=True)
class Summary:
    """The summary of a run.

    ``n_phases`` rounds were played before training, and ``best_round`` counts rounds of training: 0 and below are
    rounds before it. ``communication`` has bytes and uploads, ``privacy`` the privacy block.

    ``chosen`` are the options that held-out items have chosen, such as the shares of the personal models.

    A simulated run has metrics of validation and test, the latter also of popularity and, if asked for, among sampled
    negatives, the names of the ``protocols``, and how the ``data`` were prepared and split, in sentences (nothing in
    runs of versions before 0.4). A federation has its number of ``users`` and the names of the nodes that received the
    model, ``nodes_with_model``; and where its nodes hold items out, metrics of validation and test.
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
    data: list[str] = field(default_factory=list)
    users: int | None = None
    nodes_with_model: list[str] | None = None
    chosen: dict[str, float] = field(default_factory=dict)

    def of_sample(self, figures: Mapping[str, float] | None = None) -> str:
        """Whose ``figures`` these are (by default those of validation), as text: of a sample of users, with the
        standard error, or "" for all."""
        figures = self.valid if figures is None else figures
        if ERROR not in figures:
            return ""
        return f" (of a sample of {counted(round(figures['users']), 'user')}, standard error {figures[ERROR]:.4f})"

    def stored(self) -> dict[str, Any]:
        """As ``result.json`` has it, where ``n_phases`` is called "prelude"."""
        simulated = ["valid", "test", "test_sampled", "protocols", "popularity", "data"]
        evaluated = [name for name in ("valid", "test", "protocols") if getattr(self, name)]
        names = simulated if self.nodes_with_model is None else ["users", "nodes_with_model", *evaluated]
        return {
            "algorithm": self.algorithm,
            "prelude": self.n_phases,
            "best_round": self.best_round,
            **({"chosen": self.chosen} if self.chosen else {}),
            **{name: getattr(self, name) for name in names},
            "communication": self.communication,
            "privacy": self.privacy,
        }

    @staticmethod
    def read(stored: Mapping[str, Any]) -> Summary:
        """The summary that :meth:`stored` gave. Raises :class:`KeyError` or :class:`TypeError` for other content."""
        names = [name for name in Summary.__dataclass_fields__ if name in stored]
        found = Summary(n_phases=stored["prelude"], **{name: stored[name] for name in names})
        if found.users is None:
            return found
        sent = found.communication  # up to 0.2.0 a federation had the totals alone
        totals = (sent["bytes_up"], sent["bytes_down"], sent["uploads"])
        return replace(found, communication=communication(*totals, found.users))
