"""perfedrec bench: compare methods."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, Ks, console, lengths, one_line, print_data
from perfedrec.core.counted import counted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from perfedrec.compare.bench import Cell
    from perfedrec.compare.schema import Results


def bench(
    file: Annotated[Path, typer.Argument(help="TOML file: methods, data sets and seeds (see docs/bench.md)")],
    output: Annotated[Path, typer.Option(help="folder for runs and tables; the same folder continues a comparison")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="use only this data set of the file; NAME=PATH gives its path; repeatable (default: all)"),
    ] = None,
    ks: Ks = None,
    processes: Annotated[int, typer.Option(min=0, help="number of parallel runs (0: one per processor)")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare methods on data sets over seeds, and write tables with significance.

    FILE is a TOML file that names methods, data sets and seeds. See docs/bench.md; benchmarks/ has examples.

    [bold]perfedrec bench benchmarks/comparison.toml --data yelp=FOLDER --output bench/yelp[/bold]
    """
    with one_line():
        from perfedrec.compare.bench import read
        from perfedrec.compare.cells import check_output, locked, play, processors
        from perfedrec.compare.latex import latex
        from perfedrec.compare.results import collect
        from perfedrec.compare.tables import comma_separated, markdown
        from perfedrec.runs.checkpoint import write_atomic

        moved = {name: path or None for name, _, path in (each.partition("=") for each in data or ())}
        comparison = read(file, output, moved, lengths(ks))
        check_output(output)
        comparison.prepare()
        for name, dataset in comparison.datasets.items():
            if as_json:
                event = {"event": "data", "data": name, "notes": dataset.notes.lines()}
                print(json.dumps(event), file=sys.stderr, flush=True)
            else:
                print_data(dataset, name)
        cells = list(comparison.cells())
        at_once = processes or processors()
        with locked(output), _Show(cells, output, at_once, as_json) as show:
            failed = play(cells, at_once, show)
        results = collect(comparison, failed)
        write_atomic(output / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        for name, text in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
            write_atomic(output / f"table.{name}", text(results).encode())
        if as_json:
            print(json.dumps(results))
        else:
            print_results(results)
            console.print(f"written to {output}: results.json, table.md, table.csv, table.tex", soft_wrap=True)
            console.print(f"Next: perfedrec report {output}", soft_wrap=True)
        if failed:
            print(
                f"error: {len(failed)} of {counted(len(cells), 'run')} failed; run the same command again to retry "
                "them",
                file=sys.stderr,
            )
            raise typer.Exit(1)


def print_results(results: Results) -> None:
    """Print a table for each data set, with the columns that fit on the terminal."""
    from perfedrec.compare.tables import cells, columns, fitting, reference_note, rows, split_notes

    for name in results["data"]:
        lines = rows(results, name)
        shown = fitting([column for column in columns(results) if column.brief], lines, console.width)
        table = Table(
            title=f"{name}: test, {results['protocol']}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for column in shown:
            table.add_column(column.brief, overflow="fold")
        for row in cells(shown, lines):
            table.add_row(*(Text(text, "bold") if best else text for text, best in row))
        console.print(table)
        for line in split_notes(results, name):
            console.print(line, soft_wrap=True)
    if note := reference_note(results):
        console.print(note, soft_wrap=True)


EVERY = 10.0
"""Seconds between two lines about runs that are playing, where there is no terminal."""


class _Show:
    """Shows the progress of a comparison: a line for each run that has ended, and for the runs that are playing a bar
    each on a terminal, or now and then a line elsewhere."""

    def __init__(self, cells: list[Cell], output: Path, processes: int, as_json: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from perfedrec.compare.cells import cost
        from perfedrec.compare.remaining import Remaining

        self.total, self.ended, self.as_json = len(cells), sum(cell.finished for cell in cells), as_json
        self.console, self.lock = Console(stderr=True), threading.Lock()
        self.left = Remaining(cells, processes, lambda cell: cost(cell.folder).get("seconds"))
        self.printed = time.monotonic()
        self.bars = self.console.is_terminal and not as_json
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.bars,
        )
        self.all = self.progress.add_task("all runs", total=self.total, completed=self.ended, detail=self._overall())
        self.tasks: dict[str, TaskID] = {}
        self.last: dict[str, dict[str, Any]] = {}
        start = {"event": "start", "runs": self.total, "finished": self.ended, "output": str(output)}
        self._print(start, f"{counted(self.total, 'run')} in {output}, {self.ended} finished already")

    def __enter__(self) -> _Show:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def begin(self, cell: Cell) -> None:
        with self.lock:
            self.left.begin(cell)
            self.tasks[cell.name] = self.progress.add_task(cell.name, total=None, detail="starting")

    def round(self, cell: Cell, progress: dict[str, Any]) -> None:
        with self.lock:
            self.last[cell.name] = progress
            done, total = progress["done"], progress["total"]
            begun = progress["started_at"]  # more than 0 in a run that is continued
            self.left.advance(cell, (done - begun) / max(total - begun, 1))
            figure = f"{progress['metric']} {_figure(progress['best'])}"
            detail = f"{_place(progress)} {figure}{_time(self.left.of(cell))}"
            self.progress.update(self.tasks[cell.name], total=total, completed=done, detail=detail)
            self.progress.update(self.all, completed=self.ended, detail=self._overall())
            if not self.bars and time.monotonic() - self.printed >= EVERY:
                self.printed = time.monotonic()
                event = {"event": "playing", "run": cell.name, "round": done, "rounds": total, "best": progress["best"]}
                event |= {"done": self.ended, "of": self.total, "seconds_left": self.left.all()}
                self._print(event, f"playing  {cell.name}: {detail}; all: {self._overall()}")

    def _overall(self) -> str:
        return f"{self.ended} of {counted(self.total, 'run')}{_time(self.left.all())}"

    def end(self, cell: Cell, error: str | None) -> None:
        with self.lock:
            self.left.end(cell)
            self.progress.remove_task(self.tasks.pop(cell.name))
            last = self.last.pop(cell.name, {})
            if error is None and not cell.finished:
                stopped = f"stopped  {cell.name} {f'after {_place(last)}' if last else 'before its first round'}"
                self._print({"event": "stopped", "run": cell.name}, stopped)
                return
            self.ended += 1
            done = {"event": "failed" if error else "finished", "run": cell.name, "done": self.ended, "of": self.total}
            where = f"{self.ended}/{self.total}"
            self.progress.update(self.all, completed=self.ended, detail=self._overall())
            if error:
                self._print(done | {"error": error}, f"{where} failed  {cell.name}: {error}")
            else:
                figure = f"validation {last['metric']} {_figure(last['best'])}" if last else ""
                self._print(done | {"best": last.get("best")}, f"{where} {cell.name}: {figure}")

    def _print(self, event: dict[str, Any], line: str) -> None:
        """Print ``event`` as JSON or ``line`` as text, as the user asked."""
        if self.as_json:
            print(json.dumps(event), file=sys.stderr, flush=True)
        else:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def _place(progress: dict[str, Any]) -> str:
    """Where a run is, in the words of ``perfedrec train``."""
    from perfedrec.runs.progress import place

    return place(progress["done"], progress["total"], progress["n_phases"], progress["phase"])


def _time(seconds: float | None) -> str:
    """A time that is left, as ``, 3 min left``; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f", {seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f", {minutes} min left" if minutes < 100 else f", {minutes / 60:.1f} h left"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
