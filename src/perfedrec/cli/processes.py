"""perfedrec node run and service run: the processes that work for a coordinator."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from perfedrec.cli.common import MetricsPort, one_line

service = typer.Typer(help="Be the neighbourhood service of a federation.", no_args_is_help=True)

Coordinator = Annotated[str, typer.Option(help="HOST:PORT of the coordinator; an IPv6 address stands in brackets")]
Authority = Annotated[Path, typer.Option(help="certificate of the authority that vouches for the coordinator")]
Threads = Annotated[int, typer.Option(max=4096, help="threads of the numerical library")]
UntilClosed = Annotated[
    bool, typer.Option("--until-stdin-closes", help="end when the process that started this one ends")
]


def run(
    store: Annotated[Path, typer.Option(help="the node's file")],
    coordinator: Coordinator,
    ca: Authority,
    key: Annotated[Path, typer.Option(help="the node's private key")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="the node's bundle: its secrets for sealing and for secure sums (default: node.bundle beside --store)"
        ),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(help="refuse runs that protect less than a profile: none, paper, secure (the default), private"),
    ] = None,
    threads: Threads = 1,
    metrics_port: MetricsPort = None,
    until_stdin_closes: UntilClosed = False,
) -> None:
    """Work for a coordinator, in one process that runs until SIGTERM; the current message is answered first.

    [bold]perfedrec node run --store node.db --coordinator host:18000 --ca ca.crt --key node.key[/bold]
    """
    with one_line():
        from perfedrec.federation.metrics import exposed
        from perfedrec.federation.node import work_for
        from perfedrec.federation.process import Connection

        with exposed(metrics_port) as expose:
            connection = Connection(coordinator, ca, key, threads)
            work_for(connection, store, _stop(until_stdin_closes), _tell, bundle, require, expose)


@service.command("run")
def run_service(
    coordinator: Coordinator,
    ca: Authority,
    key: Annotated[Path, typer.Option(help="the service's private key; the coordinator has the public one")],
    state: Annotated[Path, typer.Option(help="the service's folder: its service.keys, and its states of a run")],
    threads: Threads = 1,
    metrics_port: MetricsPort = None,
    until_stdin_closes: UntilClosed = False,
) -> None:
    """Be a federation's neighbourhood service, in one process that runs until SIGTERM; the current message is answered
    first.

    [bold]perfedrec service run --coordinator host:18000 --ca ca.crt --key service.key --state folder[/bold]
    """
    with one_line():
        from perfedrec.federation.metrics import exposed
        from perfedrec.federation.process import Connection
        from perfedrec.federation.service import serve_neighbours

        with exposed(metrics_port) as expose:
            connection = Connection(coordinator, ca, key, threads)
            serve_neighbours(connection, state, _stop(until_stdin_closes), _tell, expose)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop(until_stdin_closes: bool) -> threading.Event:
    """The event that ends the process; it is set when the standard input closes, if that is asked for."""
    stop = threading.Event()
    if until_stdin_closes:
        threading.Thread(target=_until_closed, args=(stop,), daemon=True).start()
    return stop


def _until_closed(stop: threading.Event) -> None:
    while os.read(0, 4096):  # not sys.stdin: Python aborts if this thread holds its lock at the end
        pass
    stop.set()
