"""ItemKNN: items similar to those that a user has (Sarwar et al., WWW 2001)."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import Similarity, nearest, product


class ItemKNNSettings(Settings):
    """Options of ItemKNN."""

    n_neighbours: int = Field(200, ge=1, description="number of similar items that are kept for each item")
    shrink: float = Field(50.0, ge=0, description="added to the product of lengths, so that rare items count less")


class ItemKNN(Method):
    """``s_ij = |U_i & U_j| / (sqrt(|U_i| |U_j|) + shrink)`` between items, and ``score_ui = sum_{j in I_u} s_ij`` over
    the nearest items of each j.

    Departs from the paper, which predicts ratings: here interactions are implicit, so that all ratings are 1,
    similarities are shrunk (Bell and Koren, 2007), and their sum is not normalised.
    """

    Options = ItemKNNSettings
    seedless = True
    settings: ItemKNNSettings
    item_based = True

    def init(self, data: Training, key: Key) -> Similarity:
        by_user = data.matrix
        lengths = np.sqrt(data.item_degrees.cpu().numpy().clip(min=1)).astype(np.float64)
        settings = self.settings
        return Similarity.of(nearest(by_user.T.tocsr(), by_user, settings.n_neighbours, lengths, settings.shrink))

    def scores(self, state: Similarity, data: Training, users: Tensor) -> Tensor:
        return product(data.matrix[users.cpu().numpy()], state.matrix(), users.device)
