"""UserKNN: items of similar users (Resnick et al., CSCW 1994)."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy import sparse
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.settings import Settings
from perfedrec.core.types import Rows
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import Similarity, largest, nearest, product


class UserKNNSettings(Settings):
    """Options of UserKNN."""

    n_neighbours: int = Field(200, ge=1, description="number of similar users that are kept for each user")
    shrink: float = Field(10.0, ge=0, description="added to the product of lengths, so that short histories count less")


class UserKNN(Method):
    """``s_uv = |I_u & I_v| / (sqrt(|I_u| |I_v|) + shrink)`` between users, and ``score_ui = sum_{v in U_i} s_uv`` over
    the nearest users of u.

    Departs from the paper, which predicts ratings by correlation: here interactions are implicit, similarities are
    shrunk (Bell and Koren, 2007), and their sum is not normalised.
    """

    Options = UserKNNSettings
    seedless = True
    settings: UserKNNSettings

    def init(self, data: Training, key: Key) -> Similarity:
        by_user = data.matrix
        lengths = np.sqrt(data.rows.counts.cpu().numpy().clip(min=1)).astype(np.float64)
        settings = self.settings
        return Similarity.of(nearest(by_user, by_user.T.tocsr(), settings.n_neighbours, lengths, settings.shrink))

    def scores(self, state: Similarity, data: Training, users: Tensor) -> Tensor:
        return product(state.matrix()[users.cpu().numpy()], data.matrix, users.device)

    def scores_of_new_users(self, state: Similarity, data: Training, rows: Rows) -> Tensor:
        own, settings = Training(rows, data.n_items), self.settings
        overlap = (own.matrix @ data.matrix.T).toarray()
        known, new = (np.sqrt(each.rows.counts.cpu().numpy().clip(min=1)) for each in (data, own))
        weights = largest(overlap / (new[:, None] * known[None, :] + settings.shrink), settings.n_neighbours)
        return product(sparse.csr_array(weights), data.matrix, rows.items.device)
