"""Measure what a choice of the start of training could gain: the kind of pre-training, and the number of passes.

    PERFEDREC_TEST_DATA=FOLDER python benchmarks/starts.py [--only lastfm ...] [--seeds 0 1 2] [--rounds 150]

Preset ``recommended`` is trained on each data set from each start. Each run has the round that is best on validation
data, and is ranked on the test split once. One JSON line for each run has the validation figures of the best round and
after each round before training, their standard error over users, and the test figures. The best start by validation
is the most that a choice by held-out items could find.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from perfedrec import load, train

DATA = {"synthetic": "synthetic", "ml-100k": "ml-100k/u.data", "lastfm": "lastfm", "yelp": "yelp"}
METRICS = ("recall@20", "ndcg@20")
PASSES = (4, 8, 12, 16, 24)
STARTS: dict[str, dict[str, Any]] = {f"{passes} passes": {"pretraining__passes": passes} for passes in PASSES} | {
    "none": {"pretraining__kind": "none", "personal__pretrained": 0.0},
    "contrastive": {"pretraining__kind": "contrastive", "pretraining__steps": 100, "personal__pretrained": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*DATA], default=[*DATA], help="data sets")
    parser.add_argument("--starts", nargs="+", choices=[*STARTS], default=[*STARTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--every", type=int, default=25, help="rounds between two evaluations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["PERFEDREC_TEST_DATA"])
    for name in args.only:
        dataset = load(DATA[name] if name == "synthetic" else folder / DATA[name])
        for start in args.starts:
            for seed in args.seeds:
                began, run = time.process_time(), {"rounds": args.rounds, "evaluate_every": args.every, "seed": seed}
                result = train("perfedrec_pp", dataset, **run, **STARTS[start])
                users = torch.cat([values["recall@20"] for _, values in result.rank("valid").cases]).to(torch.float64)
                phases = [each for each in result.history if each.report.loss is None and each.valid is not None]
                tested = result.evaluate()
                line = {
                    "data": name,
                    "start": start,
                    "seed": seed,
                    "rounds": args.rounds,
                    "best round": result.best_round,
                    "valid": [round(result.valid[each], 4) for each in METRICS],
                    "standard error": round(float(users.std() / users.numel() ** 0.5), 4),
                    "test": [round(tested[each], 4) for each in METRICS],
                    "before training": [[round(each.valid[m], 4) for m in METRICS] for each in phases if each.valid],
                    "processor_seconds": round(time.process_time() - began),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
