#!/usr/bin/env bash
# recommenders 1.2.1 (recommenders.evaluation.python_evaluation): where a user with test data has no list, the metrics
# of one call to each function are means over different users. `recall_at_k` and `precision_at_k` leave the user out,
# `ndcg_at_k` counts the user as 0. Expected was one rule for all of them.
#
# And lists that already have a column `rank` (as perfedrec and others write them) end in KeyError: 'rank', because the
# functions add a column of that name and pandas renames both.
#
# Why it matters here: a table of Recall and NDCG made there from lists of perfedrec mixes two populations as soon as one
# user has no list. docs/runs.md says what to do.
#
# Seen 2026-11-29: four users, one without a list: NDCG@3 .3337 (a mean of 4), Recall@3 .5556 (a mean of 3; .4167 over 4).
#
# Exits with 1 if this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet recommenders==1.2.1 numpy==1.26.4 pandas==2.3.3
"$folder/venv/bin/python" - << 'PYTHON'
import warnings

import pandas as pd

warnings.filterwarnings("ignore")
from recommenders.evaluation.python_evaluation import ndcg_at_k, recall_at_k

test = [("ann", "b"), ("ben", "a"), ("ben", "c"), ("ben", "d"), ("cem", "a"), ("eva", "z")]  # cem has no list
lists = {"ann": "abc", "ben": "abc", "eva": "a"}
truth = pd.DataFrame(test, columns=["user", "item"]).assign(rating=1.0)
rows = [(user, item, place, -float(place)) for user, items in lists.items() for place, item in enumerate(items, 1)]
found = pd.DataFrame(rows, columns=["user", "item", "rank", "score"])
names = {"col_user": "user", "col_item": "item", "col_rating": "rating", "col_prediction": "score", "k": 3}
ndcg = ndcg_at_k(truth, found.drop(columns="rank"), **names)
recall = recall_at_k(truth, found.drop(columns="rank"), **names)
print(f"NDCG@3 {ndcg:.4f}, Recall@3 {recall:.4f}")
assert round(ndcg, 4) == 0.3337, "NDCG is a mean over other users now"
assert round(recall, 4) == 0.5556, "Recall is a mean over other users now"
try:
    ndcg_at_k(truth, found, **names)
    raise SystemExit("lists with a column rank are accepted now")
except KeyError as error:
    print(f"with a column rank: KeyError {error}")
PYTHON
