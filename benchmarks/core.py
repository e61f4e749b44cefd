"""Measure speed, memory and accuracy of the core on a data set; print one JSON line per figure.

    python benchmarks/core.py --data FOLDER [--only speed|privacy|steps|accuracy] [--seeds 0 1 2] [--threads 2]

The accuracy runs select the best round on validation data and compute the test metrics of that round once.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from perfedrec import configure, load, train
from perfedrec.evaluation import Held
from perfedrec.runtimes.simulator import Simulator

SPEED = ("client.local_steps=1", "server.averaging=0", "pretraining.kind=none", "personal.pretrained=0")
"""Changes to preset paper: one local step of BPR. Its protection, clusters and neighbour sums stay on."""


def show(figure: str, value: float, **details: object) -> None:
    """Print one figure."""
    print(json.dumps({"figure": figure, "value": round(value, 6), **details}), flush=True)


def speed(data: str, threads: int) -> None:
    """Measure rounds of 256 clients with the paper's noise, the evaluation, and the memory of both."""
    torch.set_num_threads(threads)
    config = configure("paper", overrides=SPEED)
    dataset = load(data)
    simulator = Simulator(config.build(), dataset, seed=0, device="cpu")
    simulator.play()  # the phase before training, in which every client joins
    valid = Held.of(dataset.valid.offsets, dataset.valid.items, simulator.device)
    rounds, evaluations, started = [], [], time.perf_counter()
    for number in range(1, 501):
        start = time.perf_counter()
        simulator.play()
        rounds.append(1e3 * (time.perf_counter() - start))
        if number % 10 == 0:
            start = time.perf_counter()
            simulator.recommender().evaluate(valid)
            evaluations.append(time.perf_counter() - start)
    show("round_ms_median", statistics.median(rounds), rounds=len(rounds), threads=threads)
    show("rounds_500_with_validation_s", time.perf_counter() - started)
    show("evaluation_s_median", statistics.median(evaluations))
    show("peak_memory_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def privacy(data: str, threads: int) -> None:
    """Measure what each profile adds to a round of 256 clients.

    The profiles take turns round by round, so that other load on the machine affects all of them alike.
    """
    torch.set_num_threads(threads)
    dataset, simulators = load(data), {}
    for profile in (None, "paper", "secure"):
        config = configure("recommended", overrides=SPEED, privacy=profile)
        simulators[profile] = Simulator(config.build(), dataset, seed=0, device="cpu")
        for _ in simulators[profile].algorithm.phases:
            simulators[profile].play()
    times: dict[str | None, list[float]] = {profile: [] for profile in simulators}
    for _ in range(300):
        for profile, simulator in simulators.items():
            start = time.perf_counter()
            simulator.play()
            times[profile].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times[None])
    for profile, each in times.items():
        median = statistics.median(each)
        show(f"round_ms_median_{profile or 'unprotected'}", median, ratio=round(median / base, 3), threads=threads)


def steps(data: str, seeds: Sequence[int], rounds: int) -> None:
    """Measure the accuracy after each step from profile paper to profile secure."""
    dataset = load(data)
    secure = ("privacy.aggregation=secure",)
    poisson = (*secure, "selection.sampling=poisson")
    clipped = (*poisson, "privacy.norm=l2", "privacy.clip=10")
    for label, profile, overrides in (
        ("profile paper", "paper", ()),
        ("no protection", None, ()),
        ("sums instead of vectors and edges", None, secure),
        ("and Poisson selection", None, poisson),
        ("and a bound on the joint norm", None, clipped),
        ("and a cap on participations: profile secure", "secure", ()),
    ):
        tests, valids = [], []
        for seed in seeds:
            own = [*overrides, f"run.rounds={rounds}", f"run.seed={seed}"]
            config = configure("recommended", overrides=own, privacy=profile)
            result = train(config.build(), dataset, config.run)
            tests.append(result.evaluate("test"))
            valids.append(result.valid["recall@20"])
        figures = {f"test_{name}": [round(test[name], 4) for test in tests] for name in ("recall@20", "ndcg@20")}
        show(label, statistics.mean(valids), valid=[round(value, 4) for value in valids], **figures)


def accuracy(data: str, seeds: Sequence[int], rounds: int) -> None:
    """Measure the accuracy of both presets, the uploads until a target, and what contrastive pre-training saves."""
    dataset, means = load(data), {}
    for preset, overrides, label in (
        ("recommended", (), "recommended"),
        ("paper", (), "paper"),
        ("paper", ("pretraining.kind=none",), "paper_without_pretraining"),
    ):
        tests, curves = [], []
        for seed in seeds:
            config = configure(preset, overrides=[*overrides, f"run.rounds={rounds}", f"run.seed={seed}"])
            result = train(config.build(), dataset, config.run)
            test = result.evaluate("test")
            tests.append(test)
            uploads, curve = 0, []
            for entry in result.history:
                uploads += entry.report.clients
                if entry.valid is not None:
                    curve.append((entry.report.round + 1, uploads / dataset.n_users, entry.valid["recall@20"]))
            curves.append(curve)
            reached = next((spent for _, spent, recall in curve if recall >= 0.0640), None)
            figures = {name: round(test[name], 4) for name in ("recall@10", "ndcg@10", "recall@20", "ndcg@20")}
            details = {"seed": seed, "best_round": result.best_round, "valid": round(result.valid["recall@20"], 4)}
            show(f"{label}_test_recall@20", test["recall@20"], **details, **figures)
            show(f"{label}_uploads_to_valid_recall_0.0640", -1 if reached is None else reached, seed=seed)
        for name in ("recall@20", "ndcg@20"):
            values = [test[name] for test in tests]
            show(f"{label}_test_{name}_mean", statistics.mean(values), deviation=round(statistics.pstdev(values), 4))
        mean = [
            round(statistics.mean(point), 4) for point in zip(*[[c[2] for c in curve] for curve in curves], strict=True)
        ]
        means[label] = list(zip([point[0] for point in curves[0]], mean, strict=True))
        show(f"{label}_curve", mean[-1], rounds=[place for place, _ in means[label]], valid_recall=mean)
    length, target = means["paper_without_pretraining"][-1]
    reached = next((place for place, recall in means["paper"] if recall >= target), -1)
    show("paper_rounds_to_where_it_ends_without_pretraining", reached, without=length, valid_recall=target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.txt, valid.txt and test.txt")
    parts = ("speed", "privacy", "steps", "accuracy")
    parser.add_argument("--only", choices=parts, help="what to measure (default: all but steps)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the accuracy runs")
    parser.add_argument("--rounds", type=int, default=500, help="rounds of training of the accuracy runs")
    parser.add_argument("--threads", type=int, default=2, help="threads of the numerical library")
    args = parser.parse_args()
    if args.only is None:  # in separate processes, so that the peak memory is that of the speed run only
        for part in ("speed", "privacy"):
            subprocess.run([sys.executable, __file__, "--data", args.data, "--only", part], check=True)
    if args.only == "speed":
        speed(args.data, args.threads)
    elif args.only == "privacy":
        privacy(args.data, args.threads)
    elif args.only == "steps":
        torch.set_num_threads(args.threads)
        steps(args.data, args.seeds, args.rounds)
    else:
        torch.set_num_threads(args.threads)
        accuracy(args.data, args.seeds, args.rounds)


if __name__ == "__main__":
    main()
