"""perfedrec privacy: plan noise, and show what a run guarantees. perfedrec audit: attack a run's uploads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, Moved, console, one_line, print_privacy
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError

if TYPE_CHECKING:
    from perfedrec.audit.audit import Audit
    from perfedrec.privacy.plan import SpectralPlan, TrainingPlan

COHORT = 256
"""Clients in a round of training, where ``privacy plan`` is not told how many."""

app = typer.Typer(help="Plan the noise for an epsilon, and show what a run guarantees.", no_args_is_help=True)


@app.command("plan")
def privacy_plan(
    epsilon: Annotated[float, typer.Option(help="user-level epsilon against the coordinator")],
    users: Annotated[int, typer.Option(help="number of users")],
    delta: Annotated[float, typer.Option(help="delta, well below 1 / users")] = 1e-5,
    items: Annotated[int, typer.Option(help="number of items")] = 7_500,
    dim: Annotated[int, typer.Option(help="length of the vectors in training")] = 64,
    passes: Annotated[int, typer.Option(help="passes of spectral pre-training")] = 6,
    rounds: Annotated[int, typer.Option(help="rounds of training; 0 for pre-training alone")] = 0,
    cohort: Annotated[
        int | None,
        typer.Option(help="clients in a round of training, on average (default: 256, or all where there are fewer)"),
    ] = None,
    cap: Annotated[int | None, typer.Option(help="largest number of rounds with one user (default: the mean)")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the noise that an epsilon needs, and the accuracy to expect with it.

    [bold]perfedrec privacy plan --epsilon 8 --delta 1e-5 --users 50000 --rounds 200[/bold]
    """
    with one_line():
        from perfedrec.privacy.plan import plan_spectral, plan_training

        cohort = min(COHORT, users) if cohort is None else cohort
        sizes = {"users": users, "items": items, "passes": passes, "dim": dim, "cohort": cohort, "cap": cap}
        _check_plan(epsilon, delta, rounds, sizes)
        if delta * users > 1:
            warning = f"warning: delta {delta:g} is above 1 / {users} users; it permits disclosing one user completely"
            print(warning, file=sys.stderr)
        spectral = plan_spectral(epsilon, delta, users, items, passes)
        training = plan_training(epsilon, delta, users, items, dim, rounds, cohort, cap) if rounds > 0 else None
        if as_json:
            print(json.dumps(_plan_as_json(spectral, training)))
            return
        print_spectral_plan(spectral, f"epsilon {epsilon:g}, delta {delta:g}, for a whole user", passes)
        if training is not None:
            print_training_plan(training, rounds, cohort)


def _check_plan(epsilon: float, delta: float, rounds: int, sizes: dict[str, int | None]) -> None:
    for name, value in {"epsilon": epsilon, **sizes}.items():
        if value is not None and not value > 0:  # also false for nan
            raise ConfigError(f"--{name} is {value:g}; expected more than 0")
    if epsilon > 50:
        raise ConfigError(f"--epsilon is {epsilon:g}; expected at most 50: a larger one protects nothing")
    if not 0 < delta < 1:
        raise ConfigError(f"--delta is {delta:g}; expected a number between 0 and 1")
    if rounds < 0:
        raise ConfigError(f"--rounds is {rounds}; expected 0 (no training) or more")


def _plan_as_json(spectral: SpectralPlan, training: TrainingPlan | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "pretraining": {
            "multipliers": spectral.multipliers,
            "users_per_noise": spectral.signal,
            "expect": spectral.expectation,
        }
    }
    if training is not None:
        found["training"] = {**vars(training), "expect": training.expectation}
    return found


def print_spectral_plan(plan: SpectralPlan, title: str, passes: int) -> None:
    """Print the noise of pre-training without training."""
    table = Table("profile private: pre-training alone", "", title=title)
    for name, multiplier in plan.multipliers.items():
        times = passes if name == "spectral" else 1
        table.add_row(f"noise on {name}, {times}x", f"{multiplier:.3g} times the bound of a user")
    table.add_row("users per unit of noise", f"{plan.signal:.0f}")
    table.add_row("expected, from Yelp", plan.expectation)
    console.print(table)


def print_training_plan(plan: TrainingPlan, rounds: int, cohort: int) -> None:
    """Print the noise of ``rounds`` rounds of training."""
    table = Table(f"or {counted(rounds, 'round')} of {counted(cohort, 'client')}", "")
    table.add_row("participations of a user", f"{plan.rate * rounds:.1f} on average, at most {plan.cap}")
    table.add_row("noise per round, coordinator", f"{plan.coordinator:.3g} times the clip")
    table.add_row("noise per round, recipients only", f"{plan.recipients:.3g} times the clip (Poisson)")
    table.add_row("largest sum over noise", f"{plan.signal:.2g}")
    table.add_row("expected", plan.expectation)
    console.print(table)


@app.command("report")
def privacy_report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")], as_json: AsJson = False
) -> None:
    """Show what a run guarantees and to whom, and what it released.

    [bold]perfedrec privacy report runs/a[/bold]
    """
    with one_line():
        from perfedrec.audit.audit import read_audit
        from perfedrec.privacy.report import audited
        from perfedrec.runs.folder import RunFolder

        block, found = RunFolder(run).summary().privacy, read_audit(run)
        if found is not None:
            block["audit"] = audited(found)
        if as_json:
            print(json.dumps(block))
            return
        print_privacy(block)
        if not block["releases"]:  # a centralised method
            return
        table = Table("release", "times", "participations", "sampling", "noise", "noise / bound")
        for each in block["releases"]:
            noise = f"{each['noise_multiplier']:.3g}" if each["noise"] != "none" else each["reason"]
            shown = (each["release"], each["times"], each["participations"], each["sampling"], each["noise"], noise)
            table.add_row(*map(str, shown))
        console.print(table)


def audit(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    rounds: Annotated[str, typer.Option(help="numbers of the rounds of training to attack, as in 1,50")] = "1",
    trials: Annotated[int, typer.Option(help="number of canaries for each noisy release")] = 100_000,
    data: Moved = None,
    nodes: Annotated[
        Path | None, typer.Option(help="folder of the nodes' files, to judge attacks on a federation's sums by")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack what left the clients of a run: uploads, or the sums that were opened in it. The exit code is 1 if
    canaries show a larger epsilon than the run claims.

    [bold]perfedrec audit runs/a --rounds 1,50[/bold]

    [bold]perfedrec audit federation/run --nodes federation/nodes[/bold]
    (a federation that was run with --keep-sums)
    """
    with one_line():
        from rich.progress import Progress

        from perfedrec.audit.audit import audit as run_audit
        from perfedrec.audit.federation import audit_records, lists_of
        from perfedrec.audit.poisoning.record import read_attacks
        from perfedrec.runs.folder import RunFolder

        try:
            chosen = [int(each) for each in rounds.split(",")]
        except ValueError:
            raise ConfigError(f"--rounds is {rounds!r}; expected numbers, as in 1,50") from None
        with Progress(console=Console(stderr=True), transient=True, disable=as_json or not sys.stderr.isatty()) as bar:
            task = bar.add_task("playing the run again", total=None)

            def tell(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            if RunFolder(run).is_federation:
                if data is not None:
                    raise ConfigError(
                        "--data is for a simulated run; the attacks on a federation's sums are judged by its nodes' "
                        "files: expected --nodes FOLDER"
                    )
                found = audit_records(run, {} if nodes is None else lists_of(nodes), tell)
            elif nodes is not None:
                raise ConfigError("--nodes judges the sums of a federation, and this run was simulated; expected none")
            else:
                found = run_audit(run, chosen, trials, data, tell)
        if as_json:
            print(json.dumps(found.plain()))
        else:
            print_audit(found)
            attacked = read_attacks(run)
            told = "not simulated (perfedrec attack RUN)" if attacked is None else attacked.line()
            console.print(f"malicious clients: {told}", soft_wrap=True)
            console.print(f"written to {run / 'audit.json'}", soft_wrap=True)
        if found.failed:
            print("error: canaries show a larger epsilon than the run claims", file=sys.stderr)
            raise typer.Exit(1)


def print_audit(found: Audit) -> None:
    """Print the findings of an audit and its lower bounds on epsilon. Attacks on sums that found nothing share a
    line."""
    quiet = found.without_result()
    lines: list[tuple[str, ...]] = [("  figure", "round", "reached", "guessing", "popularity", "cases")]
    attacks: list[str | None] = [None]
    for each in found.findings:
        if each.attack in quiet:
            continue
        where = "-" if each.round is None else str(max(each.round, 0) or "pre")
        popular = "-" if each.popularity is None else f"{each.popularity:.3f}"
        reached = f"{each.value:.3f}" + ("" if each.margin is None else f" ± {each.margin:.3f}")
        figures = (reached, f"{each.guessing:.3f}", popular, str(each.cases))
        lines.append((f"  {each.metric}", where, *figures))
        attacks.append(each.attack)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    before = None
    for attack, line in zip(attacks, lines, strict=True):
        if attack != before:
            console.print(attack, style="bold", soft_wrap=True)  # a line of its own: names are long
        before = attack
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        console.print("  ".join(cells).rstrip(), soft_wrap=True, highlight=False)
    if quiet:
        console.print(f"found nothing, exposed and named nobody: {', '.join(quiet)}", soft_wrap=True)
    if found.bounds:
        table = Table("canaries on", "epsilon claimed", "shown, any noise", "shown, normal noise", "trials", "verdict")
        for bound in found.bounds:
            normal = "-" if bound.lower_gaussian is None else f"{bound.lower_gaussian:.2f}"
            verdict = Text("above the claim", "red") if bound.failed else "within"
            table.add_row(bound.what, f"{bound.claim:.2f}", f"{bound.lower:.2f}", normal, str(bound.trials), verdict)
        console.print(table)
    else:
        console.print("canaries: not used, because the run claims no epsilon")
    for note in found.notes:
        console.print(f"not attacked: {note}", soft_wrap=True)
