"""perfedrec privacy, and perfedrec audit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, Moved, console, one_line, print_privacy
from perfedrec.core.errors import ConfigError

app = typer.Typer(help="Plan the noise that an epsilon takes, and see what a run guarantees.", no_args_is_help=True)


@app.command("plan")
def privacy_plan(
    epsilon: Annotated[float, typer.Option(help="user-level epsilon against the coordinator")],
    users: Annotated[int, typer.Option(help="how many users there are")],
    delta: Annotated[float, typer.Option(help="delta, well below 1 / users")] = 1e-5,
    items: Annotated[int, typer.Option(help="how many items there are")] = 7_500,
    dim: Annotated[int, typer.Option(help="length of the vectors in training")] = 64,
    passes: Annotated[int, typer.Option(help="passes of spectral pre-training")] = 3,
    rounds: Annotated[int, typer.Option(help="rounds of training, if there are to be any")] = 0,
    cohort: Annotated[int, typer.Option(help="clients in a round of training, on average")] = 256,
    cap: Annotated[int | None, typer.Option(help="rounds a user takes part in at most (default: the mean)")] = None,
    as_json: AsJson = False,
) -> None:
    """The noise for an epsilon, and what accuracy to expect under it.

    [bold]perfedrec privacy plan --epsilon 8 --delta 1e-5 --users 50000 --rounds 200[/bold]
    """
    with one_line():
        from perfedrec.privacy.plan import plan_spectral, plan_training

        sizes = {"users": users, "items": items, "passes": passes, "dim": dim, "cohort": cohort, "cap": cap}
        for name, value in {"epsilon": epsilon, **sizes}.items():
            if value is not None and not value > 0:  # nor for nan
                raise ConfigError(f"--{name} is {value:g}; expected more than 0")
        if epsilon > 50:
            raise ConfigError(f"--epsilon is {epsilon:g}; expected at most 50: a larger one rules out nothing")
        if not 0 < delta < 1:
            raise ConfigError(f"--delta is {delta:g}; expected a number between 0 and 1")
        if rounds < 0:
            raise ConfigError(f"--rounds is {rounds}; expected 0 (none) or more")
        if delta * users > 1:
            warning = f"warning: delta {delta:g} is above 1 / {users} users: it allows for showing somebody whole"
            print(warning, file=sys.stderr)
        spectral = plan_spectral(epsilon, delta, users, items, passes)
        training = plan_training(epsilon, delta, users, items, dim, rounds, cohort, cap) if rounds > 0 else None
        if as_json:
            found = {"pretraining": {"multipliers": spectral.multipliers, "users_per_noise": spectral.signal}}
            found["pretraining"]["expect"] = spectral.expectation
            if training is not None:
                found["training"] = {**vars(training), "expect": training.expectation}
            print(json.dumps(found))
            return
        table = Table("profile private: pre-training alone", "", title=f"epsilon {epsilon:g}, delta {delta:g}, a user")
        for name, multiplier in spectral.multipliers.items():
            times = passes if name == "spectral" else 1
            table.add_row(f"noise on {name}, {times}x", f"{multiplier:.3g} times a user's part")
        table.add_row("users per unit of noise", f"{spectral.signal:.0f}")
        table.add_row("expect, from Yelp", spectral.expectation)
        console.print(table)
        if training is not None:
            table = Table(f"or {rounds} rounds of {cohort} clients", "")
            table.add_row("participations a user", f"{training.rate * rounds:.1f} on average, at most {training.cap}")
            table.add_row("noise a round, coordinator", f"{training.coordinator:.3g} times the clip")
            table.add_row("noise a round, recipients alone", f"{training.recipients:.3g} times the clip (Poisson)")
            table.add_row("largest sum over noise", f"{training.signal:.2g}")
            table.add_row("expect", training.expectation)
            console.print(table)


@app.command("report")
def privacy_report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")], as_json: AsJson = False
) -> None:
    """What a run guarantees, to whom, and what it released.

    [bold]perfedrec privacy report runs/a[/bold]
    """
    with one_line():
        from perfedrec.audit.audit import read_audit
        from perfedrec.privacy.report import audited
        from perfedrec.runs.training import read_summary

        block, found = read_summary(run)["privacy"], read_audit(run)
        if found is not None:
            block["audit"] = audited(found)
        if as_json:
            print(json.dumps(block))
            return
        print_privacy(block)
        table = Table("release", "times", "a user in", "sampling", "noise", "noise / part")
        for each in block["releases"]:
            noise = f"{each['noise_multiplier']:.3g}" if each["noise"] != "none" else each["reason"]
            shown = (each["release"], each["times"], each["participations"], each["sampling"], each["noise"], noise)
            table.add_row(*map(str, shown))
        console.print(table)


def audit(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    rounds: Annotated[str, typer.Option(help="rounds of training to capture, as 1,50")] = "1",
    trials: Annotated[int, typer.Option(help="canaries sent through each noisy release")] = 100_000,
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Attack a run's own uploads. Exit code 1 where canaries show more than was claimed.

    [bold]perfedrec audit runs/a --rounds 1,50[/bold]
    """
    with one_line():
        from rich.progress import Progress

        from perfedrec.audit.audit import audit as run_audit

        try:
            chosen = [int(each) for each in rounds.split(",")]
        except ValueError:
            raise ConfigError(f"--rounds is {rounds!r}; expected numbers, as 1,50") from None
        with Progress(console=Console(stderr=True), transient=True, disable=as_json or not sys.stderr.isatty()) as bar:
            task = bar.add_task("playing the run again", total=None)
            found = run_audit(
                run, chosen, trials, data, lambda done, total: bar.update(task, completed=done, total=total)
            )
        if as_json:
            print(json.dumps(found.plain()))
        else:
            print_audit(found)
            console.print(f"written to {run / 'audit.json'}", soft_wrap=True)
        if found.failed:
            print("error: canaries show a larger epsilon than was claimed", file=sys.stderr)
            raise typer.Exit(1)


def print_audit(found: Any) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))  # room for names on 80 columns
    for name in ("attack", "round", "figure", "reached", "guessing", "popularity", "cases"):
        table.add_column(name, no_wrap=name != "attack")
    for each in found.findings:
        where = "-" if each.round is None else str(each.round or "pre")
        popular = "-" if each.popularity is None else f"{each.popularity:.3f}"
        row = (each.attack, where, each.metric, f"{each.value:.3f}", f"{each.guessing:.3f}", popular, str(each.cases))
        table.add_row(*row)
    console.print(table)
    if found.bounds:
        table = Table("canaries on", "epsilon claimed", "shown, any noise", "shown, normal noise", "trials", "")
        for each in found.bounds:
            normal = "-" if each.lower_gaussian is None else f"{each.lower_gaussian:.2f}"
            verdict = Text("above the claim", "red") if each.failed else "within"
            table.add_row(each.what, f"{each.claim:.2f}", f"{each.lower:.2f}", normal, str(each.trials), verdict)
        console.print(table)
    else:
        console.print("canaries: no epsilon is claimed, so there is none to exceed")
    for note in found.notes:
        console.print(f"not attacked: {note}", soft_wrap=True)
