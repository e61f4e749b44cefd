"""perfedrec attack: malicious clients in a run, in simulation."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from perfedrec.cli.common import AsJson, Moved, console, one_line
from perfedrec.core.errors import ConfigError

if TYPE_CHECKING:
    from perfedrec.audit.poisoning import Attacked
    from perfedrec.runs.progress import Progress as TrainingProgress


def attack(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", help="name of an attack, or all; repeatable (default: popular, pieck-uea, collusion)"),
    ] = None,
    share: Annotated[str, typer.Option(help="malicious clients, as shares of the users, as in 0.001,0.01")] = "0.01",
    targets: Annotated[int, typer.Option(help="number of target items, drawn among those with few users")] = 1,
    target: Annotated[
        list[str] | None, typer.Option(help="id of a target item, instead of drawn ones; repeatable")
    ] = None,
    bound: Annotated[str, typer.Option(help="the bound on what a client sends: kept or ignored")] = "kept",
    length: Annotated[
        float, typer.Option(help="length of malicious parts of training, in honest ones or bounds")
    ] = 10.0,
    before: Annotated[float, typer.Option(help="how many clients a malicious one counts for before training")] = 100.0,
    list_length: Annotated[int, typer.Option(help="items that a malicious client claims (0: as many as others)")] = 0,
    public: Annotated[float, typer.Option(help="share of the users whose lists fedrecattack knows")] = 0.05,
    k: Annotated[int, typer.Option("--k", help="length of the lists in which targets shall stand")] = 20,
    rounds: Annotated[
        int | None, typer.Option(help="rounds of all trainings, also of one without an attack (default: the run's)")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="option=value of a single attack; repeatable")
    ] = None,
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Train a run again with malicious clients, and show how many users see the targets, and how good lists are.

    [bold]perfedrec attack runs/a --share 0.001,0.01[/bold]

    [bold]perfedrec attack runs/a --attack fedrecattack --set top=20[/bold]
    """
    with one_line(), _kept(run):
        from rich.progress import Progress

        from perfedrec.audit.poisoning import ATTACKS, Scenario
        from perfedrec.audit.poisoning import attack as run_attacks
        from perfedrec.audit.poisoning.campaign import FIRST
        from perfedrec.runs.config import defence_of
        from perfedrec.runs.folder import RunFolder

        names = tuple(ATTACKS) if attacks == ["all"] else tuple(attacks or FIRST)
        given = {"bound": bound, "length": length, "before": before, "list_length": list_length, "public": public}
        scenario = _scenario(Scenario, n_targets=targets, targets=tuple(target or ()), k=k, **given)
        terminal, said = sys.stderr.isatty(), ""
        with Progress(console=Console(stderr=True), transient=True, disable=as_json or not terminal) as bar:
            task = bar.add_task("reading the run", total=None)

            def doing(what: str, progress: TrainingProgress) -> None:
                nonlocal said
                if what != said and not (as_json or terminal):
                    print(f"{what}: {progress.planned}", file=sys.stderr, flush=True)
                said = what
                text = f"{what}: {progress.place}"
                bar.update(task, description=text, completed=progress.done, total=progress.total)

            found = run_attacks(run, names, _shares(share), scenario, _options(option), rounds, data, doing)
        if as_json:
            print(json.dumps(found.plain()))
            return
        print_attacks(found, defence_of(RunFolder(run).config()))
        console.print(f"written to {run / 'attack.json'}", soft_wrap=True)


@contextmanager
def _kept(run: Path) -> Iterator[None]:
    """Say which record was set aside, and where the attacks on a run are interrupted, in one line what is kept."""
    from perfedrec.audit.poisoning.record import FILE, read_attacks
    from perfedrec.runs.signals import InterruptedRunError

    def written() -> int | None:
        return (run / FILE).stat().st_mtime_ns if (run / FILE).exists() else None

    before, aside = written(), set(run.glob("attack-*.json"))
    try:
        yield
    except KeyboardInterrupt:
        found, none = read_attacks(run), "no training was finished"
        done = [] if found is None else [f"{each.named} {each.share:.3g}" for each in found.outcomes]
        kept = f"{run / FILE} keeps {', '.join(done)}" if done else f"{none}, and nothing is kept"
        if done and written() == before:
            kept = f"{none}; {kept} of earlier commands"
        raise InterruptedRunError(f"interrupted; {kept}", signal.SIGINT) from None
    finally:
        for path in sorted(set(run.glob("attack-*.json")) - aside):
            print(f"what attacks of another scenario or number of rounds found is kept in {path}", file=sys.stderr)


def _scenario(kind: Any, **values: Any) -> Any:
    """The scenario with these values. Raises :class:`ConfigError` for one that it cannot have."""
    from pydantic import ValidationError

    from perfedrec.core.mistakes import explain

    try:
        return kind(**values)
    except ValidationError as error:
        names = {"n_targets": "targets", "targets": "target", "list_length": "list-length"}
        wrong: list[Any] = [
            {**each, "loc": tuple(names.get(str(part), part) for part in each["loc"])} for each in error.errors()
        ]
        raise ConfigError(explain(wrong, kind, "--")) from None


def _shares(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ConfigError(f"--share is {text!r}; expected numbers, as in 0.001,0.01") from None


def _options(given: list[str] | None) -> dict[str, str]:
    found = {}
    for each in given or ():
        name, equal, value = each.partition("=")
        if not equal:
            raise ConfigError(f"--set {each}: expected option=value, as in top=20")
        found[name.strip()] = value.strip()
    return found


def print_attacks(found: Attacked, defence: str) -> None:
    """Print the figures of attacks, and the ``defence`` of the run."""
    table = Table(*found.header())
    for row in found.rows():
        table.add_row(*row)
    console.print(
        f"target: {found.named_targets}; in random lists ER@{found.before.k} is {found.chance:.4f}", soft_wrap=True
    )
    console.print(f"defence: {defence or 'none'}", soft_wrap=True)
    console.print(table)
    worst = found.strongest
    if worst is not None:
        groups = Table(*found.group_header(), title=f"groups of users, {worst.named}, {worst.share:.3g} malicious")
        for row in found.group_rows():
            groups.add_row(*row)
        console.print(groups)
