"""perfedrec tune: search for the best options of a method."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from perfedrec.cli.common import Algorithm, AsJson, ConfigFile, Data, Ks, Preset, Profile, command, console, one_line
from perfedrec.core.counted import counted

if TYPE_CHECKING:
    from perfedrec.compare.tune import Outcome
    from perfedrec.runs.config import Config


def tune(
    output: Annotated[Path, typer.Option(help="folder of the study; the same command continues it")],
    data: Data = None,
    algorithm: Algorithm = None,
    preset: Preset = None,
    privacy: Profile = None,
    config: ConfigFile = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value that the search starts from; repeatable")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="part to switch off in all trials; repeatable")] = None,
    space: Annotated[
        Path | None, typer.Option(help="TOML file with the options to search (default: those for the method)")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="number of trials of the whole study")] = 30,
    rounds: Annotated[int | None, typer.Option(help="rounds of training in each trial")] = None,
    ks: Ks = None,
    seed: Annotated[int | None, typer.Option(help="seed of the search and of every trial")] = None,
    as_json: AsJson = False,
) -> None:
    """Search for the best options of a method on validation data, and write them as a file for --config.

    [bold]perfedrec tune --data FOLDER --algorithm perfedrec_pp --trials 30 --output study[/bold]

    [bold]perfedrec train --data FOLDER --config study/best.toml[/bold]
    """
    with one_line():
        from perfedrec.compare.tune import BEST, Tuning, check_output, read_space, ready_made
        from perfedrec.core.dotted import flat
        from perfedrec.runs import progress
        from perfedrec.runs.config import open_data, resolve
        from perfedrec.runs.preset_files import ablation

        given: dict[str, Any] = {"data__path": data, "run__rounds": rounds, "run__seed": seed, "run__ks": ks}
        resolved = resolve(preset, config, set_ or (), without or (), privacy=privacy, algorithm=algorithm, **given)
        values = flat(resolved.model_dump(mode="json", by_alias=True))
        searched = ready_made(resolved.algorithm, values) if space is None else read_space(space)
        fixed = {key: f"--without {part} sets it" for part in without or () for key in ablation(part)}
        resolved.check_here()
        check_output(output)
        dataset, where = open_data(resolved.data, resolved.attributes), str(space or f"space of {resolved.algorithm}")
        tuning = Tuning(resolved, searched, dataset, output, fixed=fixed, where=where)
        for line in tuning.what_is_left_out():
            print(line, file=sys.stderr)
        shown = progress.Bar if sys.stderr.isatty() and not as_json else progress.Quiet
        study = tuning.play(trials, _Lines(trials, resolved.run.select_by, as_json), shown)
        finished = {"trials": len(study.get_trials(deepcopy=False)), "output": str(output)}
        if not (output / BEST).exists():
            console.print("no trial was completed, so there is no best configuration")
            raise typer.Exit(1)
        best = study.best_trial
        if as_json:
            print(json.dumps({**finished, "best": best.number, "value": best.value, "options": best.params}))
            return
        console.print(f"best: trial {best.number}, validation {resolved.run.select_by} {best.value:.4f}")
        for key, value in best.params.items():
            console.print(f"  {key} = {_short(value)}")
        console.print(f"written to {output / BEST}", soft_wrap=True)
        console.print(f"Next: {command(*_repeated(resolved, output / BEST))}", soft_wrap=True)


def _repeated(config: Config, best: Path) -> list[object]:
    """The words of the command that trains with the best options as their trial did: same data, same seed."""
    files = {name: getattr(config.data, name) for name in ("train", "valid", "test")}
    data = {"data": config.data.path} if files["train"] is None else files
    given = [word for name, value in data.items() if value is not None for word in (f"--{name}", value)]
    return ["train", "--config", best, *given, *(["--seed", config.run.seed] if config.run.seed else [])]


class _Lines:
    """Prints one line for each trial."""

    def __init__(self, trials: int, metric: str, as_json: bool) -> None:
        self.trials, self.metric, self.as_json, self.since = trials, metric, as_json, time.monotonic()
        self.console = Console(stderr=True)

    def __call__(self, outcome: Outcome) -> None:
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        if self.as_json:
            print(json.dumps({"event": "trial", **vars(outcome), "seconds": seconds}), file=sys.stderr, flush=True)
            return
        value = "" if outcome.value is None else f"{self.metric} {outcome.value:.4f}"
        ending = {
            "complete": value,
            "pruned": f"pruned at {value} after {counted(outcome.rounds, 'round')}",
            "infeasible": f"not possible: {outcome.remark}",
        }[outcome.state]
        best = "" if outcome.best_value is None else f", best {outcome.best_value:.4f} (trial {outcome.best_number})"
        options = " ".join(f"{key}={_short(value)}" for key, value in outcome.changes.items())
        which = f"trial {outcome.number}" + (" (as configured)" if outcome.as_configured else "")
        line = f"{outcome.finished}/{self.trials} {which}: {ending}{best}, {seconds:.0f} s: {options}"
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def _short(value: Any) -> str:
    from perfedrec.core.dotted import as_text

    return f"{value:.3g}" if isinstance(value, float) else as_text(value)
