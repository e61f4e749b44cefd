#!/usr/bin/env bash
# LensKit 2025.8.1, `RunAnalysis.measure(lists, test)` with `NDCG` and `Recall`. Three things differ from what most
# papers and libraries compute, and none of them is an error message:
#
# - A hit in place 2 counts as much as one in place 1: the discount is max(log2(place), 1), not log2(place + 1). A list
#   whose only hit is in place 2 has NDCG 1.
# - A user who has a list and no test data counts as 0 in the mean; one line of the log has the number of such lists.
#   Expected was that this user is left out, because nothing can be hit.
# - A user who has test data and no list is left out of the mean. Expected was 0, or an error.
#
# Seen 2026-11-29: means of NDCG@3 and Recall@3 of .4050 and .4167; by the usual definition, over the users with test
# data, .3337 and .4167 (the same Recall by chance: the one user who is left out has 0, like the one who is added).
#
# Why it matters here: lists that perfedrec wrote get other figures there than in its own report, even where the users
# are the same. docs/runs.md says what to do.
#
# Exits with 1 if this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lenskit==2025.8.1 numpy==2.4.6 pandas==2.3.3
"$folder/venv/bin/python" - << 'PYTHON'
import math

import pandas as pd
from lenskit.data import ItemListCollection
from lenskit.metrics import NDCG, Recall, RunAnalysis

test = {"ann": ["b"], "ben": ["a", "c", "d"], "cem": ["a"], "eva": ["z"]}  # cem has no list
lists = {"ann": ["a", "b", "c"], "ben": ["a", "b", "c"], "dan": ["a", "b"], "eva": ["a"]}  # dan has no test data


def frame(items_of):
    rows = [(user, item, place) for user, items in items_of.items() for place, item in enumerate(items, 1)]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "rank"])


def usual(user):
    hits = [place for place, item in enumerate(lists.get(user, []), 1) if item in test[user]]
    best = sum(1 / math.log2(place + 1) for place in range(1, 1 + min(3, len(test[user]))))
    return sum(1 / math.log2(place + 1) for place in hits) / best


ours = ItemListCollection.from_df(frame(lists), ["user_id"])
held_out = ItemListCollection.from_df(frame(test)[["user_id", "item_id"]], ["user_id"])
found = RunAnalysis(NDCG(3), Recall(3)).measure(ours, held_out)
print(found.list_metrics().round(4), found.list_summary().round(4), sep="\n\n")
print("usual NDCG@3:", {user: round(usual(user), 4) for user in test})
per_user = found.list_metrics()["NDCG@3"].to_dict()
assert per_user["ann"] == 1.0 and usual("ann") < 0.64, "a hit in place 2 is discounted now"
assert per_user["dan"] == 0.0, "a user without test data is left out now"
assert "cem" not in per_user, "a user without a list counts now"
PYTHON
