"""The options of federated methods, one class per section. Each option changes the result."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from perfedrec.core.settings import STEEPEST, Settings
from perfedrec.methods.federated.defence import DefenceSettings, check_defence
from perfedrec.nn.optim import ServerOptimizer
from perfedrec.privacy.settings import PrivacySettings


class ModelSettings(Settings):
    """Options of the vectors, their propagation and scoring."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of user and item vectors")
    n_layers: int = Field(2, ge=0, description="K, number of propagation layers")
    encoder: Literal["lightgcn", "spectral"] = Field(
        "lightgcn",
        description="lightgcn: mean of the layers; spectral: user p_u + sum_i q_i / sqrt(d_u d_i), item sqrt(d_i) q_i",
    )
    neighbours: bool = Field(True, description="use neighbour sums from the neighbourhood service (lightgcn encoder)")
    refresh_every: int = Field(
        5, ge=1, description="number of rounds from one refresh of the neighbour sums to the next"
    )
    attributes: bool = Field(False, description="embed attributes, with feature crossing and attention")
    init_scale: float = Field(0.1, gt=0, description="standard deviation of the initial vectors")


class ClientSettings(Settings):
    """Options of the clients' local training."""

    loss: Literal["bpr", "softmax"] = Field(
        "bpr", description="bpr: BPR; softmax: sampled softmax over negatives shared by a client's positives"
    )
    n_negatives: int = Field(
        64, ge=1, description="negatives per client of the softmax loss (BPR takes one per positive)"
    )
    similarity: Literal["inner", "cosine"] = Field(
        "inner", description="scores are inner products or cosines of vectors"
    )
    temperature: float = Field(0.2, gt=0, description="temperature of the softmax loss")
    leave_one_out: bool = Field(
        False, description="leave a positive item out of the user vector that it is scored against"
    )
    learning_rate: float = Field(1.0, gt=0, description="step of the item rows (SGD)")
    user_learning_rate: float = Field(
        0.01, ge=0, description="step of the private user vector (Adam; its moments stay on the client)"
    )
    dense_learning_rate: float = Field(
        0.1, ge=0, description="step of the attribute networks (SGD on the mean over a client's positives)"
    )
    local_steps: int = Field(1, ge=1, description="E, local steps per round")
    l2: float = Field(0.0, ge=0, description="weight of the L2 term on the layer-0 rows of the batch")


class ServerSettings(Settings):
    """Options of the coordinator's optimiser."""

    optimizer: ServerOptimizer = Field("fedadam", description="optimiser that applies the averaged change")
    learning_rate: float = Field(0.01, gt=0, description="server step (1 is plain FedAvg)")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    averaging: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the running average of the global table, which is served instead of the table; 0: no "
        "averaging",
    )
    weighting: Literal["uniform", "interactions"] = Field(
        "uniform",
        description="weight of a client: 1, or its number of interactions (which the coordinator then learns)",
    )


class ClusterSettings(Settings):
    """Options of the clusters of similar users and their models.

    Where pre-training fills the cluster models (``pretraining.cluster_passes``) clusters are found once, before
    training, and ``start``, ``stop`` and ``every`` have no effect: a cluster's model would not follow users who leave
    the cluster. Where sums are of low rank (``privacy.rank``) clusters are found once, before training, and need
    spectral pre-training: without it there are none. Of these options ``n_clusters`` alone has an effect then. Wherever
    clients contribute to sums alone, nobody knows who is in which cluster, and cohorts are not selected by cluster.
    """

    n_clusters: int = Field(5, ge=0, description="number of clusters; 0 or 1: no clusters")
    start: int = Field(
        41, ge=0, description="first training round after which users are clustered (not with sums of low rank)"
    )
    stop: int = Field(
        179, ge=0, description="last training round after which users are clustered (not with sums of low rank)"
    )
    every: int = Field(6, ge=1, description="rounds from one clustering to the next (not with sums of low rank)")
    learning_rate: float = Field(
        0.1,
        ge=0,
        description="step of a cluster's offset, as a share of the server's step (not with sums of low rank)",
    )
    proportional: bool = Field(
        True, description="select from each cluster in proportion to its size (only where user vectors are sent)"
    )

    @property
    def enabled(self) -> bool:
        return self.n_clusters > 1

    def idle(self) -> dict[str, str]:
        others = [name for name in type(self).model_fields if name != "n_clusters"]
        return {} if self.enabled else dict.fromkeys(others, f"n_clusters = {self.n_clusters}")

    def due(self, training_round: int) -> bool:
        """Whether users are clustered after this round of training."""
        return (
            self.enabled
            and self.start <= training_round <= self.stop
            and (training_round - self.start) % self.every == 0
        )


class SelectionSettings(Settings):
    """Options of the selection of clients."""

    n_clients_per_round: int = Field(256, ge=1, description="clients in a cohort (the mean, under Poisson sampling)")
    sampling: Literal["fixed", "poisson"] = Field(
        "fixed",
        description="fixed: cohorts of exactly this size; poisson: each client independently (needed for claims of "
        "amplification)",
    )
    max_participations: int | None = Field(
        None, ge=0, description="largest number of training rounds that a client contributes to; off: no limit"
    )


class TableSettings(Settings):
    """Options of the shared table."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of item vectors")
    init_scale: float = Field(0.1, gt=0, description="standard deviation of the initial vectors")


class LocalSettings(Settings):
    """Options of the clients' local training."""

    learning_rate: float = Field(10.0, gt=0, description="step of the item rows (SGD on the sum over labels)")
    user_learning_rate: float = Field(
        0.02, ge=0, description="step of the private parameters (Adam; its moments stay on the client)"
    )
    dense_learning_rate: float = Field(
        0.1, ge=0, description="step of a shared network (SGD on the mean over a client's labels)"
    )
    local_steps: int = Field(2, ge=1, description="E, local steps per round")


class FederatedSettings(Settings):
    """Options that every federated method has."""

    model: TableSettings = TableSettings()
    client: LocalSettings = LocalSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    selection: SelectionSettings = SelectionSettings()
    defence: DefenceSettings = DefenceSettings()

    @model_validator(mode="after")
    def _uncounted(self) -> Self:
        check_weights(self.privacy, self.server)
        check_cohort(self.privacy, self.selection)
        check_defence(self.privacy, self.defence, self.selection.n_clients_per_round)
        return self


class FactorSettings(Settings):
    """Options of user and item vectors."""

    embedding_dim: int = Field(64, ge=1, description="d, the length of user and item vectors")
    init_scale: float = Field(0.1, gt=0, description="standard deviation of the initial vectors")


class FedMFSettings(Settings):
    """Options of FedMF."""

    model: FactorSettings = FactorSettings()
    client: ClientSettings = ClientSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    selection: SelectionSettings = SelectionSettings()
    defence: DefenceSettings = DefenceSettings()

    @model_validator(mode="after")
    def _withheld(self) -> Self:
        check_weights(self.privacy, self.server)
        check_cohort(self.privacy, self.selection)
        check_defence(self.privacy, self.defence, self.selection.n_clients_per_round)
        return self


class NeighbourSettings(FactorSettings):
    """Options of the vectors and their propagation over the expanded graph."""

    n_layers: int = Field(2, ge=1, description="K, number of propagation layers")
    refresh_every: int = Field(5, ge=1, description="number of rounds from one expansion of the graph to the next")
    neighbours: Literal[True] = Field(True, description="neighbour expansion; always on, because it is the method")


class FedGNNSettings(FedMFSettings):
    """Options of FedGNN."""

    model: NeighbourSettings = NeighbourSettings()

    @model_validator(mode="after")
    def _two_layers(self) -> Self:
        check_layers(self.privacy, self.model.n_layers)
        return self


class PersonalSettings(Settings):
    """Options of the personal model: a weighted mean of the scores of several models."""

    local: float = Field(1.0, ge=0, description="weight of the model with the client's own fine-tuned rows")
    cluster: float = Field(1.0, ge=0, description="weight of the cluster's model")
    global_: float = Field(1.0, ge=0, alias="global", description="weight of the global model")
    pretrained: float = Field(0.0, ge=0, description="weight of the model that spectral pre-training ended with")
    neighbourhood: float = Field(
        0.0, ge=0, description="weight of the neighbourhood model, which recommends what similar users have"
    )
    learned: bool = Field(False, description="let each client learn its own weights, starting from these")
    chosen: bool = Field(
        False,
        description="let users' held-out items choose the weights of models above 0, the same for all users, step by "
        "step at each evaluation on validation data, starting from these",
    )

    model_config = Settings.model_config | {"populate_by_name": True}

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.local + self.cluster + self.global_ + self.pretrained + self.neighbourhood == 0:
            raise ValueError("all weights of personal are 0; expected at least one above 0")
        if self.learned and self.chosen:
            raise ValueError("learned and chosen are two ways to the same weights; expected one of them")
        return self


class NeighbourhoodSettings(Settings):
    """Options of the neighbourhood model (``personal.neighbourhood``)."""

    alpha: float = Field(
        0.5, ge=0, le=STEEPEST, description="exponent of the degrees of the items that the diffusion starts from"
    )
    beta: float = Field(
        0.5, ge=0, le=STEEPEST, description="exponent of the degree by which an item's score is divided"
    )
    gamma: float | None = Field(
        None,
        ge=0,
        le=STEEPEST,
        description="exponent of the degrees of the users that the diffusion comes through; off: 1, or alpha where "
        "users have fewer than 16 items on average",
    )
    list_length: int = Field(
        300, ge=1, description="number of items whose scores the neighbourhood service sends to each user"
    )


class PretrainingSettings(Settings):
    """Options of the phases before the first training round."""

    kind: Literal[
        "none",
        "contrastive",
        "spectral",
        "lightgcn",
        "sgl",
        "simgcl",
        "xsimgcl",
        "ncl",
        "direct_au",
        "mixgcf",
        "buir",
        "selfcf",
    ] = Field(
        "contrastive",
        description="kind of pre-training: the paper's contrastive one, spectral, or the loss of a centralised "
        "graph method at the neighbourhood service",
    )
    epochs: int = Field(10, ge=1, description="loss of a graph method: epochs over the protected edges")
    options: dict[str, bool | int | float] = Field(
        {}, description="loss of a graph method: its options, as in [method] of its preset"
    )
    at: Literal["service", "clients"] = Field(
        "service",
        description="spectral: who makes the passes, the neighbourhood service from the edges that it has, or the "
        "clients, with an upload for each (always the clients where they contribute to sums alone)",
    )
    clients: int = Field(
        50_000,
        ge=0,
        description="spectral at the service: clients that are asked before training, a sample where there are more; "
        "then clients make their first vectors and choose their clusters themselves, and have no lists (0: all)",
    )
    passes: int = Field(3, ge=1, description="spectral: number of passes over all users")
    user_exponent: float = Field(
        0.5, ge=0, le=1, description="spectral: exponent of the user's degree by which an interaction is divided"
    )
    item_exponent: float = Field(
        0.5, ge=0, le=1, description="spectral: exponent of the item's degree by which an interaction is divided"
    )
    cluster_passes: int = Field(
        0,
        ge=0,
        le=1,
        description="spectral: number of passes after them that fill the cluster models (one in any case with sums of "
        "low rank, none with noise in sums); users then keep their clusters during training",
    )
    steps: int = Field(5, ge=1, description="contrastive: number of Adam steps")
    learning_rate: float = Field(0.03, gt=0, description="contrastive: step of Adam")
    init_scale: float = Field(0.003, gt=0, description="contrastive: standard deviation of the initial vectors")
    batch_size: int = Field(256, ge=2, description="contrastive: users and items per step")
    temperature: float = Field(0.2, gt=0, description="contrastive: temperature of InfoNCE")
    node_dropout: float = Field(0.1, ge=0, lt=1, description="contrastive: share of clients that a view leaves out")
    continued: float = Field(
        0.0,
        ge=0,
        description="weight, in clients, with which the coordinator goes on driving items apart in each round of "
        "training, on batch_size items; 0: pre-training ends before training",
    )
    edge_perturbation: bool = Field(
        True, description="contrastive: use two independently perturbed edge sets instead of one"
    )
    noise: float = Field(0.1, ge=0, description="contrastive: length of the noise in every layer")


class PerFedRecSettings(Settings):
    """Options of PerFedRec++, by section (PerFedRec of 2022 with ``pretraining.kind = "none"``)."""

    model: ModelSettings = ModelSettings()
    client: ClientSettings = ClientSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    clusters: ClusterSettings = ClusterSettings()
    selection: SelectionSettings = SelectionSettings()
    defence: DefenceSettings = DefenceSettings()
    personal: PersonalSettings = PersonalSettings()
    neighbourhood: NeighbourhoodSettings = NeighbourhoodSettings()
    pretraining: PretrainingSettings = PretrainingSettings()

    @model_validator(mode="after")
    def _pretrained(self) -> Self:
        hidden = self.privacy.sums and self.pretraining.kind not in ("spectral", "none")  # _withheld says that
        if self.personal.pretrained and self.pretraining.kind != "spectral" and not hidden:
            raise ValueError(
                "personal.pretrained needs pretraining.kind = spectral; expected that kind, or personal.pretrained = 0"
            )
        if self.personal.neighbourhood and self.privacy.sums and self.pretraining.kind != "spectral":
            raise ValueError(
                f"with privacy.aggregation = {self.privacy.aggregation} personal.neighbourhood is made from the passes "
                "of spectral pre-training; expected pretraining.kind = spectral"
            )
        return self

    @model_validator(mode="after")
    def _withheld(self) -> Self:
        check_weights(self.privacy, self.server)
        check_cohort(self.privacy, self.selection)
        check_defence(self.privacy, self.defence, self.selection.n_clients_per_round)
        if not self.privacy.sums:
            return self
        how = f"privacy.aggregation = {self.privacy.aggregation}"
        if self.pretraining.continued:
            raise ValueError(f"pretraining.continued changes rows of single items, which {how} hides; expected 0")
        if self.pretraining.kind not in ("spectral", "none"):
            raise ValueError(
                f"{how} hides the edges that {self.pretraining.kind} pre-training needs; expected kind = spectral or "
                "none"
            )
        if self.privacy.low_rank and self.clusters.enabled and (self.privacy.noise.any or self.privacy.epsilon):
            raise ValueError(
                "with privacy.rank the sizes of clusters are summed without noise; expected clusters.n_clusters = 0"
            )
        if self.model.neighbours and self.model.encoder == "lightgcn":
            check_layers(self.privacy, self.model.n_layers)
        return self


def check_weights(privacy: PrivacySettings, server: ServerSettings) -> None:
    """Raise ValueError for weights by number of interactions if privacy hides these numbers."""
    if privacy.randomised_response and server.weighting != "uniform":
        raise ValueError("privacy.randomised_response hides a client's items; expected server.weighting = uniform")
    if privacy.sums and server.weighting != "uniform":
        raise ValueError(
            f"privacy.aggregation = {privacy.aggregation} hides how many interactions a client has; expected "
            "server.weighting = uniform"
        )


def check_cohort(privacy: PrivacySettings, selection: SelectionSettings) -> None:
    """Raise ValueError for cohorts that are smaller than any sum that may be opened, and for passes without noise whose
    rows are chosen by degrees with noise, or the reverse."""
    if privacy.aggregation == "secure" and selection.n_clients_per_round < privacy.min_clients:
        raise ValueError(
            f"no sum of fewer than privacy.min_clients = {privacy.min_clients} clients is opened; expected "
            f"selection.n_clients_per_round of at least that (it is {selection.n_clients_per_round})"
        )
    if privacy.low_rank and bool(privacy.noise.degrees) != bool(privacy.noise.spectral):
        raise ValueError(
            "degrees decide which rows of passes are summed; expected noise.degrees and noise.spectral both, or neither"
        )


def check_layers(privacy: PrivacySettings, n_layers: int) -> None:
    """Raise ValueError for more layers of neighbour sums than clients can contribute to."""
    if privacy.sums and n_layers > 2:
        raise ValueError(
            f"privacy.aggregation = {privacy.aggregation} allows neighbour sums of at most two layers; expected "
            "model.n_layers <= 2"
        )
