"""Time LightGCN's public PyTorch code, and train it. It runs in a virtual environment of its own, and is called by
benchmarks/peers.py.

    python lightgcn_pytorch.py FOLDER DATA.npz --batches 5 --epochs 0 --output vectors.npz

FOLDER has a copy of the folder ``code`` of that project; data sets are written beside it as the code wants them. The
file has ``users`` and ``items``, one of each per interaction, and ``shape``. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

OPTIONS = ("--dataset", "gowalla", "--tensorboard", "0", "--seed", "0")  # the name of a folder, whatever is in it


def write(folder: Path, users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> None:
    """Write the data in the code's format. Its loader needs one item of each user to test with, which is not used, and
    takes minutes for the normalised matrix unless the file is there."""
    folder.mkdir(parents=True)
    owned: list[list[int]] = [[] for _ in range(shape[0])]
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        owned[user].append(item)
    lines = [" ".join(map(str, (user, *own))) for user, own in enumerate(owned) if own]
    (folder / "train.txt").write_text("\n".join(lines))
    tests = [f"{user} {shape[1] - 1}" for user in range(shape[0])]  # also says how many users and items there are
    (folder / "test.txt").write_text("\n".join(tests))
    matrix = sparse.csr_matrix((np.ones(users.size, np.float32), (users, items)), shape=shape)
    both = sparse.bmat([[None, matrix], [matrix.T, None]], format="csr")
    degrees = np.asarray(both.sum(1)).squeeze()
    scale = sparse.diags(np.where(degrees > 0, degrees.clip(min=1) ** -0.5, 0).astype(np.float32))
    sparse.save_npz(folder / "s_pre_adj_mat.npz", (scale @ both @ scale).tocsr().astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--l2", type=float, required=True)
    parser.add_argument("--batches", type=int, required=True, help="batches to time")
    parser.add_argument("--epochs", type=int, required=True, help="epochs to train for")
    parser.add_argument("--output", required=True, help="file for the final vectors")
    given = parser.parse_args()
    with np.load(given.data) as stored:
        users, items, shape = stored["users"], stored["items"], tuple(stored["shape"].tolist())
    write(given.folder / "data" / "gowalla", users, items, shape)
    own = ["--layer", given.layers, "--recdim", given.dim, "--bpr_batch", given.batch_size]
    own += ["--lr", given.learning_rate, "--decay", given.l2]
    sys.argv = ["main.py", *OPTIONS, *map(str, own)]
    os.chdir(given.folder / "code")
    sys.path.insert(0, str(Path.cwd()))
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(given.batches, given.epochs, given.output)
    print(json.dumps(result))


def measure(batches: int, epochs: int, output: str) -> dict[str, Any]:
    """Time ``batches`` after one that warms up, then train a new model for ``epochs`` and store its vectors."""
    import torch

    torch.set_num_threads(1)
    import Procedure
    import register
    import utils
    import world

    utils.set_seed(world.seed)

    def new() -> tuple[Any, Any]:
        model = register.MODELS[world.model_name](world.config, register.dataset)
        return model, utils.BPRLoss(model, world.config)

    _, loss = new()
    size, seconds = world.config["bpr_batch_size"], []
    triples = torch.from_numpy(np.asarray(utils.UniformSample_original(register.dataset))).long()
    order = torch.randperm(len(triples))
    for part in order.split(size)[: batches + 1]:
        start = time.process_time()
        loss.stageOne(*triples[part].T)
        seconds.append(time.process_time() - start)
    model, loss = new()
    for epoch in range(epochs):
        Procedure.BPR_train_original(register.dataset, model, loss, epoch)
    with torch.no_grad():
        model.eval()
        vectors = [each.numpy() for each in model.computer()]
    np.savez(output, users=vectors[0], items=vectors[1])
    return {
        "seconds_a_batch": float(np.median(seconds[1:] or seconds)),
        "batches_an_epoch": -(-len(register.dataset.trainUser) // size),
    }


if __name__ == "__main__":
    main()
