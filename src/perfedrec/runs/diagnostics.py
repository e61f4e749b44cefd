"""What a run records beside its metrics: the size of its data, and the geometry of its user and item vectors.

Only a simulation has the vectors of all users in one place. The coordinator of a real federation cannot compute any of
this. Samples are keyed, so that a resumed run records the same as a run without an interruption.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from perfedrec.core.keys import Key
from perfedrec.core.sampling import choose
from perfedrec.core.threads import one_thread
from perfedrec.core.types import block_rows
from perfedrec.data import Dataset
from perfedrec.data.interactions import id_series
from perfedrec.evaluation import Recommender
from perfedrec.nn.losses import alignment, uniformity
from perfedrec.runs.folder import RunFolder

SAMPLED = 2048
"""Users, and items, over which alignment and uniformity are computed."""

MAPPED = 4096
"""Most users on the map."""

FILE, MAP = "diagnostics.json", "user_map.parquet"
"""Names of the files in a run's folder."""


class Diagnostics:
    """The notes of a run, in ``diagnostics.json`` and ``user_map.parquet`` of its folder."""

    def __init__(self, folder: RunFolder, dataset: Dataset, seed: int) -> None:
        self.folder, self.dataset, self.key = folder, dataset, Key(seed).fold("diagnostics")
        self.notes: dict[str, Any] = {
            "data": {
                "name": dataset.name,
                "users": dataset.n_users,
                "items": dataset.n_items,
                **{part: int(getattr(dataset, part).items.size) for part in ("train", "valid", "test")},
            },
            "geometry": {},
            "map": None,
        }

    def resume(self) -> None:
        """Continue with the notes that were made before the run was interrupted."""
        self.notes["geometry"] = (read_diagnostics(self.folder.path) or {}).get("geometry", {})

    def note(self, moment: str, training_round: int, recommender: Recommender) -> None:
        """Record the geometry at a moment: ``start``, ``pretrained`` or ``best``."""
        found = geometry(recommender, self.key)
        if found is not None:
            self.notes["geometry"][moment] = {"round": training_round, **found}
        self._write()

    def draw_map(self, recommender: Recommender) -> None:
        """Write the places of users in the plane of the first two principal components."""
        train = self.dataset.train
        users = choose(train.n_users, MAPPED, self.key.fold("map")).sort().values.to(recommender.device)
        users = users[~torch.isin(users, users.new_tensor(self.dataset.forgotten))]
        found = recommender.embedding(users)
        if found is None or users.numel() < 2:
            return
        places, shares = principal(normalize(found.users, dim=1))
        index = users.cpu().numpy()
        columns = {"user": id_series(train.user_ids)[index], "interactions": np.diff(train.offsets)[index]}
        columns |= {"x": places[:, 0].numpy(), "y": places[:, 1].numpy()}
        groups = None if found.groups is None else found.groups.cpu().numpy()
        frame = pl.DataFrame(columns | {"cluster": pl.Series(groups, dtype=pl.Int64) if groups is not None else None})
        content = io.BytesIO()
        frame.with_columns(pl.col("cluster").cast(pl.Int64)).write_parquet(content)
        self.folder.write(MAP, content.getvalue())
        self.notes["map"] = {"users": users.numel(), "explained": shares}
        self._write()

    def _write(self) -> None:
        self.folder.write(FILE, json.dumps(self.notes, indent=1).encode())


def read_diagnostics(folder: Path) -> dict[str, Any] | None:
    """The notes of the run in a folder, ``None`` where it has none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def geometry(recommender: Recommender, key: Key) -> dict[str, float] | None:
    """Alignment and uniformity (Wang and Isola, ICML 2020) of unit vectors, ``None`` where there are no vectors.

    Alignment is the mean squared distance between a user and an item of its training data, over all such pairs of
    sampled users: 0 at best, 2 where the two are unrelated. Uniformity is ``log mean exp(-2 ||x - y||^2)`` over pairs
    of sampled users, and over pairs of sampled items: about -4 at best, 0 where all vectors are equal.
    """
    n_users, device = recommender.offsets.numel() - 1, recommender.device
    users = choose(n_users, SAMPLED, key.fold("users")).to(device)
    items = choose(recommender.n_items, SAMPLED, key.fold("items")).to(device)
    found = recommender.embedding(users)
    if found is None or min(users.numel(), items.numel()) < 2:
        return None
    rows, _ = block_rows(recommender.offsets, recommender.items, users)
    own, theirs = normalize(found.users, dim=1), normalize(found.items, dim=1)
    return {
        "alignment": float(alignment(own[rows.segments], theirs[rows.items])),
        "uniformity_users": float(uniformity(own)),
        "uniformity_items": float(uniformity(theirs[items])),
    }


def principal(vectors: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components of ``vectors`` [n, d]: the coordinates [n, 2], and the share of the variance
    on each axis.

    Signs are chosen so that the largest coordinate of each axis is positive.
    """
    centred = (vectors - vectors.mean(0)).to("cpu", torch.float64)
    with one_thread():
        values, axes = torch.linalg.eigh(centred.T @ centred)
    values, axes = values.flip(0).clamp(min=0), axes.flip(1)[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    places = torch.nn.functional.pad(centred @ axes, (0, 2 - axes.shape[1])).to(torch.float32)
    shares = (values / values.sum().clamp(min=1e-30)).tolist()[:2]
    return places, shares + [0.0] * (2 - len(shares))
