"""Time an epoch of a sequential model of SELFRec on the processor. It runs in a virtual environment of its own, and is
called by benchmarks/peers.py.

    python selfrec_sequences.py CHECKOUT SASRec train.txt --dim 64 --epochs 3 ...

The file has a line ``user:item item ...`` for each user. The code asks for a GPU where it trains; here it stays on the
processor. It is not evaluated. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODELS: dict[str, dict[str, Any]] = {
    "SASRec": {},
    "BERT4Rec": {"mask_rate": 0.5},
    "CL4SRec": {"aug_type": 0, "aug_rate": 0.5, "cl_rate": 0.05},
}
"""The options that a model has beside those of all, as the project's own configuration has them."""


class Configuration(dict[str, Any]):
    """Options as the code asks for them."""

    @property
    def config(self) -> dict[str, Any]:
        return self

    def contain(self, key: str) -> bool:
        return key in self


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Processor seconds an epoch: the median after one epoch that warms up."""
    for each in (torch.Tensor, torch.nn.Module):
        each.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that the code draws from
    torch.manual_seed(0)
    own = {"n_blocks": given.blocks, "n_heads": given.heads, "drop_rate": given.dropout, **MODELS[given.model]}
    options = {"training.set": str(given.data), "test.set": str(given.data), "output": "results/", given.model: own}
    options |= {"model": {"name": given.model, "type": "sequential"}, "item.ranking.topN": [10, 20]}
    options |= {"embedding.size": given.dim, "max.len": given.length, "max.epoch": given.epochs + 1}
    options |= {"batch.size": given.batch_size, "learning.rate": 0.001, "reg.lambda": 0.0001}
    sequences = importlib.import_module("data.loader").FileIO.load_data_set(given.data, "sequential")
    kind, stamps = getattr(importlib.import_module(f"model.sequential.{given.model}"), given.model), []
    kind.fast_evaluation = lambda self, epoch: stamps.append(time.process_time())
    kind(Configuration(options), sequences, sequences).train()
    return {"seconds_an_epoch": statistics.median(b - a for a, b in pairwise(stamps))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("data", type=Path)
    for option in ("dim", "length", "blocks", "heads", "batch-size", "epochs"):
        parser.add_argument(f"--{option}", type=int, required=True)
    parser.add_argument("--dropout", type=float, required=True)
    given = parser.parse_args()
    given.data = given.data.absolute()
    sys.path.insert(0, str(given.checkout.absolute()))
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        os.chdir(scratch)  # the code writes logs where it runs
        result = measure(given)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
