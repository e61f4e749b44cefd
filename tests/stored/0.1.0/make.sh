#!/bin/bash
# How the files in this folder were made: a record, which no test runs. BASE is a clone of perfedrec 0.1.0 (git commit
# 721e982), PYTHON a Python with its dependencies, WORK a new folder outside, where federations are played. Steps: data
# runs models node federation studies clean expected, in this order; without an argument all of them. Secrets and run
# names of nodes are random, so that node/, coordinator/ and service/ (and what expected.json says of them) are
# different each time.
set -euo pipefail
: "${BASE:?a clone of commit 721e982}" "${PYTHON:?a Python}" "${WORK:?a new folder}"
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$BASE/src OMP_NUM_THREADS=1 COLUMNS=120
old() { "$PYTHON" -m perfedrec "$@"; }
cd "$HERE"
mkdir -p "$WORK"
DATA=synthetic:users=24,items=20,clusters=2,interactions_per_user=5,seed=2
COMMON=(--set run.checkpoint_every=2 --set run.evaluate_every=1 --set run.threads=1 --set run.device=cpu
  --set run.select_by=ndcg@10 --quiet)
SMALL=(--set model.embedding_dim=4 --set selection.n_clients_per_round=12)
CLUSTERS=(--set clusters.n_clusters=2 --set clusters.start=1 --set clusters.stop=20 --set clusters.every=2)

# train NAME OPTION...: a run with the first seed with which round 2 or a later one of training is its best, so that the
# stored model has been trained. Of its two checkpoints the first one is kept, after 2 rounds of training; with TABLES=1
# test_users.parquet is kept as well. The rest is removed to save space.
train() {
  local name=$1 seed best
  shift
  for seed in $(seq 1 12); do
    rm -rf "runs/$name"
    old train --output "runs/$name" --data $DATA "$@" "${COMMON[@]}" --seed "$seed" > /dev/null
    best=$("$PYTHON" -c "import json; print(json.load(open('runs/$name/result.json'))['best_round'])")
    [ "$best" -ge 2 ] && break
  done
  echo "$name: seed $seed, best round $best"
  rm -rf "$(ls -d runs/$name/checkpoints/* | sed 1d)" runs/$name/user_map.parquet
  [ -n "${TABLES:-}" ] || rm -f runs/$name/test_users.parquet
}

runs() {
  rm -rf runs
  # paper without privacy: contrastive pre-training, service (graph, reports, start), labels, neighbours
  train pp-paper --algorithm perfedrec_pp --preset paper --privacy none --rounds 3 "${SMALL[@]}" "${CLUSTERS[@]}" \
    --set pretraining.steps=3 --set model.refresh_every=2
  # secure sums, spectral pre-training, neighbours, clusters: fields lift, tally, shares, gathered, sent, pretrained
  TABLES=1 train pp-secure --algorithm perfedrec_pp --preset recommended --privacy secure --rounds 3 "${SMALL[@]}" \
    "${CLUSTERS[@]}" --set model.refresh_every=2
  # the same with the encoder "spectral"
  train pp-secure-spectral --algorithm perfedrec_pp --preset recommended --privacy secure --rounds 3 "${SMALL[@]}" \
    "${CLUSTERS[@]}" --set model.encoder=spectral
  # recommended, in the clear; a pass that fills clusters, a learned mixture
  train pp-recommended --algorithm perfedrec_pp --preset recommended --rounds 4 "${SMALL[@]}" "${CLUSTERS[@]}" \
    --set pretraining.cluster_passes=1 --set personal.learned=true --set personal.local=0.2
  # most clients drop out: given_up
  train perfedrec-given-up --algorithm perfedrec --privacy secure --rounds 4 "${SMALL[@]}" "${CLUSTERS[@]}" \
    --dropout-rate 0.85
  # attributes, from files (a relative path: run it in this folder): fields dense, item_attributes
  DATA=data/ratings.csv train pp-attributes --algorithm perfedrec_pp --preset recommended --rounds 3 "${SMALL[@]}" \
    "${CLUSTERS[@]}" --set model.attributes=true
  train fedncf --algorithm fedncf --preset fedncf --rounds 3 "${SMALL[@]}"
  train gpfedrec --algorithm gpfedrec --preset gpfedrec --rounds 4 "${SMALL[@]}" --set graph.n_landmarks=3 \
    --set graph.every=1
  train lightgcn --algorithm lightgcn --preset lightgcn --rounds 3 --set method.embedding_dim=4
  # FedMF was a PerFedRec without clusters and neighbours; under secure sums it had a phase "degrees"
  train fedmf --algorithm fedmf --preset fedmf --rounds 3 "${SMALL[@]}"
  train fedmf-secure --algorithm fedmf --preset fedmf --privacy secure --rounds 3 "${SMALL[@]}"
}

data() {
  rm -rf data
  "$PYTHON" - <<'PY'
import random
from pathlib import Path
random.seed(5)
folder = Path("data"); folder.mkdir()
lines = ["user,item,timestamp"]
for user in range(24):
    own = [item for item in range(20) if item % 2 == user % 2]
    for place, item in enumerate(random.sample(own, 4) + [random.randrange(0, 20, 2) + 1 - user % 2]):
        lines.append(f"u{user:02},i{item:02},{1000 + 10 * user + place}")
(folder / "ratings.csv").write_text("\n".join(lines) + "\n")
(folder / "item_attributes.csv").write_text("item,kind,price\n" + "".join(
    f"i{item:02},{'odd' if item % 2 else 'even'},{item}\n" for item in range(20)))
(folder / "user_attributes.csv").write_text("user,group,age\n" + "".join(
    f"u{user:02},{'abc'[user % 3]},{20 + user}\n" for user in range(24)))
(folder / "mine.csv").write_text("user,item,timestamp\nann,3,1\nann,5,2\nann,7,3\nbob,2,1\nbob,4,2\nbob,8,3\nbob,10,4\n")
(folder / "items.txt").write_text("".join(f"{item}\n" for item in range(20)))
PY
}

models() {
  rm -rf models
  mkdir models
  for name in pp-secure pp-paper fedncf pp-attributes; do
    old node export --run runs/$name --output models/$name.safetensors
  done
}

node() {
  rm -rf node
  mkdir -p node
  # A node that took part in no training, with a model from a file. The catalogue is the model's: 19 items, whole numbers.
  old node init --store node/newcomer.node --model models/pp-secure.safetensors
  old node import data/mine.csv --store node/newcomer.node --skip-unknown
  old node add eve 11 14 --store node/newcomer.node
  closed node/newcomer.node
}

# closed STORE [MODE]: empty its log, so that the file alone is the store.
closed() {
  "$PYTHON" - "$1" "${2:-WAL}" <<'PY'
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
# Smaller pages make a smaller file, and nothing else.
for line in ("journal_mode = DELETE", "page_size = 512"):
    db.execute(f"PRAGMA {line}")
db.execute("VACUUM")
db.execute(f"PRAGMA journal_mode = {sys.argv[2]}")
db.close()
PY
  rm -f "$1-wal" "$1-shm"
}

# coordinator TARGET SOURCE: a coordinator's run without its SuperLink, keys and certificates, and the catalogue beside it.
# The newest checkpoint is kept.
coordinator() {
  mkdir -p "$(dirname "$1")"
  cp -r "$2/run" "$1"
  rm -rf "$1"/{superlink,environment.json,result.json} "$(ls -d "$1"/checkpoints/* | head -1)"
  cp "$2/items.txt" "$(dirname "$1")/items.txt"
}

federation() {
  rm -rf coordinator service node/{secure,paper,home}.node* "$WORK"/secure "$WORK"/paper "$WORK"/fedmf
  mkdir -p node
  local small=(--nodes 3 --data $DATA --rounds 2 --preset recommended --set model.embedding_dim=4
    --set selection.n_clients_per_round=12 --set clusters.n_clusters=2 --set clusters.start=1 --set clusters.every=2
    --set clusters.stop=20 --set model.refresh_every=2 --set run.seed=1 --set pretraining.passes=2)
  old federation up "${small[@]}" --output "$WORK"/secure
  old federation up "${small[@]}" --privacy paper --set privacy.noise_source=simulation --output "$WORK"/paper
  for name in secure paper; do
    cp "$WORK"/$name/nodes/n0/store.db* node/
    for each in node/store.db*; do mv "$each" "node/$name.node${each#node/store.db}"; done
    closed node/$name.node
    coordinator coordinator/$name/run "$WORK"/$name
  done
  old federation up --nodes 3 --data $DATA --rounds 2 --preset fedmf --privacy secure --set model.embedding_dim=4 \
    --set selection.n_clients_per_round=12 --set run.seed=1 --output "$WORK"/fedmf
  coordinator coordinator/fedmf/run "$WORK"/fedmf
  # Another node of the first federation, with client states of that run, new users, and a model from a file.
  cp "$WORK"/secure/nodes/n1/store.db node/home.node
  old node import data/mine.csv --store node/home.node --skip-unknown
  old node receive --store node/home.node --model models/pp-secure.safetensors
  closed node/home.node
  cp -r "$WORK"/paper/service service
  rm -rf service/log.txt "$(ls -d service/run-*/* | head -1)"
}

studies() {
  rm -rf bench bench.toml tune
  cat > bench.toml <<TOML
seeds = [0]
metric = "ndcg@10"
reference = "fedmf"
target = { metric = "recall@10", value = 0.1 }

[data.tiny]
path = "$DATA"

[common]
set = ["run.device=cpu", "run.threads=1", "run.evaluate_every=1", "run.select_by=ndcg@10"]

[methods.fedmf]
set = ["run.rounds=2", "model.embedding_dim=4", "selection.n_clients_per_round=12"]

[methods.lightgcn]
set = ["run.rounds=2", "method.embedding_dim=4"]
TOML
  old bench bench.toml --output bench --processes 1
  rm -rf bench/runs/*/*/*/{checkpoints,user_map.parquet} bench/{bench.toml,table.*}  # to save space
  old tune --data $DATA --algorithm fedmf --trials 2 --rounds 2 --seed 1 --output tune --set model.embedding_dim=4 \
    --set selection.n_clients_per_round=12 --set run.device=cpu --set run.threads=1 --set run.evaluate_every=1 \
    --set run.select_by=ndcg@10
  closed tune/study.db DELETE
}

# No traces of this machine.
clean() {
  find . -name environment.json -exec "$PYTHON" -c '
import json, sys
for path in sys.argv[1:]:
    found = json.load(open(path)) | {"platform": "some platform", "cpus": 2}
    open(path, "w").write(json.dumps(found, indent=1))
' {} +
  "$PYTHON" - "$(hostname)" <<'PY'
import sqlite3, sys
db = sqlite3.connect("tune/study.db")
db.execute("UPDATE trial_user_attributes SET value_json = replace(value_json, ?, 'somewhere')", (sys.argv[1],))
db.commit()
db.execute("VACUUM")
PY
  rm -f bench/.lock tune/.lock
  rm -f data/mine.csv data/items.txt
  find . -type d -empty -delete
  ! grep -rlaE "$HERE|$WORK|$BASE|$(hostname)" . || echo "paths or the host name are in these files"
}

expected() {
  "$PYTHON" ../questions.py . > "$WORK"/expected.json
  mv "$WORK"/expected.json expected.json
}

if [ $# = 0 ]; then set -- data runs models node federation studies clean expected; fi
for step in "$@"; do $step; done
