"""Pre-training with the graph loss of a centralised method, at the neighbourhood service on its protected edges."""

from __future__ import annotations

from pydantic import ValidationError
from torch import Tensor

from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import nearest
from perfedrec.core.threads import one_thread
from perfedrec.core.types import Rows
from perfedrec.methods.centralised.buir import BUIR
from perfedrec.methods.centralised.direct_au import DirectAU
from perfedrec.methods.centralised.lightgcn import LightGCN
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mixgcf import MixGCF
from perfedrec.methods.centralised.ncl import NCL
from perfedrec.methods.centralised.selfcf import SelfCF
from perfedrec.methods.centralised.sgl import SGL
from perfedrec.methods.centralised.simgcl import SimGCL
from perfedrec.methods.centralised.vectors import ProductMethod
from perfedrec.methods.centralised.xsimgcl import XSimGCL
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.nn.propagation import Bipartite

LOSSES: dict[str, type[ProductMethod]] = {
    "lightgcn": LightGCN,
    "sgl": SGL,
    "simgcl": SimGCL,
    "xsimgcl": XSimGCL,
    "ncl": NCL,
    "direct_au": DirectAU,
    "mixgcf": MixGCF,
    "buir": BUIR,
    "selfcf": SelfCF,
}
"""The kinds of pre-training that are the loss of a centralised method. Each learns vectors that LightGCN propagates.
What a method learns besides (a predictor) ends with pre-training."""


SECTION = "pretraining.options."
"""Where the options of these methods stand."""


def graph_loss(settings: PretrainingSettings, embedding_dim: int) -> ProductMethod | None:
    """The method whose loss is minimised in pre-training; ``None`` for another kind.

    Raises :class:`ConfigError` for ``pretraining.options`` that the method does not have.
    """
    kind = LOSSES.get(settings.kind)
    if kind is None:
        if settings.options:
            raise ConfigError(
                f"pretraining.options has {', '.join(settings.options)}, and pretraining.kind = {settings.kind} has no "
                f"options there; expected none, or one of the kinds {', '.join(LOSSES)}"
            )
        return None
    if "embedding_dim" in settings.options:
        raise ConfigError("pretraining.options.embedding_dim is that of the model; expected model.embedding_dim")
    try:
        return kind(kind.Options.model_validate({**settings.options, "embedding_dim": embedding_dim}))
    except ValidationError as error:
        wrong, known = error.errors(), [name for name in kind.Options.model_fields if name != "embedding_dim"]
        for name in (str(each["loc"][0]) for each in wrong if each["type"] == "extra_forbidden"):
            raise ConfigError(
                f"{SECTION}{name} is no option of {settings.kind}; expected one of {', '.join(known)}"
                f"{nearest(name, known)}"
            ) from None
        raise ConfigError(explain(wrong, kind.Options, SECTION)) from None


def minimise(
    method: ProductMethod, graph: Bipartite, views: list[Bipartite], epochs: int, key: Key
) -> tuple[Tensor, Tensor]:
    """The layer-0 vectors of users [n, d] and of items [m, d] after a number of ``epochs`` of a ``method`` on the edges
    of a ``graph``; contrasts between two graphs are between the two ``views``."""
    by_user, n_items = graph.by_user, graph.by_item.starts.numel()
    counts = by_user.degrees
    offsets = counts.new_zeros(counts.numel() + 1)
    offsets[1:] = counts.cumsum(0)
    users = counts.new_tensor(range(counts.numel()))
    rows = Rows(users, offsets, by_user.columns, users.repeat_interleave(counts))
    data = Training(rows, n_items, views=tuple(views))
    with one_thread():
        state = method.init(data, key.fold("init"))
        for epoch in range(epochs):
            state, _ = method.epoch(state, data, key.fold("epoch", epoch))
    return state.users, state.items
