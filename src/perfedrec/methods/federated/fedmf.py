"""FedMF: federated matrix factorisation (Chai et al., IEEE Intelligent Systems 2021; arXiv 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from perfedrec.core.algorithm import TRAIN
from perfedrec.core.inference import InferenceOptions
from perfedrec.core.settings import Settings
from perfedrec.core.types import Embedding, Rows
from perfedrec.methods.federated.base import B, C, Federated, LocalBatch, S
from perfedrec.methods.federated.local import Loss, Parameters, steps
from perfedrec.methods.federated.network import finish, ranking_loss
from perfedrec.methods.federated.settings import FedMFSettings
from perfedrec.nn.segments import dot, expand


class FedMF(Federated[S, B, C]):
    """``s_ui = p_u . q_i``. User vectors stay on the clients; changes of item vectors are averaged.

    Departs from the paper: a ranking loss on implicit feedback instead of squared errors on ratings; cohorts and
    several local steps instead of every user's gradient in every round; the server's optimiser is an option, SGD in the
    paper; secure aggregation (``privacy.aggregation``) instead of homomorphic encryption.
    """

    Options: ClassVar[type[Settings]] = FedMFSettings
    leaves_rows_unread: ClassVar[bool] = True
    """Whether local training writes the clients' own rows without reading them, which takes less time. A subclass has
    to say it again, because it may read them. With other local steps they are read."""
    scored_in_numpy: ClassVar[bool] = True
    """Whether :mod:`perfedrec.nn.inference` scores as this very class does. A subclass has to say it again, because it
    may score in another way."""

    @property
    def inference(self) -> InferenceOptions | None:
        known = vars(type(self)).get("scored_in_numpy", False)
        return InferenceOptions(**self.inference_options()) if known else None

    def inference_options(self) -> dict[str, Any]:
        """The fields of :class:`InferenceOptions`, by name."""
        model, client = self.settings.model, self.settings.client
        same = ("local_steps", "learning_rate", "user_learning_rate", "temperature", "leave_one_out", "l2")
        return {
            "mixed": False,
            "encoder": "none",
            "n_layers": 0,
            "neighbours": False,
            "chooses_cluster": False,
            "starts_itself": False,
            "cosine": client.similarity == "cosine",
            "embedding_dim": model.embedding_dim,
            "init_scale": model.init_scale,
            "finetune_rounds": self.finetune_rounds,
            "n_negatives": self.n_negatives(),
            **{name: getattr(client, name) for name in same},
        }

    def unread(self, phase: str) -> frozenset[str]:
        unread = vars(type(self)).get("leaves_rows_unread", False) and self.local_steps is steps
        return frozenset(["rows"]) if unread and phase == TRAIN.name else frozenset()

    def n_negatives(self) -> int | None:
        client = self.settings.client
        return None if client.loss == "bpr" else int(client.n_negatives)

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        return dot(self.finish(private)[segments], self.finish(rows))

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return self.finish(private) @ self.finish(items).T

    def finish(self, vectors: Tensor) -> Tensor:
        """Vectors [..., d] in the form whose inner products are scores: with unit length if scores are cosines."""
        return finish(vectors, self.settings.client.similarity)

    def local_loss(self, batch: LocalBatch[B], parameters: Parameters) -> Tensor:
        user, segments = parameters.private, batch.labels.rows.segments
        context, up, down = expand(user, segments), parameters.positives, parameters.negatives
        return ranking_loss(self.settings.client, batch.labels, self.finish, parameters, user, context, up, down)

    def loss_name(self) -> Loss | None:
        found: Loss = self.settings.client.loss
        mine = type(self)
        return found if mine.local_loss is FedMF.local_loss and mine.finish is FedMF.finish else None

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        return Embedding(self.finish(client_state.private), self.finish(broadcast.items))

    def user_vectors(self, broadcast: B, rows: Rows, client_state: C) -> Tensor | None:
        return client_state.private
