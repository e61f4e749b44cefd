"""Measure rounds of training of this build against an earlier one; print one JSON line per figure.

    python benchmarks/speed.py --data FOLDER --against REV [--only paper recommended secure] [--threads 1 2]
        [--rounds 300] [--warm-up 60]

Both builds run at the same time and take turns, ten rounds each, so that other load on the machine affects both alike.
The earlier one is taken from the history of this repository, and uses the same installed packages. A ratio is the
earlier build's median divided by this one's: 3 means three times as fast. That of the memory is this build's peak
divided by the earlier one's. Processor time is the better figure on a machine that does other work as well,
and there the ratio of the fastest tenth of the rounds, in which other work was least in the way.

Preset ``paper`` has one local step of BPR, without pre-training and averaging (as in ``benchmarks/core.py --only
speed``), ``recommended`` is the preset as it is in each build, and ``secure`` the same under profile ``secure``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
TURN = 10  # rounds that a build plays before it is the other one's turn
PAPER = ("client.local_steps=1", "server.averaging=0", "pretraining.kind=none", "personal.pretrained=0")
WORK: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "paper": ("paper", None, PAPER),
    "recommended": ("recommended", None, ()),
    "secure": ("recommended", "secure", ()),
}
"""Preset, profile and overrides of each kind of rounds."""


def worker(work: str, data: str, threads: int) -> None:
    """Play as many rounds of training as each line of the standard input says, and answer with the processor and wall
    time of each round in milliseconds. A last line, at the end of the input, has the peak memory."""
    import perfedrec
    from perfedrec import configure, load

    source = os.environ["PYTHONPATH"]
    if not Path(perfedrec.__file__).is_relative_to(source):
        raise SystemExit(f"perfedrec was imported from {perfedrec.__file__}; expected it from {source}")
    import torch  # after perfedrec, as its command does: perfedrec says how threads wait

    from perfedrec.runtimes.simulator import Simulator

    torch.set_num_threads(threads)
    preset, profile, overrides = WORK[work]
    method, given = configure(preset, overrides=overrides, privacy=profile).build(), {"seed": 0, "device": "cpu"}
    if "threads" in signature(Simulator).parameters:  # else it takes those of torch
        given["threads"] = threads
    simulator = Simulator(method, load(data), **given)
    algorithm: Any = simulator.algorithm
    for _ in algorithm.phases if hasattr(algorithm, "phases") else algorithm.prelude:
        simulator.play()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        processor, wall = [], []
        for _ in range(int(line)):
            spent, started = time.process_time(), time.perf_counter()
            simulator.play()
            wall.append(1e3 * (time.perf_counter() - started))
            processor.append(1e3 * (time.process_time() - spent))
        print(json.dumps({"processor": processor, "wall": wall}), flush=True)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3), flush=True)


class Build:
    """A process that plays rounds of one kind with the package in the folder ``source``."""

    def __init__(self, source: Path, work: str, data: str, threads: int) -> None:
        command = [sys.executable, __file__, "--data", data, "--worker", work, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": str(threads)},
        )
        self.processor: list[float] = []
        self.wall: list[float] = []
        self.peak = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def answer(self) -> Any:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended early, with code {self.process.wait()}")
        return json.loads(line)

    def play(self, rounds: int) -> None:
        """Play a number of rounds, and keep their times."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rounds}\n")
        self.process.stdin.flush()
        found = self.answer()
        self.processor += found["processor"]
        self.wall += found["wall"]

    def finish(self) -> None:
        """End the process, and keep its peak memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.peak = self.answer()


def compare(earlier: Path, work: str, data: str, threads: int, rounds: int, warm_up: int) -> dict[str, Any]:
    """The figures of one kind of rounds: medians of this build, and ratios of the ``earlier`` build to it."""
    with ExitStack() as stack:
        this, other = (stack.enter_context(Build(each, work, data, threads)) for each in (ROOT / "src", earlier))
        for each in (this, other):
            each.answer()
        for start in range(0, warm_up + rounds, TURN):
            for each in (this, other):
                each.play(min(TURN, warm_up + rounds - start))
        for each in (this, other):
            each.finish()
    found: dict[str, Any] = {"work": work, "threads": threads, "rounds": rounds}
    for name in ("processor", "wall"):
        mine, theirs = (getattr(each, name)[warm_up:] for each in (this, other))
        found[f"{name}_ms"] = round(statistics.median(mine), 2)
        found[f"{name}_ratio"] = round(statistics.median(theirs) / statistics.median(mine), 2)
        found[f"{name}_ratio_of_means"] = round(statistics.mean(theirs) / statistics.mean(mine), 2)
        found[f"{name}_ratio_of_fast"] = round(
            statistics.quantiles(theirs, n=10)[0] / statistics.quantiles(mine, n=10)[0], 2
        )
    return found | {"peak_mb": round(this.peak, 1), "peak_ratio": round(this.peak / other.peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set, as perfedrec train takes it")
    parser.add_argument("--against", metavar="REV", help="the earlier build: a commit of this repository")
    parser.add_argument("--only", choices=tuple(WORK), nargs="+", default=list(WORK), help="what to measure")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of the numerical library")
    parser.add_argument("--rounds", type=int, default=300, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=60, help="rounds before them")
    parser.add_argument("--worker", choices=tuple(WORK), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.data, args.threads[0])
        return
    if not args.against:
        parser.error("--against REV is missing: the commit of the earlier build")
    archive = subprocess.run(["git", "archive", args.against, "src"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        parser.error(f"--against {args.against}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        for work in args.only:
            for threads in args.threads:
                found = compare(Path(folder, "src"), work, args.data, threads, args.rounds, args.warm_up)
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
