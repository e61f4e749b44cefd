"""Options of a run that takes a second, and that uses every part of the method within a few rounds."""

from __future__ import annotations

DATA = "synthetic:users=150,items=200"
SMALL = (
    f"data.path={DATA}",
    "selection.n_clients_per_round=40",
    "clusters.start=2",
    "clusters.every=2",
    "run.evaluate_every=2",
    "run.checkpoint_every=2",
    "model.embedding_dim=8",
)
