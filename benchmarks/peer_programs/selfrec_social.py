"""Train a social model of the public SELFRec and time its epochs. It runs in a virtual environment of its own, and is
called by benchmarks/peers.py.

    python selfrec_social.py CHECKOUT DATA.npz --model SEPT --epochs 5 [--every 1] [--seed 0] [--learning-rate 0.001]

As selfrec.py, whose file it takes, with ``sources`` and ``targets`` as well: one of each per relation between users.
The public code is written for TensorFlow 1. It runs unchanged with what TensorFlow 2 still has of that,
``tensorflow.compat.v1`` without eager execution. One part is no longer there, ``contrib``, of which the code takes
Xavier's initialiser: Glorot's uniform one is the same under its other name.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from selfrec import configuration, main, observed, recommender


def measure(code: Path, data: dict[str, np.ndarray], given: argparse.Namespace) -> dict[str, Any]:
    os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    import tensorflow.compat.v1 as first

    first.disable_v2_behavior()
    first.contrib = SimpleNamespace(layers=SimpleNamespace(xavier_initializer=first.glorot_uniform_initializer))
    sys.modules["tensorflow"] = first
    first.set_random_seed(given.seed)
    pairs = zip(data["sources"], data["targets"], strict=True)
    relations = [[str(source), str(target), 1] for source, target in pairs]
    conf = configuration(code, given)
    return observed(recommender(conf, data, given, **{"social.data": relations}), data, given)


if __name__ == "__main__":
    main(__doc__, measure)
