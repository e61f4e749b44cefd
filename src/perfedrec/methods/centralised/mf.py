"""Matrix factorisation with a pairwise loss (Rendle et al., UAI 2009, BPR-MF)."""

from __future__ import annotations

from torch import Tensor

from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.vectors import Batch, VectorMethod, bpr


class MF(VectorMethod):
    """``score_ui = p_u . q_i``, trained with BPR.

    Departs from the paper: Adam instead of SGD; epochs over all interactions instead of a bootstrap of triples;
    negatives that are distinct within a user and an epoch; no item biases.
    """

    def loss(self, users: Tensor, items: Tensor, batch: Batch, data: Training) -> Tensor:
        return bpr(users, items, batch) + self.decay(users, items, batch)
