"""RP3beta: random walks of three steps on the graph, with a penalty on popularity (Paudel et al., ACM TiiS 2016)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.settings import STEEPEST, Settings
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.neighbours import Similarity, nearest, product
from perfedrec.nn.propagation import diffusion_steps


class RP3BetaSettings(Settings):
    """Options of RP3beta. With both exponents at 0.5 the steps are those of the normalised graph."""

    alpha: float = Field(
        0.5,
        ge=0,
        le=STEEPEST,
        description="exponent of the probability of a step, which is 1 / the degree of the node that it starts from",
    )
    beta: float = Field(
        0.3, ge=0, le=STEEPEST, description="exponent of the popularity by which an item's score is divided"
    )
    n_neighbours: int = Field(
        1000, ge=1, description="number of entries of the item-item matrix that are kept for each item"
    )


class RP3Beta(Method):
    """``w_ij = sum_u (1 / d_i)^alpha (1 / d_u)^alpha / d_j^beta`` and ``score_uj = sum_{i in I_u} w_ij``: diffusion on
    the item graph, in which a user with many interactions counts less.

    Departs from the paper: the first step, from the user, is left out, because it has the same probability for each of
    the user's items.
    """

    Options = RP3BetaSettings
    seedless = True
    settings: RP3BetaSettings
    item_based = True

    def init(self, data: Training, key: Key) -> Similarity:
        settings = self.settings
        back, forth = diffusion_steps(data.matrix, settings.alpha, settings.beta, settings.alpha)
        return Similarity.of(nearest(back, forth, settings.n_neighbours))

    def scores(self, state: Similarity, data: Training, users: Tensor) -> Tensor:
        return product(data.matrix[users.cpu().numpy()], state.matrix(), users.device)
