"""What the commands share: the console, options, error messages on one line, and tables."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError, PerfedrecError, reason
from perfedrec.core.extras import MissingExtraError, extra_of, near

if TYPE_CHECKING:
    from perfedrec.data import Dataset
    from perfedrec.runs.progress import Reporter

_FULL = (errno.ENOSPC, errno.EDQUOT)


WIDE = 10_000
"""Columns of an output that is no terminal: nothing is wrapped or cut there, so that programs can read it."""


def lengths(ks: str | None) -> tuple[int, ...] | None:
    """The numbers in an option ``--ks``. Raises :class:`ConfigError` for anything but whole numbers from 1."""
    from perfedrec.evaluation.ranking import cutoffs

    if ks is None:
        return None
    try:
        return cutoffs([int(each) for each in ks.split(",")])
    except (ValueError, ConfigError):
        raise ConfigError(f"--ks {ks}: expected whole numbers from 1, such as 5,10,20") from None


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """As rich prints, without the spaces at the ends of lines where the output is no terminal."""
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # for :func:`one_line`; rich itself would exit with code 1


console = _Console(markup=False, emoji=False)  # ids, names and paths are printed as they are

Profile = Annotated[
    str | None, typer.Option("--privacy", help="privacy profile: none, paper, secure or private (see docs/privacy.md)")
]
Preset = Annotated[
    str | None,
    typer.Option(help="recommended, paper (the published options), or a method (default: the one for the method)"),
]
Algorithm = Annotated[
    str | None,
    typer.Option("--algorithm", help="method: a name in perfedrec config list, or file.py:Class for your own"),
]
Data = Annotated[
    str | None,
    typer.Option(help="file, folder, or synthetic:users=..,items=.. (default: as configured, or else synthetic)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
FinishedRun = Annotated[Path, typer.Option("--run", help="folder of a finished run")]
Moved = Annotated[str | None, typer.Option("--data", help="path of the data, if they have moved since the run")]
Format = Annotated[str, typer.Option(help="format of the files; auto detects it from their content")]
MetricsPort = Annotated[
    int | None,
    typer.Option(help="port on 127.0.0.1 that serves metrics to Prometheus (default: none)", show_default=False),
]
PagePort = Annotated[
    int | None,
    typer.Option(
        help="port on 127.0.0.1 that serves the operator's page; 0: a free one (default: none)", show_default=False
    ),
]
Columns = Annotated[
    str, typer.Option(help="columns by name or position (from 1), as in user=customer,item=2,rating=stars")
]
Header = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="whether the first line names the columns (default: as it looks)"),
]
MinRating = Annotated[float | None, typer.Option(help="leave out interactions with a lower rating")]
KCore = Annotated[
    int | None, typer.Option(help="remove users and items with fewer interactions, repeatedly (default: none)")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file that is applied after the preset")]
Ks = Annotated[str | None, typer.Option("--ks", help="lengths of lists at which metrics are computed, as in 5,10,20")]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress")]


@contextmanager
def one_line() -> Iterator[None]:
    """End the command with one line and an exit code for errors that a user can fix, and for Ctrl-C. An output that is
    no terminal gets :data:`WIDE` lines.

    Where nobody reads the output any more (``| head``), the command ends with exit code 141 and without a line.
    """
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    try:
        with _errors_as_one_line():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # they may hold text that Python would try to write at exit
            os.dup2(nowhere, stream.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from None


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    try:
        yield
    except PerfedrecError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise  # for example a broken connection: neither a path nor a full disk is the reason
        where = "" if error.filename is None else f"{error.filename}: cannot be read or written: "
        print(f"error: {where}{reason(error)}", file=sys.stderr)
        raise typer.Exit(PerfedrecError.exit_code) from None
    except KeyboardInterrupt:  # typer would end the command without a word
        print("error: interrupted", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise  # a bug in perfedrec
        print("error: " + " ".join(message.split()), file=sys.stderr)
        raise typer.Exit(PerfedrecError.exit_code) from None


@contextmanager
def hint_to_resume(words: Sequence[object], possible: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Add to the error of an interrupted run the command that resumes it, of which these are the ``words``. A
    :class:`KeyboardInterrupt` becomes such an error; the message says so where it is not ``possible`` to resume."""
    from perfedrec.runs.signals import InterruptedRunError

    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and not possible():
            raise InterruptedRunError("interrupted before the first checkpoint", signal.SIGINT) from None
        number = error.exit_code - 128 if isinstance(error, InterruptedRunError) else signal.SIGINT
        what = str(error) or "interrupted"
        raise InterruptedRunError(f"{what}; resume with {command(*words)}", number) from None


def refuse_with_resume(given: Mapping[str, object], keeps: str, may: str) -> None:
    """Refuse the options that were ``given``, by their names, with ``--resume``, which ``keeps`` what they would
    change. ``may`` says which options are possible. Raises :class:`ConfigError`."""
    if named := [option for option, value in given.items() if value is not None]:
        raise ConfigError(f"--resume continues with {keeps}; expected it without {' and '.join(named)}: {may}")


def command(*words: object) -> str:
    """A command line of perfedrec as it works here: ``perfedrec`` alone where that is on the PATH and is this one."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "perfedrec":
        program = [_callable(Path(sys.executable)), "-m", "perfedrec"]
    else:
        program = [_callable(called) if called.name == "perfedrec" else "perfedrec"]
    return shlex.join([*program, *map(str, words)])


def _callable(path: Path) -> str:
    """The name of a program if the shell finds this very file by it, otherwise its path."""
    found = shutil.which(path.name)
    return path.name if found is not None and Path(found).absolute() == path.absolute() else near(path.absolute())


def _explained(error: Exception) -> str | None:
    """What is wrong outside of perfedrec: a missing extra, or an error in a user's own method; otherwise ``None``."""
    extra = extra_of(error)
    if extra is not None:
        context = click.get_current_context(silent=True)
        return str(MissingExtraError(context.command_path if context else "this command", extra))
    from perfedrec.methods.registry import in_own_file

    return in_own_file(error)


def reporter(quiet: bool, as_json: bool) -> Reporter:
    """What shows the progress of a run: a bar on a terminal, plain lines elsewhere."""
    from perfedrec.runs import progress

    if quiet:
        return progress.Quiet()
    if as_json:
        return progress.JsonLines()
    return progress.best_reporter()


def print_data(dataset: Dataset, name: str | None = None, remarks: Sequence[str] = ()) -> None:
    """Print the sizes of a data set, how it was read and split, and what was left out of it, under its own name or
    another ``name``; and further ``remarks``."""
    train = dataset.train
    parts = {"train": train, "validation": dataset.valid, "test": dataset.test}
    sizes = f": {counted(train.n_users, 'user')}, {counted(train.n_items, 'item')}; interactions: "
    sizes += ", ".join(f"{part.n_interactions:,} {name}" for name, part in parts.items())
    console.print(Text.assemble((name or dataset.name, "bold"), sizes), soft_wrap=True)
    for line in (*dataset.notes.lines(), *remarks):
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def print_list(rows: Sequence[Mapping[str, Any]], user: str, empty: str = "has all items") -> None:
    """Print a list of recommendations.

    ``rows`` have the entries item, rank and score, one for each mixed model, and moved; and perhaps title. For a method
    that mixes no models, only the first three and titles are printed. Without rows, ``empty`` says what the user has.
    """
    if not rows:
        console.print(f"nothing is left to recommend to user {user}, who {empty}", soft_wrap=True, highlight=False)
        return
    # Models of weight 0 are left out: their entries are 0.
    names = list(rows[0])[3 : list(rows[0]).index("moved")]
    models = [name for name in names if any(abs(row[name]) > 1e-9 for row in rows)]
    mixed = [] if models == ["global"] else models
    moved = ["moved"] if "global" in mixed else []  # else there is no order to compare with
    titles = ["title"] if any(row.get("title") for row in rows) else []
    table = Table("rank", "item", *titles, "score", *mixed, *moved, title=f"for user {user}")
    for row in rows:
        parts = [*(f"{row[name]:.3f}" for name in mixed), *(f"{row[name]:+d}" for name in moved)]
        shown = [row[name] or "" for name in titles]
        table.add_row(str(row["rank"]), str(row["item"]), *shown, f"{row['score']:.3f}", *parts)
    console.print(table)
    if not models:
        console.print("no model knows anything of this user's items, so the order is a random one")
    elif models == ["popularity"]:
        console.print("no model knows anything of this user's items, so the list is the same for all: the most popular")
    elif mixed:
        places = "; moved: places gained over the global model" if moved else ""
        console.print(f"score = {' + '.join(mixed)}{places}")


def print_communication(sent: dict[str, float]) -> None:
    """Print what a client has sent and received, as means, from the communication of a summary."""
    from perfedrec.runs.progress import size

    uploads = sent["uploads_per_client"]
    up, down = (size(sent[f"bytes_{way}_per_upload"] * uploads) for way in ("up", "down"))
    console.print(f"a client sent {up} in {uploads:.1f} uploads and received {down}, on average", soft_wrap=True)


def print_privacy(block: dict[str, Any]) -> None:
    """Print the privacy block of a run."""
    from perfedrec.privacy.report import lines

    table = Table("privacy", "", show_header=False, title="privacy", title_justify="left", box=None)
    for name, text in lines(block):
        parts = text.split("; ") if console.is_terminal and name in _LISTS else [text]
        table.add_row(Text(name, "bold"), "\n".join(f"- {part}" for part in parts) if len(parts) > 1 else text)
    console.print(table)


_LISTS = ("narrower statements", "not covered", "audit")
"""Rows of the privacy block that are lists: on a terminal each entry has a line."""
