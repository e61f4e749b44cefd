#!/bin/sh
# faiss-cpu 1.13.2 (a package without GPU code): k-means that is asked to run on a GPU runs on the processor, without an
# error or a warning, and always with the same seed.
#
# Seen 2026-11-30, with numpy 2.4.6: faiss.Kmeans(d, k, gpu=True) is accepted and its attribute gpu is then 0. Its
# centroids are those of gpu=False, to the last bit, and those of a second run, whatever numpy's seed is: the seed is
# 1234 unless seed= is given. We expected an error, as from torch where CUDA is asked for and is not there.
# Public code of NCL (a graph recommender whose prototypes are such centroids) asks for gpu=True. Who times it takes a
# figure of the processor for one of the GPU, and runs with several seeds do not vary what k-means draws.
#
# Exits with 1 if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check faiss-cpu==1.13.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import faiss
import numpy as np

vectors = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)


def centroids(seed: int, **options: bool) -> tuple[int, np.ndarray]:
    np.random.seed(seed)
    made = faiss.Kmeans(d=8, k=20, **options)
    made.train(vectors)
    return int(made.gpu), made.centroids


asked, on_gpu = centroids(1, gpu=True)
_, on_cpu = centroids(2)
print(f"GPUs that faiss sees: {faiss.get_num_gpus()}, gpu=True became {asked}")
same = np.array_equal(on_gpu, on_cpu)
print("the same centroids with gpu=True and without, with two seeds of numpy:", same)
print("as described" if same and asked == 0 else "changed")
sys.exit(0 if same and asked == 0 else 1)
PYTHON
