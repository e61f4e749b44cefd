"""What a method tells of itself so that its users can be scored without torch (:mod:`perfedrec.nn.inference`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Self


@dataclass(frozen=True)
class InferenceOptions:
    """The options of a method of user and item vectors, as far as scores and local training depend on them.

    ``mixed``: whether personal models are mixed, with the first ``weights``, and exponents ``alpha`` and ``beta`` of
    the neighbourhood model; otherwise the vectors' products are the scores. ``encoder``: how vectors are propagated,
    over ``n_layers``; ``exponents``: those of users' and items' degrees in spectral pre-training. ``neighbours``:
    whether there are neighbour sums. ``chooses_cluster``: whether all users find their cluster themselves;
    ``starts_itself``: whether a user without a first vector from the service makes it from the items' vectors.
    ``cosine``: whether scores are cosines. ``n_negatives``: those of the softmax loss, ``None`` for BPR.
    """

    mixed: bool
    encoder: str
    n_layers: int
    neighbours: bool
    chooses_cluster: bool
    starts_itself: bool
    cosine: bool
    embedding_dim: int
    init_scale: float
    finetune_rounds: int
    local_steps: int
    learning_rate: float
    user_learning_rate: float
    n_negatives: int | None
    temperature: float
    leave_one_out: bool
    l2: float
    weights: tuple[float, ...] = ()
    exponents: tuple[float, float] = (0.5, 0.5)
    alpha: float = 0.5
    beta: float = 0.5

    def dump(self) -> str:
        """The options as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self | None:
        """The options that :meth:`dump` wrote; ``None`` where another version of perfedrec wrote others."""
        stored = json.loads(text)
        if stored.keys() != {field.name for field in fields(cls)}:
            return None
        return cls(**(stored | {name: tuple(stored[name]) for name in ("weights", "exponents")}))
