"""Measure other projects beside ours, in turn and on the same data; print one JSON line per comparison.

    python benchmarks/peers.py --data FOLDER [--only implicit lightgcn selfrec social flower sequences]
        [--lightgcn CHECKOUT] [--selfrec CHECKOUT] [--relations FILE] [--venvs FOLDER]

Each peer is installed, with pinned versions, into a virtual environment of its own below --venvs, and stays there for
the next time. A peer that cannot be had or does not run is named in one line, and the others follow.

- implicit: samples a second of BPR, one thread each, in processor time. Ours is the method mf, with SGD and with Adam.
  With --epochs also the best validation recall@20 within these epochs, by learning rate, and how many samples and
  seconds the best options of each kind need until all have the same.
- lightgcn: seconds an epoch of the public PyTorch code, one thread each, in processor time, with the same options; and
  the test accuracy of both after the same number of epochs (--epochs, with --accuracy-data).
- selfrec: seconds an epoch of the graph models of the public SELFRec (--models), one thread each, in processor time,
  with its options, which are those of its configuration, length 64, batches of 2048, first vectors by its rule,
  --learning-rate, and --gamma for DirectAU.
  With --epochs also the accuracy on the same split within these epochs, of which every --every-th is evaluated: of the
  epoch that the test would choose, as that code does, and of the one that validation chooses, for all --seeds.
- social: the same of SEPT and MHCN in SELFRec, which need TensorFlow. The data need relations (--relations). An epoch
  of SEPT is timed with its contrast, which begins after the first third of the epochs there, and for its accuracy here
  as well. Its losses are sums and ours are means: our weights are such that the proportions are the same.
- flower: seconds a round of federated matrix factorisation with one client a user, in a simulation of Flower. Ours is a
  round of fedmf. By the clock, because Flower works in several processes.
- sequences: seconds an epoch of SASRec, BERT4Rec and CL4SRec in SELFRec, one thread each, in processor time, with
  the same options. The data need times or an order.

A ratio above 1 means that ours is faster: the median over --turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perfedrec import Dataset, configure, load
from perfedrec.core.errors import DataError
from perfedrec.core.keys import Key, uniform
from perfedrec.evaluation import Held, RandomOrder
from perfedrec.methods.centralised.descent import descend
from perfedrec.methods.centralised.lightgcn import LightGCN, LightGCNSettings
from perfedrec.methods.centralised.method import Method, Training
from perfedrec.methods.centralised.mf import MF, MFSettings
from perfedrec.methods.centralised.vectors import Vectors, batches
from perfedrec.methods.registry import METHODS, TITLES
from perfedrec.runs.engine import CentralRecommender
from perfedrec.runtimes.simulator import Simulator

PROGRAMS = Path(__file__).parent / "peer_programs"
LIGHTGCN = "https://github.com/gusye1234/LightGCN-PyTorch", "947ca2b3b1d2d3545b114145710cb06c4e57b3d2"
SELFREC = "https://github.com/Coder-Yu/SELFRec", "5b0229423cb1c727e85a704d63e460368c8b9dde"
MODELS = {
    "MF": "mf",
    "LightGCN": "lightgcn",
    "SGL": "sgl",
    "SimGCL": "simgcl",
    "XSimGCL": "xsimgcl",
    "NCL": "ncl",
    "DirectAU": "direct_au",
    "BUIR": "buir",
    "SelfCF": "selfcf",
    "MixGCF": "mixgcf",
    "SSL4Rec": "ssl4rec",
}
"""Graph models of SELFRec that run without a GPU and TensorFlow, and our names of them."""

SOCIAL = {"SEPT": "sept", "MHCN": "mhcn"}
"""Those that need TensorFlow."""

BATCH = 2048
"""Interactions of a batch in SELFRec's configurations."""

SAME = {
    "NCL": {"structure_weight": 0.002, "prototype_weight": 0.0002, "temperature": 0.05, "item_weight": 1.5},
    "DirectAU": {"gamma": 2.0, "n_layers": 3, "l2": 1e-4},
    "MixGCF": {"dropout": 0.1, "each_number": True},
    "SSL4Rec": {"contrasted": "batch", "scoring": "product"},
}
"""Our options where SELFRec's configuration is not our default. NCL sums its contrasts over a batch of 2048; ours are
means."""

EPOCHS = {"MF": (7, 1), "LightGCN": (7, 1), "SGL": (9, 1), "SEPT": (5, 3)}
"""How many epochs of SELFRec's models are trained to time them, and how many of them not counted, if not 3 and 1, as
the first has what happens once. MF and LightGCN evaluate in every fifth alone, SGL from the sixth on. SEPT has its
contrast from the third on."""

OPTIMIZERS = "sgd", "adam"
"""Those of our method mf."""

BPR_GRID = [(rate, l2) for rate in (0.02, 0.05, 0.1) for l2 in (0.003, 0.01)]
BPR_OPTIONS = {"theirs": [(0.01, 0.01), *BPR_GRID], "sgd": BPR_GRID, "adam": [(0.005, 1e-4)]}
"""Learning rates and weights of the L2 term of BPR that are tried. The first of theirs are those that they have by
default, and those with Adam are the preset's."""

LONGEST = 3600
"""Seconds after which a peer's program is ended."""

QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


FAISS = "faiss-cpu==1.13.2"
"""For SELFRec's NCL."""


class MissingError(Exception):
    """A peer cannot be had, or does not run."""


@dataclass(frozen=True)
class Peer:
    """A peer: what pip installs for it, and the program that measures it."""

    packages: tuple[str, ...]
    program: str


PEERS = {
    "implicit": Peer(("implicit==0.7.2", "numpy==2.4.6", "scipy==1.17.1"), "implicit_bpr.py"),
    "lightgcn": Peer(
        (
            "torch==2.13.0",
            "numpy==2.4.6",
            "scipy==1.17.1",
            "pandas==3.1.1",
            "scikit-learn==1.9.1",
            "tqdm==4.70.1",
            "tensorboardX==2.6.5",
        ),
        "lightgcn_pytorch.py",
    ),
    "selfrec": Peer(
        ("torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1", "numba==0.68.1", "PyYAML==6.0.4", FAISS), "selfrec.py"
    ),
    "social": Peer(
        ("tensorflow-cpu==2.19.0", "numpy==1.26.4", "scipy==1.15.3", "numba==0.68.1", "PyYAML==6.0.4"),
        "selfrec_social.py",
    ),
    "sequences": Peer(("torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1", "numba==0.68.1"), "selfrec_sequences.py"),
    "flower": Peer(("flwr[simulation]==1.42.0", "numpy==2.4.6"), "flower_round.py"),
}


def last_line(code: int, *texts: str | None) -> str:
    """The last line that a command with an exit ``code`` has printed, of several outputs."""
    lines = [line.strip() for text in texts for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def command(*words: object) -> None:
    """Run a command, whose output is shown where it fails."""
    try:
        run = subprocess.run([*map(str, words)], capture_output=True, text=True)
    except OSError as error:
        raise MissingError(str(error)) from None
    if run.returncode:
        raise MissingError(last_line(run.returncode, run.stdout, run.stderr))


def installed(name: str, venvs: Path) -> Path:
    """The interpreter of a peer's virtual environment, which is made if it is not there or has other versions."""
    peer, folder = PEERS[name], venvs / name
    python, stamp, wanted = folder / "bin" / "python", folder / "installed.txt", "\n".join(PEERS[name].packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            command(sys.executable, "-m", "venv", folder)
            command(python, "-m", "pip", "--disable-pip-version-check", "install", *peer.packages)
        except MissingError as reason:
            raise MissingError(f"cannot be installed: {reason}") from None
        stamp.write_text(wanted)
    return python


def or_left_out(lines: Iterator[dict[str, Any]], **of: str) -> Iterator[dict[str, Any]]:
    """The lines of a comparison. Where something cannot be had or does not run, a line that says ``of`` what and why is
    the last one."""
    try:
        yield from lines
    except MissingError as reason:
        yield {**of, "left_out": str(reason)}


def measured(name: str, venvs: Path, *arguments: object) -> dict[str, Any]:
    """What a peer's program prints, its last line."""
    program = [installed(name, venvs), PROGRAMS / PEERS[name].program, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | QUIET | {"FLWR_HOME": scratch}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(program, env=environment, start_new_session=True, **pipes)
        try:
            printed, errors = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise MissingError(f"was not done after {LONGEST} seconds") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also the processes that it has started
            process.wait()
    if process.returncode:
        raise MissingError(f"does not run: {last_line(process.returncode, printed, errors)}")
    lines = [each for each in printed.splitlines() if each.startswith("{")]
    if not lines:
        raise MissingError("printed no figure")
    return json.loads(lines[-1])


def store(dataset: Dataset, file: Path) -> Path:
    """The training interactions, for the peers' programs, the held-out pairs, and relations if there are any."""
    arrays: dict[str, Any] = {"shape": (dataset.n_users, dataset.n_items)}
    for prefix, part in (("", dataset.train), ("valid_", dataset.valid), ("test_", dataset.test)):
        arrays[f"{prefix}users"] = np.repeat(np.arange(part.n_users), np.diff(part.offsets))
        arrays[f"{prefix}items"] = part.items
    if dataset.relations is not None:
        arrays |= {"sources": dataset.relations.sources, "targets": dataset.relations.targets}
    np.savez(file, **arrays)
    return file


def compared(figure: str, turns: int, theirs: Callable[[], float], ours: Callable[[], float]) -> dict[str, Any]:
    """Seconds of both, measured in turn. The ratio is the median of the turns' ratios."""
    pairs = [(theirs(), ours()) for _ in range(turns)]
    ratio = statistics.median(other / own for other, own in pairs)
    medians = [statistics.median(each) for each in zip(*pairs, strict=True)]
    return {"figure": figure, "theirs": medians[0], "ours": medians[1], "ratio": round(ratio, 3), "turns": turns}


def implicit(given: argparse.Namespace, dataset: Dataset, scratch: Path) -> Iterator[dict[str, Any]]:
    """Samples of BPR."""
    file, data = store(dataset, scratch / "train.npz"), Training.of(dataset, torch.device("cpu"))
    n = len(dataset.train.items)

    def theirs() -> float:
        return float(measured("implicit", given.venvs, file, "--dim", given.dim, "--epochs", 5)["seconds"])

    for optimizer in OPTIMIZERS:
        method = MF(MFSettings(embedding_dim=given.dim, optimizer=optimizer))
        state, _ = method.epoch(method.init(data, Key(0)), data, Key(1))  # compiles what is not yet compiled

        def ours(method: MF = method, state: Vectors = state) -> float:
            seconds = []
            for epoch in range(5):
                start = time.process_time()
                state, _ = method.epoch(state, data, Key(2).fold(epoch))
                seconds.append(time.process_time() - start)
            return statistics.median(seconds)

        line = compared(f"processor seconds an epoch of BPR, ours with {optimizer}", given.turns, theirs, ours)
        speeds = {f"samples_a_second_{who}": round(n / line[who]) for who in ("theirs", "ours")}
        yield line | speeds | {"dim": given.dim}
    if given.epochs:
        yield from bpr_accuracy(given, dataset, data, file)


Curve = list[tuple[int, float, float]]
"""Epochs, processor seconds and validation recall@20."""


def bpr_accuracy(given: argparse.Namespace, dataset: Dataset, data: Training, file: Path) -> Iterator[dict[str, Any]]:
    """The best validation recall@20 of BPR within --epochs, by learning rate; and what the best of each kind needs to
    reach what all of them reach."""
    every, best = max(1, given.epochs // 30), {}
    for kind in ("theirs", *OPTIMIZERS):
        for rate, l2 in BPR_OPTIONS[kind]:
            if kind == "theirs":
                found = their_curve(given, dataset, data, file, rate, l2, every)
            else:
                options = {"optimizer": kind, "learning_rate": rate, "l2": l2, "init_scale": 0.02}
                method = MF(MFSettings(embedding_dim=given.dim, **options))
                found = own_curve(method, dataset, data, given.epochs, every)
            epochs, seconds, recall = max(found, key=lambda each: each[2])
            line = {"figure": f"best validation recall@20 of BPR, {kind}", "learning_rate": rate, "l2": l2}
            yield line | {"recall@20": round(recall, 4), "epochs": epochs, "seconds": round(seconds, 2)}
            if kind not in best or recall > max(each[2] for each in best[kind]):
                best[kind] = found
    target = min(max(each[2] for each in found) for found in best.values())
    for kind, found in best.items():
        epochs, seconds, _ = next(each for each in found if each[2] >= target)
        line = {
            "figure": f"until validation recall@20 of {target:.4f}, {kind}",
            "samples": epochs * data.rows.items.numel(),
        }
        yield line | {"epochs": epochs, "seconds": round(seconds, 2)}


def own_curve(method: MF, dataset: Dataset, data: Training, epochs: int, every: int) -> Curve:
    """The curve of our method."""
    state, seconds, found = method.init(data, Key(0)), 0.0, []
    for epoch in range(1, epochs + 1):
        start = time.process_time()
        state, _ = method.epoch(state, data, Key(1).fold(epoch))
        seconds += time.process_time() - start
        if epoch % every == 0:
            found.append((epoch, seconds, validated(method, method.serving(state, data), dataset, data)))
    return found


def their_curve(
    given: argparse.Namespace, dataset: Dataset, data: Training, file: Path, rate: float, l2: float, every: int
) -> Curve:
    """The curve of `implicit`."""
    output = file.with_name("vectors.npz")
    options = {"dim": given.dim, "epochs": given.epochs, "rate": rate, "l2": l2, "every": every, "output": output}
    named = [part for name, value in options.items() for part in (f"--{name}", value)]
    seconds = measured("implicit", given.venvs, file, *named)["seconds"]
    found, method = [], MF(MFSettings())
    with np.load(output) as stored:
        both = zip(stored["users"], stored["items"], strict=True)
        for number, (spent, vectors) in enumerate(zip(seconds, both, strict=True), 1):
            recall = validated(method, Vectors(*map(torch.from_numpy, vectors)), dataset, data)
            found.append((number * every, spent, recall))
    return found


def validated(method: MF, vectors: Vectors, dataset: Dataset, data: Training) -> float:
    """Validation recall@20 of vectors."""
    held = Held.of(dataset.valid.offsets, dataset.valid.items, torch.device("cpu"))
    order = RandomOrder(dataset.train.user_ids, dataset.train.item_ids)
    return CentralRecommender(method, vectors, data, order).evaluate(held)["recall@20"]


def lightgcn(given: argparse.Namespace, dataset: Dataset, scratch: Path) -> Iterator[dict[str, Any]]:
    """Epochs of LightGCN, and the accuracy after some of them."""
    code = checkout("lightgcn", LIGHTGCN, "code/world.py", given.lightgcn, scratch) / "code"
    settings = LightGCNSettings(embedding_dim=given.dim, n_layers=3)
    method, count = LightGCN(settings), 0

    def run(file: Path, n_batches: int, epochs: int) -> dict[str, Any]:
        nonlocal count
        count += 1
        folder, output = scratch / f"run{count}", scratch / f"vectors{count}.npz"
        shutil.copytree(code, folder / "code")
        options = {"layers": 3, "dim": given.dim, "batch-size": settings.batch_size, "l2": settings.l2}
        options |= {"learning-rate": settings.learning_rate, "batches": n_batches, "epochs": epochs, "output": output}
        named = [part for name, value in options.items() for part in (f"--{name}", value)]
        return measured("lightgcn", given.venvs, folder, file, *named) | {"vectors": output}

    file, data = store(dataset, scratch / "train.npz"), Training.of(dataset, torch.device("cpu"))
    state, drawn = method.init(data, Key(0)), batches(data, settings.batch_size, Key(1))
    n_batches = min(given.batches, len(drawn))

    def theirs() -> float:
        line = run(file, n_batches, 0)
        return float(line["seconds_a_batch"]) * line["batches_an_epoch"]

    def descended(number: int) -> float:
        start = time.process_time()
        descend(
            [state.users, state.items],
            state,
            settings.learning_rate,
            [(batch.users.numel(), batch) for batch in (drawn * 2)[:number]],
            lambda learned, batch: method.loss(learned[0], learned[1], batch, data),
        )
        return time.process_time() - start

    def ours() -> float:  # the difference has nothing of what happens once
        once = descended(1)
        return (descended(n_batches + 1) - once) / n_batches * len(drawn)

    descended(1)  # makes the graph
    yield compared("processor seconds an epoch of LightGCN", given.turns, theirs, ours) | {"batches_timed": n_batches}
    if given.epochs:
        small = load(given.accuracy_data or given.data)
        data = Training.of(small, torch.device("cpu"))
        state = method.init(data, Key(0))
        for epoch in range(given.epochs):
            state, _ = method.epoch(state, data, Key(1).fold(epoch))
        own = method.serving(state, data)
        with np.load(run(store(small, scratch / "small.npz"), 0, given.epochs)["vectors"]) as stored:
            other = [torch.from_numpy(stored[name]) for name in ("users", "items")]
        line: dict[str, Any] = {"figure": "test recall@20 and ndcg@20 of LightGCN", "epochs": given.epochs}
        held = Held.of(small.test.offsets, small.test.items, torch.device("cpu"))
        order = RandomOrder(small.train.user_ids, small.train.item_ids)
        for who, vectors in (("theirs", Vectors(*other)), ("ours", own)):
            figures = CentralRecommender(method, vectors, data, order).evaluate(held)
            line[who] = [round(figures[name], 4) for name in ("recall@20", "ndcg@20")]
        yield line


def selfrec(given: argparse.Namespace, dataset: Dataset, scratch: Path) -> Iterator[dict[str, Any]]:
    """Epochs of SELFRec's graph models, and the accuracy after some of them."""
    code = checkout("selfrec", SELFREC, "SELFRec.py", given.selfrec, scratch)
    file, data = store(dataset, scratch / "train.npz"), Training.of(dataset, torch.device("cpu"))
    for model in (each for each in given.models if each in MODELS):
        kind, options = METHODS[MODELS[model]], SAME.get(model, {})
        if model == "DirectAU" and given.gamma is not None:
            options = options | {"gamma": given.gamma}
        method = kind(kind.Options(learning_rate=given.learning_rate, embedding_dim=64, batch_size=BATCH, **options))
        yield from or_left_out(
            against(given, dataset, data, ("selfrec", code, file, model), method, method), model=model
        )


def social(given: argparse.Namespace, dataset: Dataset, scratch: Path) -> Iterator[dict[str, Any]]:
    """The same of SELFRec's social models."""
    if dataset.relations is None:
        raise MissingError("the data have no relations between users; expected --relations FILE")
    code = checkout("selfrec", SELFREC, "SELFRec.py", given.selfrec, scratch)
    file, data = store(dataset, scratch / "train.npz"), Training.of(dataset, torch.device("cpu"))
    for model in (each for each in given.models if each in SOCIAL):
        kind = METHODS[SOCIAL[model]]
        options = {"learning_rate": given.learning_rate} | social_options(model, data)
        timed, trained = ({"warmup": 0}, {"warmup": given.epochs // 3 + 1}) if model == "SEPT" else ({}, {})
        methods = [kind(kind.Options(**options, **more)) for more in (timed, trained)]
        yield from or_left_out(against(given, dataset, data, ("social", code, file, model), *methods), model=model)


def social_options(model: str, data: Training) -> dict[str, Any]:
    """Our options for those of SELFRec's configuration. There each loss is a sum over the b interactions of a batch,
    here a mean: the weight of another one, a sum over k users there and a mean here, is multiplied by k / b."""
    n, m, size = data.n_users, data.n_items, min(BATCH, data.rows.items.numel())
    same: dict[str, Any] = {"embedding_dim": 64, "batch_size": BATCH, "n_layers": 2}
    if model == "MHCN":
        return same | {"weight": 0.01 * n / size, "l2": 1e-4}
    distinct = statistics.fmean(
        each.users.unique().numel() / each.users.numel() for each in batches(data, BATCH, Key(0))
    )
    # there the L2 term has all vectors in each step, here the three of each interaction
    return same | {"weight": 0.005 * distinct, "l2": 1e-4 * (n + m) / (3 * size)}


def first_vectors(method: Method, data: Training, key: Key) -> Any:
    """The first state of a method, with vectors by the rule of theirs: uniform, as large as Glorot and Bengio say."""
    state = method.init(data, key)
    users, items = (
        (6 / sum(table.shape)) ** 0.5
        * (2 * uniform(key.fold(side).spread(torch.arange(len(table))), table.shape[1]) - 1)
        for side, table in (("first users", state.users), ("first items", state.items))
    )
    return replace(state, users=users, items=items)


def against(
    given: argparse.Namespace,
    dataset: Dataset,
    data: Training,
    peer: tuple[str, Path, Path, str],
    timed: Method,
    trained: Method,
) -> Iterator[dict[str, Any]]:
    """A model of SELFRec (the ``peer``: name, checkout, file of data, model) beside ours: seconds an epoch of the
    ``timed`` method, and the accuracy of the ``trained`` one."""
    name, code, file, model = peer
    rate = ["--model", model, "--learning-rate", given.learning_rate]
    if model == "DirectAU" and given.gamma is not None:
        rate += ["--gamma", given.gamma]

    def theirs() -> float:
        epochs, skipped = EPOCHS.get(model, (3, 1))
        done = measured(name, given.venvs, code, file, *rate, "--epochs", epochs, "--every", 0)
        return statistics.median(done["seconds"][skipped:])

    def ours() -> float:
        state, seconds = first_vectors(timed, data, Key(0)), []
        for epoch in range(3):
            start = time.process_time()
            state, _ = timed.epoch(state, data, Key(1).fold(epoch))
            seconds.append(time.process_time() - start)
        return statistics.median(seconds[1:])

    if given.turns:
        yield compared(f"processor seconds an epoch of {model}", given.turns, theirs, ours)
    by_validation: dict[str, list[float]] = {"theirs": [], "ours": []}
    for seed in given.seeds if given.epochs else ():
        line: dict[str, Any] = {"figure": f"test ndcg@20 of {model}", "epochs": given.epochs, "seed": seed}
        numbers = ("--epochs", given.epochs, "--every", given.every, "--seed", seed)
        done = measured(name, given.venvs, code, file, *rate, *numbers)
        both = (
            ("theirs", list(zip(done["valid"], done["test"], strict=True))),
            ("ours", curve(trained, dataset, data, given.epochs, given.every, seed)),
        )
        for who, figures in both:
            chosen = {"by the test": max(test for _, test in figures), "by validation": max(figures)[1]}
            line[who] = {how: round(value, 4) for how, value in chosen.items()}
            by_validation[who].append(chosen["by validation"])
        yield line
    if given.epochs and len(given.seeds) > 1:
        yield {"figure": f"test ndcg@20 of {model}, by validation, mean over seeds"} | spread_of(by_validation)


def spread_of(found: dict[str, list[float]]) -> dict[str, Any]:
    """Means over seeds, and the difference of ours and theirs in its standard errors."""
    means = {who: statistics.fmean(values) for who, values in found.items()}
    error = sum(statistics.variance(values) / len(values) for values in found.values()) ** 0.5
    distance = (means["ours"] - means["theirs"]) / error if error else float("nan")
    rounded = {who: round(mean, 4) for who, mean in means.items()}
    return rounded | {"standard error of the difference": round(error, 4), "in standard errors": round(distance, 1)}


def curve(
    method: Method, dataset: Dataset, data: Training, epochs: int, every: int, seed: int
) -> list[tuple[float, float]]:
    """Validation and test NDCG@20 after every ``every``-th of the ``epochs``, from the first on; validation items are
    not recommended in the test."""
    valid, test = (Held.of(each.offsets, each.items, torch.device("cpu")) for each in (dataset.valid, dataset.test))
    order, figures = RandomOrder(dataset.train.user_ids, dataset.train.item_ids), []
    state = first_vectors(method, data, Key(seed))
    for number in range(epochs):
        state, _ = method.epoch(state, data, Key(seed).fold("epoch", number))
        if number % every == 0:
            ranked = CentralRecommender(method, method.serving(state, data), data, order)
            figures.append((ranked.evaluate(valid)["ndcg@20"], ranked.evaluate(test, hide=valid)["ndcg@20"]))
    return figures


def checkout(name: str, public: tuple[str, str], marker: str, given: Path | None, scratch: Path) -> Path:
    """The folder of a public project, from a checkout or by git; ``marker`` is a file that it has."""
    address, commit = public
    if given is None:
        given = scratch / name
        try:
            command("git", "clone", "-q", address, given)
            command("git", "-C", given, "checkout", "-q", commit)
        except MissingError as reason:
            raise MissingError(f"cannot be had from {address}: {reason} (--{name} names a checkout)") from None
    if not (given / marker).is_file():
        raise MissingError(f"has no {marker} in {given}; expected a checkout of {address}")
    return given


def sequences(given: argparse.Namespace, dataset: Dataset, scratch: Path) -> Iterator[dict[str, Any]]:
    """Epochs of sequential models."""
    code = checkout("selfrec", SELFREC, "SELFRec.py", given.selfrec, scratch)
    try:
        data, train = Training.of(dataset, torch.device("cpu"), sequential=True), scratch / "train.txt"
    except DataError as reason:
        raise MissingError(str(reason)) from None
    lists = data.sequence.split(data.rows.counts.tolist())
    train.write_text("".join(f"{user}:{' '.join(map(str, own.tolist()))}\n" for user, own in enumerate(lists)))
    same = {"max_length": 50, "n_blocks": 2, "n_heads": 1, "batch_size": 256, "dropout": 0.2}
    own = {"sasrec": {"loss": "binary"}, "bert4rec": {"mask": 0.5, "last": 0, "width": 1}}
    own["cl4srec"] = {"loss": "binary", **dict.fromkeys(("crop", "mask", "reorder"), 0.5)}
    for name, more in own.items():
        chosen = {"embedding_dim": given.dim, **same, **more}
        method = configure(name, overrides=[f"method.{key}={value}" for key, value in chosen.items()]).build()
        state, epoch = method.init(data, Key(0)), 0

        def theirs(model: str = TITLES[name]) -> float:
            options = ("--dim", given.dim, "--length", 50, "--blocks", 2, "--heads", 1, "--batch-size", 256)
            ran = measured("sequences", given.venvs, code, model, train, *options, "--dropout", 0.2, "--epochs", 3)
            return float(ran["seconds_an_epoch"])

        def ours(method: Any = method) -> float:
            nonlocal state, epoch
            seconds = []
            for _ in range(4):
                epoch, start = epoch + 1, time.process_time()
                state, _ = method.epoch(state, data, Key(2).fold(epoch))
                seconds.append(time.process_time() - start)
            return statistics.median(seconds[1:])

        yield compared(f"processor seconds an epoch of {TITLES[name]}", given.turns, theirs, ours) | {"dim": given.dim}


def flower(given: argparse.Namespace, dataset: Dataset, scratch: Path) -> Iterator[dict[str, Any]]:
    """Rounds with one client a user."""
    file, cohort = store(dataset, scratch / "train.npz"), min(given.cohort, dataset.n_users)
    own = [f"model.embedding_dim={given.dim}", f"selection.n_clients_per_round={cohort}", "client.local_steps=1"]
    simulator = Simulator(configure("fedmf", overrides=own).build(), dataset, seed=0, device="cpu")
    for _ in range(simulator.n_phases + 3):
        simulator.play()

    def theirs() -> float:
        options = ("--dim", given.dim, "--cohort", cohort, "--rounds", given.rounds)
        return float(measured("flower", given.venvs, file, *options)["seconds_a_round"])

    def ours() -> float:
        seconds = []
        for _ in range(10 * given.rounds):
            start = time.perf_counter()
            simulator.play()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    yield compared("seconds a round", given.turns, theirs, ours) | {"clients": cohort, "dim": given.dim}


COMPARISONS = {
    "implicit": implicit,
    "lightgcn": lightgcn,
    "selfrec": selfrec,
    "social": social,
    "flower": flower,
    "sequences": sequences,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as perfedrec train --data")
    parser.add_argument("--only", choices=COMPARISONS, nargs="+", default=list(COMPARISONS), help="peers to measure")
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="folder of the virtual environments")
    parser.add_argument("--lightgcn", type=Path, help="checkout of the public LightGCN (default: git clones it)")
    parser.add_argument("--selfrec", type=Path, help="checkout of the public SELFRec (default: git clones it)")
    parser.add_argument(
        "--models", choices=[*MODELS, *SOCIAL], nargs="+", default=[*MODELS, *SOCIAL], help="of SELFRec"
    )
    parser.add_argument("--relations", help="file of relations between users, for the social models")
    parser.add_argument("--k-core", type=int, default=0, help="users and items with fewer interactions are left out")
    parser.add_argument("--turns", type=int, default=3, help="how often both are measured")
    parser.add_argument("--dim", type=int, default=64, help="length of the vectors")
    parser.add_argument("--batches", type=int, default=5, help="batches of LightGCN that are timed")
    parser.add_argument(
        "--epochs", type=int, default=0, help="epochs of BPR, LightGCN and SELFRec after which accuracy is compared"
    )
    parser.add_argument("--every", type=int, default=1, help="epochs of SELFRec between evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of SELFRec's accuracy")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="step of Adam in SELFRec's models and ours")
    parser.add_argument("--gamma", type=float, help="weight of uniformity in DirectAU (default: SELFRec's, 2)")
    parser.add_argument("--accuracy-data", help="data for that (default: --data)")
    parser.add_argument("--cohort", type=int, default=256, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of Flower that are timed")
    given = parser.parse_args()
    given.venvs = given.venvs.absolute()
    torch.set_num_threads(1)
    try:
        dataset = load(given.data, relations=given.relations, k_core=given.k_core)
    except DataError as reason:
        parser.error(str(reason))
    for name in given.only:
        with tempfile.TemporaryDirectory() as scratch:
            for line in or_left_out(COMPARISONS[name](given, dataset, Path(scratch))):
                print(json.dumps({"peer": name, **line}), flush=True)


if __name__ == "__main__":
    main()
