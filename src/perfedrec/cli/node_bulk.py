"""perfedrec node lists and vectors: tables of all users of a node."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from perfedrec.cli.common import console, one_line
from perfedrec.cli.node import StoreFile
from perfedrec.core.counted import counted


@contextmanager
def _progress(output: Path) -> Iterator[Callable[[int, int], None]]:
    """Show how many users are done. Ctrl-C and SIGTERM end the command after a block of users, without an output."""
    from rich.progress import MofNCompleteColumn, Progress

    from perfedrec.runs.signals import InterruptedRunError, signals

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with signals() as caught, shown as bar:
        task = bar.add_task("users", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if caught:
                name = signal.Signals(caught[0]).name
                raise InterruptedRunError(f"stopped by {name} after {done} of {total} users; {output} was not written",
                                          caught[0])  # fmt: skip

        yield tell


def lists(
    store: StoreFile,
    output: Annotated[Path, typer.Option(help="file to write: .parquet or .csv")],
    k: Annotated[int, typer.Option(help="length of the lists")] = 20,
) -> None:
    """Write the lists of all users of this node to a table: user, item, rank, score.

    [bold]perfedrec node lists --store shop.node --output lists.parquet --k 50[/bold]
    """
    with one_line():
        from perfedrec.federation.bulk import write_lists

        with _progress(output) as tell:
            done = write_lists(store, output, k, tell)
        console.print(
            f"{output}: {counted(done.rows, 'row')} for {counted(done.users, 'user')}", soft_wrap=True, highlight=False
        )


def vectors(
    store: StoreFile, output: Annotated[Path, typer.Option(help="new folder for items.parquet and users.parquet")]
) -> None:
    """Write vectors whose products are the scores, for an index of nearest neighbours.

    [bold]perfedrec node vectors --store shop.node --output vectors[/bold]
    """
    with one_line():
        from perfedrec.federation.bulk import write_vectors

        with _progress(output) as tell:
            done = write_vectors(store, output, tell)
        line = (
            f"{output}: vectors of {counted(done.users, 'user')}, and of all items for "
            f"{counted(done.groups, 'group')} of users"
        )
        console.print(line, soft_wrap=True, highlight=False)
        for users, what in (
            (done.listed, "have scores beside their vectors: add those in the column listed"),
            (done.unknown, "are unknown to the model: their vectors are 0, and the node lists what is popular"),
        ):
            if users:
                console.print(f"{users:,} of the users {what}", soft_wrap=True, highlight=False)
