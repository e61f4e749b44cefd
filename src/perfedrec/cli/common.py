"""What the commands share: the console, options, one line for an error, and tables."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from perfedrec.core.errors import PerfedrecError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # which :func:`one_line` waits for; rich would end with 1


console = _Console(markup=False, emoji=False)  # ids, names and paths are shown as they are

Profile = Annotated[
    str | None, typer.Option("--privacy", help="privacy profile: none, paper, secure or private (see docs/privacy.md)")
]
Preset = Annotated[
    str | None,
    typer.Option(help="recommended (the default), paper (the published hyper-parameters), or a method's (its default)"),
]
Algorithm = Annotated[
    str | None, typer.Option("--algorithm", help="a method (see perfedrec config list), or file.py:Class for your own")
]
Data = Annotated[
    str | None,
    typer.Option(help="file, folder, or synthetic:users=..,items=.. (default: the configuration's; else synthetic)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
RunFolder = Annotated[Path, typer.Option("--run", help="folder of a finished run")]
Moved = Annotated[str | None, typer.Option("--data", help="where the data lies now, if it has moved since")]
Format = Annotated[str, typer.Option(help="format of the files; auto detects it from their content")]
MetricsPort = Annotated[
    int | None, typer.Option(help="answer Prometheus on this port of 127.0.0.1 (default: do not)", show_default=False)
]
Columns = Annotated[str, typer.Option(help="where columns are, as user=customer,item=2,rating=stars,timestamp=4")]


@contextmanager
def one_line() -> Iterator[None]:
    """Errors that a person can act on become one line and an exit code; so does nobody reading on, without a line."""
    try:
        with _told():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # what is left in them has no reader
            os.dup2(nowhere, stream.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from None


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except PerfedrecError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise  # a closed pipe, a socket: nothing that a path or a disk explains
        where = "" if error.filename is None else f"{error.filename}: cannot be read or written: "
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        raise typer.Exit(PerfedrecError.exit_code) from None
    except Exception as error:
        from perfedrec.methods.registry import in_own_file

        said = in_own_file(error)
        if said is None:
            raise  # a mistake of ours
        print("error: " + " ".join(said.split()), file=sys.stderr)
        raise typer.Exit(PerfedrecError.exit_code) from None


def reporter(quiet: bool, as_json: bool) -> Any:
    from perfedrec.runs import progress

    if quiet:
        return progress.Quiet()
    if as_json:
        return progress.JsonLines()
    return progress.Bar() if sys.stderr.isatty() else progress.Lines()


def print_data(dataset: Any) -> None:
    from perfedrec.data import counted

    train = dataset.train
    counts = {"user": train.n_users, "item": train.n_items, "interaction": train.n_interactions}
    sizes = ": " + ", ".join(counted(n, name) for name, n in counts.items())
    console.print(Text.assemble((dataset.name, "bold"), sizes), soft_wrap=True)
    for line in dataset.notes.lines():
        console.print(Padding(Text(line), (0, 0, 0, 2)))


def print_list(explained: Any, user: str) -> None:
    """A list of recommendations, columns item, rank, score, those of the mixed models, and moved; of a method that
    mixes nothing the first three."""
    models = [
        name for name in explained.columns[3:-1] if (explained[name].abs() > 1e-9).any()
    ]  # without those of weight 0
    mixed = models != ["global"]
    table = Table("rank", "item", "score", *((*models, "moved") if mixed else ()), title=f"for user {user}")
    for row in explained.iter_rows(named=True):
        parts = [*(f"{row[name]:.3f}" for name in models), f"{row['moved']:+d}"] if mixed else []
        table.add_row(str(row["rank"]), str(row["item"]), f"{row['score']:.3f}", *parts)
    console.print(table)
    if mixed:
        console.print(f"score = {' + '.join(models)}; moved: places gained over the global model alone")


def print_privacy(block: dict[str, Any]) -> None:
    from perfedrec.privacy.report import lines

    table = Table("privacy", "", show_header=False, title="privacy", title_justify="left", box=None)
    for name, text in lines(block):
        table.add_row(Text(name, "bold"), text)
    console.print(table)
