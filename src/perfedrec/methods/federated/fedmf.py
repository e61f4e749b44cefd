"""FedMF: federated matrix factorisation (Chai et al., IEEE Intelligent Systems 2021; arXiv 2019)."""

from __future__ import annotations

from pydantic import Field

from perfedrec.core.settings import Settings
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.settings import (
    ClientSettings,
    ClusterSettings,
    ModelSettings,
    PerFedRecSettings,
    PersonalSettings,
    PretrainingSettings,
    SelectionSettings,
    ServerSettings,
)
from perfedrec.privacy.settings import PrivacySettings


class FactorSettings(Settings):
    """User and item vectors."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of user and item vectors")
    init_scale: float = Field(0.1, gt=0, description="standard deviation of the first vectors")


class FedMFSettings(Settings):
    """Options of FedMF."""

    model: FactorSettings = FactorSettings()
    client: ClientSettings = ClientSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    selection: SelectionSettings = SelectionSettings()


class FedMF(PerFedRec):
    """``s_ui = p_u . q_i``: user vectors stay on the clients, changes of item vectors are averaged. PerFedRec without
    propagation, clusters, personal models or pre-training.

    Departs from the paper: a ranking loss on implicit feedback instead of squared errors on ratings; cohorts and
    several local steps instead of every user's gradient in every round; the server's optimiser is an option, SGD in the
    paper; secure aggregation (``privacy.aggregation``) in place of homomorphic encryption.
    """

    Options = FedMFSettings

    def __init__(self, settings: FedMFSettings | None = None) -> None:
        self.options = settings or self.Options()
        shared = {name: getattr(self.options, name) for name in ("client", "privacy", "server", "selection")}
        model = self.options.model.model_dump()
        neighbours = {"n_layers": 0, "neighbours": False}
        super().__init__(alone(ModelSettings(**{**neighbours, **model}), **shared))


def alone(model: ModelSettings, **shared: Settings) -> PerFedRecSettings:
    """PerFedRec with one global model and, unless ``shared`` says so, nothing before it."""
    parts: dict[str, Settings] = {"pretraining": PretrainingSettings(kind="none"), **shared}
    return PerFedRecSettings(
        model=model,
        clusters=ClusterSettings(n_clusters=0, proportional=False),
        personal=PersonalSettings(local=0.0, cluster=0.0, **{"global": 1.0}),
        **parts,
    )
