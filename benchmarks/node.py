"""The cost of a node's file, and the quality of lists for new users, one JSON line per figure.

    python benchmarks/node.py --data FOLDER [--only speed|newcomers|commands] [--algorithm fedmf] [--seeds 0 1 2]
    python benchmarks/node.py --data FOLDER --only commands --against REV

The new users are a tenth of all users, and are not used in training. A node gets some of their interactions, chosen at
random, and its lists are compared with the rest: ``found`` is the number of hits among 20 places, divided by the number
of hits that were possible.

``commands`` are the seconds of processor time that a command line takes, as a median of calls; with ``--against`` also
those of an earlier commit, called in turn with this build, and how many times faster this build is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from perfedrec import Interactions, configure, load, split
from perfedrec.core.aggregate import reduce
from perfedrec.runtimes.node import LocalRecommender, Store, serving_broadcast
from perfedrec.runtimes.population import Users
from perfedrec.runtimes.round import contribute, round_key
from perfedrec.runtimes.simulator import Simulator

HOSTED = 64


def show(figure: str, value: float, **details: object) -> None:
    """Print one figure."""
    print(json.dumps({"figure": figure, "value": round(value, 4), **details}), flush=True)


def timed(work: Callable[[int], object], times: int = 15) -> float:
    """Median milliseconds of ``work``, which is called with 0, 1, 2, ...."""
    milliseconds = []
    for number in range(times):
        start = time.perf_counter()
        work(number)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds)


def speed(data: str, folder: Path) -> None:
    """Times of a round of 64 users, in memory and in a file, and of the commands of a node, on one thread."""
    dataset, algorithm = load(data), configure("recommended").build()
    simulator = Simulator(algorithm, dataset, seed=0, device="cpu")
    for _ in range(simulator.n_phases + 3):
        simulator.play()
    users = torch.arange(HOSTED) * (dataset.n_users // HOSTED)
    ids = dataset.train.user_ids[users.numpy()].tolist()
    frame = dataset.train.frame().filter(pl.col("user").is_in(ids))
    broadcast, groups = algorithm.broadcast(simulator.state, users), algorithm.n_groups(simulator.state)

    def work(population: Users, number: int) -> bytes:
        update, _ = contribute(algorithm, "train", broadcast, population, users, round_key(0, number))
        total = reduce(update, dataset.n_items, groups)
        return total.keys.numpy().tobytes() + total.sums.numpy().tobytes()

    show("round_ms_in_memory", timed(lambda number: work(simulator.population, number)), users=HOSTED)
    with Store.create(folder / "speed.node", dataset.train.item_ids) as store:
        given = {str(name): number for name, number in zip(ids, users.tolist(), strict=True)}
        store.import_interactions(frame, identities=given)
        store.join_run(algorithm, "run")
        answer = len(work(store, -1))
        show("round_ms_in_a_file", timed(lambda number: store.answer_round(number, b"", lambda: work(store, number))))
        served, user = serving_broadcast(algorithm, simulator.state, users), users[:1]
        show("receive_ms", timed(lambda number: store.receive(served, users, "run", 20, ""), 5))
        recommender = LocalRecommender(store, algorithm)
        show("recommend_ms", timed(lambda number: recommender.scores(user)))
        item = str(dataset.train.item_ids[0])
        show("add_ms", timed(lambda number: store.add_interactions(f"new {number}", item)))
        new_user = torch.tensor([store.identity("new 0")])
        show("recommend_newcomer_ms", timed(lambda number: recommender.scores(new_user)))
        show("file_mb", store.status()["bytes"] / 1e6, answer_mb=answer / 1e6, interactions=frame.height)
        show("forget_ms", timed(lambda number: store.forget(f"new {number}"), 5))


def commands(data: str, folder: Path, against: str | None, calls: int = 9) -> None:
    """Seconds of processor time of whole commands of a node, of this build and of an earlier one."""
    here = Path(__file__).parents[1]
    builds = {"now": here / "src"}
    if against is not None:
        (folder / "earlier").mkdir()
        archive = subprocess.run(["git", "-C", here, "archive", against, "src"], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder / "earlier"], check=True, input=archive.stdout)
        builds["before"] = folder / "earlier" / "src"
    oldest, times = list(builds.values())[-1], resource.RUSAGE_CHILDREN

    def call(source: Path, *words: object) -> float:
        """The seconds of processor time of one command by a build."""
        before = resource.getrusage(times)
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "perfedrec", *map(str, words)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        after = resource.getrusage(times)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    run, model, items = folder / "run", folder / "served.model", load(data).train.item_ids[:5].tolist()
    call(oldest, "train", "--data", data, "--rounds", 2, "--output", run, "--quiet")
    call(oldest, "node", "export", "--run", run, "--output", model)
    for name, source in builds.items():
        call(source, "node", "init", "--store", folder / name, "--model", model)
        call(source, "node", "add", "ann", *items, "--store", folder / name)
    lines: dict[str, tuple[object, ...]] = {
        "recommend": ("node", "recommend", "--user", "ann", "--store"),
        "add": ("node", "add", "bob", items[0], "--store"),
        "help": ("--help",),
    }
    for figure, words in lines.items():
        seconds: dict[str, list[float]] = {name: [] for name in builds}
        for _ in range(calls):
            for name, source in builds.items():
                last = (folder / name,) if words[-1] == "--store" else ()
                seconds[name].append(call(source, *words, *last))
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        details = {}
        if "before" in medians:
            details = {"before": round(medians["before"], 3), "times": round(medians["before"] / medians["now"], 2)}
        show(f"{figure}_seconds", medians["now"], **details)


def newcomers(data: str, folder: Path, algorithm: str | None, seeds: Sequence[int], rounds: int) -> None:
    """Hits in the lists of new users after 1, 3, 5 and 10 interactions, beside lists by popularity."""
    whole = load(data).train.frame()
    found: dict[int, list[tuple[float, float]]] = {1: [], 3: [], 5: [], 10: []}
    for seed in seeds:
        rng, ids = np.random.default_rng(seed), whole["user"].unique().sort()
        new = ids.gather(np.sort(rng.choice(ids.len(), ids.len() // 10, replace=False)))
        known = Interactions.from_frame(whole.filter(~pl.col("user").is_in(new.implode())))
        dataset = split(known, "leave-one-out", "random", seed=0)
        config = configure(algorithm or "recommended", algorithm=algorithm)
        simulator = Simulator(config.build(), dataset, seed=seed, device="cpu")
        for _ in range(simulator.n_phases + rounds):
            simulator.play()
        nobody = torch.zeros(0, dtype=torch.int64)
        broadcast = serving_broadcast(simulator.algorithm, simulator.state, nobody)
        popularity = torch.tensor(dataset.train.item_degrees).float()
        index = {each: place for place, each in enumerate(dataset.train.item_ids.tolist())}
        rows = whole.filter(pl.col("user").is_in(new.implode()) & pl.col("item").is_in(list(index)))
        histories = {
            str(user): rng.permutation(sorted(items)).tolist()
            for (user,), items in ((key, part["item"].to_list()) for key, part in rows.group_by("user"))
        }
        for count in found:
            with Store.create(folder / f"{seed}-{count}.node", dataset.train.item_ids) as store:
                store.receive(broadcast, nobody, "run", rounds, "")
                chosen = {user: items for user, items in histories.items() if len(items) >= count + 5}
                pairs = [(user, item) for user, items in chosen.items() for item in items[:count]]
                store.import_interactions(pl.DataFrame(pairs, schema=["user", "item"], orient="row"))
                users = torch.tensor([store.identity(user) for user in chosen])
                scores, _ = LocalRecommender(store, simulator.algorithm).scores(users)
                hidden = [{index[item] for item in items[count:]} for items in chosen.values()]
                floor = torch.where(scores == -torch.inf, -torch.inf, popularity)
                found[count].append((hits(scores, hidden), hits(floor, hidden)))
    for count, pairs in found.items():
        means = np.mean(pairs, axis=0)
        details = {"algorithm": algorithm or "recommended", "popularity": round(float(means[1]), 4), "each": pairs}
        show(f"found_after_{count}", float(means[0]), **details)


def hits(scores: Tensor, hidden: Sequence[set[int]]) -> float:
    """The hits among the 20 best ``scores`` [B, m] as a share of the possible hits, mean over users."""
    lists = scores.topk(20, 1).indices.tolist()
    return float(np.mean([len(own & set(each)) / min(len(own), 20) for each, own in zip(lists, hidden, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", choices=("speed", "newcomers", "commands"))
    parser.add_argument("--against", metavar="REV", help="a commit of this repository to compare commands with")
    parser.add_argument("--algorithm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "commands"):
            commands(given.data, Path(folder), given.against)
        if given.only in (None, "speed"):
            speed(given.data, Path(folder))
        if given.only in (None, "newcomers"):
            newcomers(given.data, Path(folder), given.algorithm, given.seeds, given.rounds)


if __name__ == "__main__":
    main()
