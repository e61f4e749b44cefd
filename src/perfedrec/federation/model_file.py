"""Models that travel to a node as files.

A model file gives the result of a federation's training to somebody who did not take part: the tables that are served,
the catalogue, and the options of the method. It holds nothing about any user.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors

from perfedrec.core.algorithm import Received
from perfedrec.core.errors import CheckpointError, ConfigError, reason
from perfedrec.core.inference import InferenceOptions
from perfedrec.core.records import flatten, unflatten
from perfedrec.core.types import NEWCOMER
from perfedrec.data import Catalogue, Encoding
from perfedrec.federation.agreement import build, method_of
from perfedrec.methods.registry import METHODS
from perfedrec.runs.checkpoint import write_atomic
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.result import open_run
from perfedrec.runs.shared_model import SharedModel, open_federation
from perfedrec.runtimes.node import Store, serving_broadcast
from perfedrec.runtimes.simulator import PersonalRecommender

FORMAT = "perfedrec model 2"
FORMATS = ("perfedrec model 1", FORMAT)
"""Formats that can be read; format 1 has other names for some fields (see :func:`perfedrec.core.records.unflatten`)."""

NOBODY = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Model:
    """The content of a model file: the ``broadcast`` that new users receive, the ``run`` and ``round`` that it comes
    from, the ``configuration`` (method and options as TOML), the ``catalogue``, and the options for scores without
    torch (``inference``)."""

    broadcast: Received
    run: str
    round: int
    configuration: str
    catalogue: Catalogue
    inference: InferenceOptions | None

    def give(self, store: Store) -> None:
        """Serve the model on a node. Raises :class:`ConfigError` where the node has another catalogue."""
        store.check_catalogue(self.catalogue)
        store.receive(self.broadcast, NOBODY, self.run, self.round, self.configuration, self.inference)


def export(folder: Path, output: Path, data: str | None = None) -> None:
    """Write the model of a finished run, simulated or of a federation, to a file. ``data`` says where the data of a
    simulated run are now.

    Raises :class:`ConfigError` where the method is centralised or a file of one's own, and where the output cannot be
    written or is another file that exists.
    """
    if output.exists():
        _check_model(output)
    write(shared_model(folder, data), folder.resolve().name, output)


def write(model: SharedModel, name: str, output: Path) -> str:
    """Write a ``model`` to a file. Nodes know it by a ``name`` and a digest of its content, which are returned."""
    catalogue = model.catalogue
    tensors, scalars = flatten(serving_broadcast(model.algorithm, model.state, NOBODY))
    content = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    digest = hashlib.sha256(b"".join(name.encode() + each.numpy().tobytes() for name, each in content.items()))
    run = f"{name}-{digest.hexdigest()[:12]}"
    metadata = {
        "format": FORMAT,
        "run": run,
        "round": str(model.best_round),
        "configuration": method_of(model.config),
        "scalars": json.dumps(scalars),
        "catalogue": json.dumps(catalogue.item_ids.tolist()),
        "encoding": json.dumps(None if catalogue.encoding is None else asdict(catalogue.encoding)),
    }
    try:
        write_atomic(output, dump_tensors(content, metadata))
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({reason(error)})") from None
    return run


def _check_model(path: Path) -> None:
    """Raise :class:`ConfigError` where a file that shall be replaced is no model."""
    try:
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("format") in FORMATS
    except (SafetensorError, OSError):
        known = False
    if not known:
        raise ConfigError(f"{path} exists and is no model; expected a new file, or a model to replace")


def shared_model(folder: Path, data: str | None) -> SharedModel:
    """What a finished run has for users who were not in training. ``data`` says where the data of a simulated run are.

    Raises :class:`ConfigError` where the method is centralised or a file of one's own.
    """
    model = _opened(folder, data)
    if model.config.algorithm not in METHODS:
        raise ConfigError(
            f"{folder}: {model.config.algorithm} does not come with perfedrec, and no node takes code from a file; "
            f"expected the run of one of {', '.join(METHODS)}"
        )
    return model


def _opened(folder: Path, data: str | None) -> SharedModel:
    stored = RunFolder(folder)
    if stored.is_federation:
        return open_federation(stored)
    result, config = open_run(folder, data, "cpu")
    recommender = result.recommender
    if not isinstance(recommender, PersonalRecommender):
        raise ConfigError(f"{folder}: {config.algorithm} is centralised; expected the run of a federated method")
    catalogue = Catalogue.of(result.dataset, config.attributes)
    users = torch.full((result.dataset.n_users,), NEWCOMER)
    return SharedModel(config, recommender.algorithm, recommender.state, catalogue, result.best_round, users)


def read_model(path: Path) -> Model:
    """The model in a file. Raises :class:`CheckpointError` where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in FORMATS:
                raise CheckpointError(f"{path}: not a model file; expected one that perfedrec node export wrote")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        ids = json.loads(metadata["catalogue"])
        whole = all(isinstance(each, int) for each in ids)
        stored = json.loads(metadata.get("encoding", "null"))
        encoding = stored and Encoding(tuple(stored["names"]), tuple((low, high) for low, high in stored["ranges"]))
        algorithm, scalars = build(metadata["configuration"]), json.loads(metadata["scalars"])
        return Model(
            broadcast=unflatten(algorithm.broadcast_type, tensors, scalars),
            run=metadata["run"],
            round=int(metadata["round"]),
            configuration=metadata["configuration"],
            catalogue=Catalogue(np.array(ids, dtype=np.int64 if whole else object), None, encoding),
            inference=algorithm.inference,
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected one that perfedrec node export wrote") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged model file ({reason(error)}); expected one that perfedrec node export wrote"
        ) from None
