"""perfedrec node run and service run: work for a coordinator."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from perfedrec.cli.common import MetricsPort, one_line

service = typer.Typer(help="Be the neighbourhood service of a federation.", no_args_is_help=True)

Threads = Annotated[int, typer.Option(help="threads of the numerical library")]
UntilClosed = Annotated[
    bool, typer.Option("--until-stdin-closes", help="end when the process that started this one ends")
]


def run(
    store: Annotated[Path, typer.Option(help="the node's file")],
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator")],
    ca: Annotated[Path, typer.Option(help="certificate of the authority that vouches for the coordinator")],
    key: Annotated[Path, typer.Option(help="the node's private key")],
    bundle: Annotated[
        Path | None,
        typer.Option(help="what the node was given to keep things from the coordinator (default: beside --store)"),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(help="refuse runs that protect less than a profile: none, paper, secure (the default), private"),
    ] = None,
    threads: Threads = 1,
    metrics_port: MetricsPort = None,
    until_stdin_closes: UntilClosed = False,
) -> None:
    """Work for a coordinator, in one process that stays: until SIGTERM, after the work at hand.

    [bold]perfedrec node run --store node.db --coordinator host:18000 --ca ca.crt --key node.key[/bold]
    """
    with one_line():
        from perfedrec.federation.metrics import exposed
        from perfedrec.federation.node import work_for

        with exposed(metrics_port) as expose:
            work_for(store, coordinator, ca, key, _stop(until_stdin_closes), _tell, threads, bundle, require, expose)


@service.command("run")
def run_service(
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator")],
    ca: Annotated[Path, typer.Option(help="certificate of the authority that vouches for the coordinator")],
    key: Annotated[Path, typer.Option(help="the service's private key, whose public one the coordinator has")],
    state: Annotated[Path, typer.Option(help="the service's folder: its service.keys, and what it keeps of a run")],
    threads: Threads = 1,
    metrics_port: MetricsPort = None,
    until_stdin_closes: UntilClosed = False,
) -> None:
    """Be a federation's neighbourhood service, in one process that stays: until SIGTERM, after the work at hand.

    [bold]perfedrec service run --coordinator host:18000 --ca ca.crt --key service.key --state folder[/bold]
    """
    with one_line():
        from perfedrec.federation.metrics import exposed
        from perfedrec.federation.service import serve_neighbours

        with exposed(metrics_port) as expose:
            serve_neighbours(state, coordinator, ca, key, _stop(until_stdin_closes), _tell, threads, expose)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop(until_stdin_closes: bool) -> threading.Event:
    """What is set when the process is to end."""
    stop = threading.Event()
    if until_stdin_closes:
        threading.Thread(target=_until_closed, args=(stop,), daemon=True).start()
    return stop


def _until_closed(stop: threading.Event) -> None:
    while os.read(0, 4096):  # sys.stdin has a lock, held here, that Python aborts for as it ends
        pass
    stop.set()
