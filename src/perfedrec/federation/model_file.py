"""A node's commands: what is recommended on it, and models that travel to it as files.

A model file is what the finished training of a federation gives to somebody who was not in it: the tables that are
served, the catalogue and the method's options. There is nothing of any user in it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tomli_w
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors

from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.records import flatten, unflatten
from perfedrec.data import Catalogue, Encoding, attributes_beside
from perfedrec.evaluation.lists import explained
from perfedrec.methods.registry import METHODS, method
from perfedrec.runs.checkpoint import write_atomic
from perfedrec.runs.config import Config, check
from perfedrec.runs.training import open_run
from perfedrec.runtimes.node import LocalRecommender, Store, serving_broadcast
from perfedrec.runtimes.simulator import PersonalRecommender

FORMAT = "perfedrec model 2"
FORMATS = ("perfedrec model 1", FORMAT)
NOBODY = torch.zeros(0, dtype=torch.int64)


def method_of(config: Config) -> str:
    """The method and its options as TOML, without data and run: what server and nodes have to agree on.

    Noise that an epsilon asks for is written down as it was solved.
    """
    tree = config.model_dump(mode="json", by_alias=True, exclude={"data", "run"}, exclude_none=True)
    if _unsolved(config):
        tree["privacy"]["noise"] = config.build().settings.privacy.noise.model_dump()
    return tomli_w.dumps(tree)


def _unsolved(config: Config) -> bool:
    privacy = getattr(config, "privacy", None)
    return privacy is not None and privacy.epsilon is not None and not privacy.noise.any


def build(configuration: str) -> Any:
    """The method that :func:`method_of` wrote down.

    Raises :class:`ConfigError`, also for a method that is a file: what comes from elsewhere must not name code to run.
    """
    try:
        tree = tomllib.loads(configuration)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration of the federation is not valid TOML: {error}") from None
    name = tree.get("algorithm")
    if name not in METHODS:
        raise ConfigError(f"the federation's method {name!r} does not come with perfedrec; expected one that does")
    config = check(tree | {"run": {"rounds": 0}}, "the configuration of the federation")
    if _unsolved(config):
        raise ConfigError("the configuration of the federation asks for an epsilon and names no noise")
    return method(config.algorithm)(config.settings)


def take_in(
    store: Store, file: Path, frame: pl.DataFrame, skip_unknown: bool = False, first_identity: int | None = None
) -> tuple[int, int, int, int]:
    """Take the interactions in that a ``file`` holds, and where users have attributes, those in the same folder, as
    :func:`perfedrec.data.load` looks for them: what :meth:`Store.import_interactions` counts, and how many users have
    attributes now.
    """
    told: dict[str, list[float]] = {}
    if store.encoding is not None:
        users = frame["user"].cast(pl.String).unique(maintain_order=True).to_list()
        found, _ = attributes_beside(file.parent, "user", np.array(users, dtype=object), store.encoding)
        told = {} if found is None else dict(zip(users, found.values.tolist(), strict=True))
    counts = store.import_interactions(frame, skip_unknown=skip_unknown, first_identity=first_identity, attributes=told)
    return *counts, len(told)


def recommend(store: Store, user_id: str, k: int) -> pl.DataFrame:
    """The ``k`` best items that a user has not taken: see :func:`perfedrec.evaluation.lists.explained`.

    Raises :class:`perfedrec.core.errors.DataError` for an unknown user, and
    :class:`perfedrec.runtimes.node.StoreError` where no model has come yet.
    """
    users = torch.tensor([store.identity(user_id)])
    scores, parts = LocalRecommender(store, build(store.served().configuration)).scores(users)
    return explained(scores[0], {name: values[0] for name, values in parts.items()}, store.item_ids, k)


@dataclass(frozen=True)
class Model:
    """A model as a file holds it: the ``broadcast`` of newcomers, of which ``run`` and round, the method with its options as
    TOML, and the ``catalogue``."""

    broadcast: Any
    run: str
    round: int
    configuration: str
    catalogue: Catalogue

    def give(self, store: Store) -> None:
        """Serve it on a node. Raises :class:`ConfigError` where its catalogue is another one."""
        store.check_catalogue(self.catalogue)
        store.receive(self.broadcast, NOBODY, self.run, self.round, self.configuration)


def export(folder: Path, output: Path, data: str | None = None) -> None:
    """Write the model of a finished run to a file."""
    result, config = open_run(folder, data, "cpu")
    recommender = result.recommender
    if not isinstance(recommender, PersonalRecommender):
        raise ConfigError(f"{folder}: {config.algorithm} is centralised; expected the run of a federated method")
    broadcast = serving_broadcast(recommender.algorithm, recommender.state, NOBODY)
    tensors, scalars = flatten(broadcast)
    catalogue = Catalogue.of(result.dataset, config.attributes)
    content = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    digest = hashlib.sha256(b"".join(name.encode() + each.numpy().tobytes() for name, each in content.items()))
    metadata = {
        "format": FORMAT,
        "run": f"{folder.resolve().name}-{digest.hexdigest()[:12]}",
        "round": str(result.best_round),
        "configuration": method_of(config),
        "scalars": json.dumps(scalars),
        "catalogue": json.dumps(catalogue.item_ids.tolist()),
        "encoding": json.dumps(None if catalogue.encoding is None else asdict(catalogue.encoding)),
    }
    try:
        write_atomic(output, dump_tensors(content, metadata))
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror})") from None


def read_model(path: Path) -> Model:
    """The model in a file. Raises :class:`CheckpointError`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in FORMATS:
                raise CheckpointError(f"{path}: no model file; expected one that perfedrec node export wrote")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        ids = json.loads(metadata["catalogue"])
        whole = all(isinstance(each, int) for each in ids)
        told = json.loads(metadata.get("encoding", "null"))
        encoding = told and Encoding(tuple(told["names"]), tuple((low, high) for low, high in told["ranges"]))
        broadcast = unflatten(build(metadata["configuration"]).broadcast_type, tensors, json.loads(metadata["scalars"]))
        return Model(
            broadcast=broadcast,
            run=metadata["run"],
            round=int(metadata["round"]),
            configuration=metadata["configuration"],
            catalogue=Catalogue(np.array(ids, dtype=np.int64 if whole else object), None, encoding),
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged model file ({error})") from None
