#!/usr/bin/env bash
# Ray 2.55.1: a cluster of several raylets on one machine (ray.cluster_utils.Cluster, which tests of distributed programs
# use) cannot be started where Ray has never run. Its first node is given a temporary folder of its own (temp_dir=...) and
# starts in it; then the cluster's address is written to the default folder all the same, which nobody makes. Expected was
# that the folder that was named is used, or that the default one is made.
#
# Why it matters here: the tests of workers pass on every machine where some program has used Ray before, and fail on a
# fresh one. perfedrec's tests make the folder themselves (tests/runtimes/test_ray.py).
#
# Seen 2026-11-30: FileNotFoundError for ray/ray_current_cluster in the default folder; with that folder the node starts.
#
# Exits with 1 if this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.55.1
mkdir "$folder/d" "$folder/own"
RAY_TMPDIR="$folder/d" "$folder/venv/bin/python" - "$folder/d/ray" "$folder/own" << 'PYTHON'
import os
import sys

import ray
from ray.cluster_utils import Cluster

default, own = sys.argv[1:]


def starts():
    cluster = Cluster(shutdown_at_exit=True)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20, temp_dir=own, include_dashboard=False)
        return "starts"
    except FileNotFoundError as error:
        return f"FileNotFoundError: {os.path.relpath(error.filename, os.path.dirname(default))}"
    finally:
        cluster.shutdown()


before = starts()
os.makedirs(default, exist_ok=True)
after = starts()
print(f"ray {ray.__version__}: without the default folder: {before}; with it: {after}")
assert before == "FileNotFoundError: ray/ray_current_cluster", "the default folder is made or not needed now"
assert after == "starts", "a node does not start"
PYTHON
