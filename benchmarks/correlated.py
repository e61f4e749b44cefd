"""Measure what correlated noise gains over independent noise, and whether training after pre-training then pays.

    python benchmarks/correlated.py [--data FOLDER] [--threads 1]

The analysis computes the root mean square error of the prefix sums of releases, which an optimiser accumulates, at
equal epsilon against the coordinator. It uses banded Toeplitz square-root factors (Fichtenberger, Henzinger and
Upadhyay, ICML 2023), with a user's participations as far apart as possible. With ``--data`` the experiment follows:
rounds of training after private pre-training, in which the gain is given for free, as less noise. Each result is one
JSON line.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from scipy.linalg import toeplitz

from perfedrec import configure, load, train

RELEASES = ((3, 3), (10, 10), (10, 2), (50, 10), (200, 10), (200, 50))
TRAINING = (
    "model.embedding_dim=8",
    "client.loss=softmax",
    "client.similarity=inner",
    "client.leave_one_out=true",
    "client.learning_rate=0.1",
    "client.temperature=0.02",
    "server.optimizer=fedavg",
    "server.averaging=0",
    "privacy.clip=0.01",
    "run.evaluate_every=1",
    "run.rounds=10",
    "selection.n_clients_per_round=1000",
    "selection.max_participations=2",
)


def error(releases: int, participations: int, band: int) -> float:
    """Root mean square error of prefix sums per unit of noise; a factor with ``band`` bands (1: independent noise)."""
    factor = np.ones(releases)
    for place in range(1, releases):
        factor[place] = factor[place - 1] * (2 * place - 1) / (2 * place)
    factor[band:] = 0
    encoder = np.tril(toeplitz(factor))
    apart = max(releases // participations, 1)
    sensitivity = np.linalg.norm(encoder[:, : apart * participations : apart].sum(1))
    decoder = np.tril(np.ones((releases, releases))) @ np.linalg.inv(encoder)
    return float(np.sqrt((decoder**2).sum(1).mean()) * sensitivity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--threads", type=int, default=1, help="threads of the numerical library")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for releases, participations in RELEASES:
        bands = sorted({1, 2, 3, 4, 5, max(releases // participations, 1), releases} & set(range(1, releases + 1)))
        errors = {band: error(releases, participations, band) for band in bands}
        best = min(errors, key=errors.__getitem__)
        gain = round(errors[1] / errors[best], 2)
        print(json.dumps({"releases": releases, "participations": participations, "band": best, "gain": gain}))
    if args.data is None:
        return
    dataset = load(args.data)
    solved = configure("recommended", overrides=TRAINING, privacy="private").build().settings.privacy.noise
    for rate in (100, 1000):
        for gain in (1.0, 1.42, 3.0):
            noise = {"degrees": solved.degrees, "spectral": solved.spectral, "training": solved.training / gain}
            given = [f"privacy.noise.{name}={value}" for name, value in noise.items()]
            overrides = [*TRAINING, "privacy.epsilon=off", *given, f"server.learning_rate={rate}"]
            config = configure("recommended", overrides=overrides, privacy="private")
            history = train(config.build(), dataset, config.run).history
            valid = [round(entry.valid["ndcg@20"], 4) for entry in history[3:] if entry.valid is not None]
            print(json.dumps({"server_step": rate, "gain": gain, "valid_ndcg@20": valid}), flush=True)


if __name__ == "__main__":
    main()
