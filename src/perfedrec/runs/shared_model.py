"""The model of a federation, opened from the folder of its coordinator: what nodes share, and no user's own part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.counted import counted
from perfedrec.core.device import pick_device
from perfedrec.core.errors import CheckpointError
from perfedrec.core.keys import Key
from perfedrec.core.records import copied, unflatten
from perfedrec.core.types import Spec
from perfedrec.data import Attributes, Catalogue, Dataset, attributes_beside
from perfedrec.evaluation import RandomOrder
from perfedrec.methods.centralised.method import Method
from perfedrec.runs.config import Config
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes.new_users import NewUserRecommender
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.simulator import populate

STATE, USERS = "state", "roll"
"""Names of the records of a federation's model: the server's state, and the users who take part."""


@dataclass(frozen=True)
class SharedModel:
    """What nodes share after training: the ``state`` that is served, after round ``best_round`` of training, for the
    items of the ``catalogue``. ``users`` [n] are the identities of those who took part, ascending; of a simulation no
    node knows them, and each is ``NEWCOMER``."""

    config: Config
    algorithm: AnyAlgorithm
    state: Any
    catalogue: Catalogue
    best_round: int
    users: Tensor

    def recommender(
        self, dataset: Dataset, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> NewUserRecommender[Any, Any, Any]:
        """A recommender for the users of a data set over the catalogue's items (:meth:`over`), as for new users."""
        place, order = pick_device(device), RandomOrder(dataset.train.user_ids, dataset.train.item_ids)
        population: Population[Any] = populate(dataset, place)
        return NewUserRecommender(self.algorithm, copied(self.state, place), population, self.config.run.seed, order)

    def over(self, dataset: Dataset, folder: Path) -> Dataset:
        """A data set with the items of the catalogue in its order, and with its users' attributes in the catalogue's
        encoding, which are read from the ``folder`` of the data.

        What is left out stands in its notes. Raises :class:`DataError` where the catalogue has none of its items.
        """
        found, encoding = self.catalogue.number(dataset), self.catalogue.encoding
        users: Attributes | None = None
        if self.config.attributes and encoding is not None:
            users, remarks = attributes_beside(folder, "user", found.train.user_ids, encoding)
            nothing = np.zeros((found.n_users, len(encoding.names)), dtype=np.float32)
            users = users or Attributes(encoding.names, nothing, encoding.ranges)
            found = replace(found, notes=replace(found.notes, remarks=found.notes.remarks + remarks))
        return replace(found, user_attributes=users)

    def basis(self, dataset: Dataset) -> str:
        """What lists for the users of a data set are made from, in one sentence."""
        served = getattr(self.algorithm, "neighbours", False) and self.algorithm.needs_service
        without = "nobody's own part"
        if served and getattr(self.state, "neighbours", None) is None:
            without += ", nor the neighbour sums that the service gave to nodes alone"
        return (
            f"the shared model of a federation, which has {without}: the {counted(dataset.n_users, 'user')} of "
            f"{dataset.name} are served as new users, after {counted(self.algorithm.finetune_rounds, 'local round')} "
            "on their training interactions (a member's own list: perfedrec node recommend, on the member's node)"
        )


def open_federation(folder: RunFolder) -> SharedModel:
    """The model in the folder of a coordinator. Raises :class:`CheckpointError` where there is none, and where the
    federation's items are not known."""
    config, loaded = folder.config(), folder.model({})
    algorithm = config.build()
    if isinstance(algorithm, Method) or not {STATE, USERS} <= loaded.records.keys():
        raise CheckpointError(f"{folder.path}: has no model of a federation; expected the folder that serve wrote")
    catalogue = folder.catalogue(loaded.belongs.get("catalogue", ""))
    users, n_items = loaded.records[USERS][0]["users"], len(catalogue.item_ids)
    items = catalogue.item_attributes
    features = None if items is None else torch.tensor(items.values)
    spec = Spec(users.numel(), n_items, torch.ones(n_items), catalogue.n_user_attributes, features)
    kind = type(algorithm.init(spec, Key(0)))
    state = copied(unflatten(kind, *loaded.records[STATE]), torch.device("cpu"))
    return SharedModel(config, algorithm, state, catalogue, loaded.extra["best_round"], users)
