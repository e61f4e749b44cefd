"""perfedrec bench: compare methods."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, console, one_line

if TYPE_CHECKING:
    from perfedrec.compare.bench import Cell


def bench(
    file: Annotated[Path, typer.Argument(help="TOML file: methods, data sets and seeds (see docs/bench.md)")],
    output: Annotated[Path, typer.Option(help="folder for runs and tables; the same one goes on where it stopped")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=PATH: take these data sets of the file, from there (default: all)"),
    ] = None,
    processes: Annotated[int, typer.Option(min=0, help="runs at a time (0: one a processor)")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare methods on data sets over seeds; write tables with significance.

    FILE is TOML and names methods, data sets and seeds: see docs/bench.md, and benchmarks/ for ready-made ones.

    [bold]perfedrec bench benchmarks/comparison.toml --data yelp=FOLDER --output bench/yelp[/bold]
    """
    with one_line():
        from perfedrec.compare.bench import read
        from perfedrec.compare.cells import alone, play, processors
        from perfedrec.compare.results import collect
        from perfedrec.compare.tables import comma_separated, latex, markdown
        from perfedrec.runs.checkpoint import write_atomic

        moved = {name: path or None for name, _, path in (each.partition("=") for each in data or ())}
        comparison = read(file, output, moved)
        comparison.prepare()
        cells = list(comparison.cells())
        with alone(output), _Show(cells, output, as_json) as show:
            failed = play(cells, processes or processors(), show)
        results = collect(comparison, failed)
        write_atomic(output / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        for name, text in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
            write_atomic(output / f"table.{name}", text(results).encode())
        if as_json:
            print(json.dumps(results))
        else:
            print_results(results)
            console.print(f"written to {output}: results.json, table.md, table.csv, table.tex", soft_wrap=True)
        if failed:
            print(
                f"error: {len(failed)} of {len(cells)} runs failed; the same command tries them again", file=sys.stderr
            )
            raise typer.Exit(1)


def print_results(results: dict[str, Any]) -> None:
    from perfedrec.compare.tables import cells, columns, fitting, rows

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


class _Show:
    """One line for each run that is going on, and one for each that has ended."""

    def __init__(self, cells: list[Cell], output: Path, as_json: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from perfedrec.data import counted

        self.total, self.ended, self.as_json = len(cells), sum(cell.finished for cell in cells), as_json
        self.console, self.lock = Console(stderr=True), threading.Lock()
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
        self.tasks: dict[str, Any] = {}
        self.last: dict[str, dict[str, Any]] = {}
        start = {"event": "start", "runs": self.total, "finished": self.ended, "output": str(output)}
        self._say(start, f"{counted(self.total, 'run')} in {output}, {self.ended} finished already")

    def __enter__(self) -> _Show:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def begin(self, cell: Cell) -> None:
        with self.lock:
            self.tasks[cell.name] = self.progress.add_task(cell.name, total=None, detail="starting")

    def round(self, cell: Cell, standing: dict[str, Any]) -> None:
        self.last[cell.name] = standing
        detail = f"{standing['done']}/{standing['total']} {standing['metric']} " + _figure(standing["best"])
        self.progress.update(self.tasks[cell.name], total=standing["total"], completed=standing["done"], detail=detail)

    def end(self, cell: Cell, error: str | None) -> None:
        with self.lock:
            self.progress.remove_task(self.tasks.pop(cell.name))
            last = self.last.pop(cell.name, {})
            if error is None and not cell.finished:
                self._say(
                    {"event": "stopped", "run": cell.name}, f"stopped  {cell.name} after round {last.get('done', 0)}"
                )
                return
            self.ended += 1
            done = {"event": "failed" if error else "finished", "run": cell.name, "done": self.ended, "of": self.total}
            where = f"{self.ended}/{self.total}"
            if error:
                self._say(done | {"error": error}, f"{where} failed  {cell.name}: {error}")
            else:
                figure = f"validation {last['metric']} {_figure(last['best'])}" if last else ""
                self._say(done | {"best": last.get("best")}, f"{where} {cell.name}: {figure}")

    def _say(self, event: dict[str, Any], line: str) -> None:
        if self.as_json:
            print(json.dumps(event), file=sys.stderr, flush=True)
        else:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
