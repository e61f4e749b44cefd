"""perfedrec node run: work for a coordinator."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from perfedrec.cli.common import one_line


def run(
    store: Annotated[Path, typer.Option(help="the node's file")],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator")],
    ca: Annotated[Path, typer.Option(help="certificate of the authority that vouches for the coordinator")],
    key: Annotated[Path, typer.Option(help="the node's private key")],
    threads: Annotated[int, typer.Option(help="threads of the numerical library")] = 1,
    until_stdin_closes: Annotated[
        bool, typer.Option("--until-stdin-closes", help="end when the process that started this one ends")
    ] = False,
) -> None:
    """Work for a coordinator, in one process that stays: until SIGTERM, after the work at hand.

    [bold]perfedrec node run --store node.db --coordinator host:18000 --ca ca.crt --key node.key[/bold]
    """
    with one_line():
        from perfedrec.experiment.work import work_for

        def tell(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        stop = threading.Event()
        if until_stdin_closes:
            threading.Thread(target=_until_closed, args=(stop,), daemon=True).start()
        work_for(store, coordinator, ca, key, stop, tell, threads)


def _until_closed(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()
