"""perfedrec federation watch and page: how a federation is, for its operator."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, console, one_line
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError

TOKEN = "operator.token"
"""The usual name of the file with the operator's token."""

ROUNDS = 8
"""Rounds that a terminal shows, and lines of what stood out."""

WIDTH = 60
"""Columns of the bar."""

STYLES = {"here": "green", "has the model": "green", "missed": "yellow", "away": "red", "refused": "red"}
STYLES |= {"new": "yellow", "held": "yellow", "excluded": "red"}

Folder = Annotated[
    Path | None,
    typer.Argument(metavar="FOLDER", help="folder of a run (serve --output), or one with several runs in it"),
]


def watch(
    folder: Folder = None,
    coordinator: Annotated[
        str | None, typer.Option(help="address of the operator's page, http://127.0.0.1:PORT, instead of a folder")
    ] = None,
    token: Annotated[Path, typer.Option(help="file with the operator's token, for --coordinator")] = Path(
        "operator.token"
    ),
    every: Annotated[float, typer.Option(min=0.2, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show it once, and end")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a federation is: nodes, rounds, accuracy, privacy spent, alerts. It asks nothing of the coordinator.

    Where the output is no terminal, one plain line is printed whenever something has changed, and with --json one
    object. Ends with the run, or with Ctrl-C.

    [bold]perfedrec federation watch run[/bold]

    [bold]perfedrec federation watch --coordinator http://127.0.0.1:9500 --token operator.token --once --json[/bold]
    """
    with one_line():
        if (folder is None) == (coordinator is None):
            raise ConfigError("expected either the FOLDER of a run or --coordinator http://127.0.0.1:PORT")
        look = _in_folder(folder) if folder is not None else _at(str(coordinator), token)
        try:
            _watch(look, every, once, as_json)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _in_folder(folder: Path) -> Callable[[], dict[str, Any]]:
    from perfedrec.federation import status

    return lambda: status.look(status.newest(folder))


def _at(address: str, token: Path) -> Callable[[], dict[str, Any]]:
    """What looks at the run whose page is at an address, with the operator's token."""
    from perfedrec.web.asking import ask

    return lambda: ask(address, token, "/status")


def _watch(look: Callable[[], dict[str, Any]], every: float, once: bool, as_json: bool) -> None:
    """Show what ``look`` finds until the run is over."""
    from perfedrec.federation.status import OVER

    view = look()
    if once and not as_json:
        console.print(screen(view))
        return
    if as_json or not console.is_terminal:
        write: Callable[[dict[str, Any]], str] = json.dumps if as_json else line
        print(last := write(view), flush=True)
        while not once and view["state"] not in OVER:
            time.sleep(every)
            view = look()
            if (new := write(view)) != last:
                print(last := new, flush=True)
        return
    with Live(screen(view), console=console, auto_refresh=False, screen=False) as live:
        while view["state"] not in OVER:
            time.sleep(every)
            view = look()
            live.update(screen(view), refresh=True)


def line(view: Mapping[str, Any]) -> str:
    """How a run is, in one plain line."""
    from perfedrec.runs.progress import size

    totals, accuracy, privacy = view["totals"], view["accuracy"], view["privacy"]
    states = Counter(each["state"] for each in view["nodes"])
    parts = [view["state"] + (f": {view['why']}" if view["why"] else ""), view["place"]]
    parts += ["nodes: " + ", ".join(f"{count} {state}" for state, count in states.items())] if states else []
    if accuracy["best"] is not None:
        test = "" if accuracy["test"] is None else f", test {accuracy['test']:.4f}"
        best = f"best {accuracy['best']:.4f} in {accuracy['best_round']}"
        parts.append(f"{accuracy['metric']} {accuracy['last']:.4f}, {best}{test}")
    parts.append(f"{size(totals['bytes_up'])} up, {size(totals['bytes_down'])} down")
    if privacy["spent"] is not None:
        planned = "" if privacy["planned"] is None else f" of {privacy['planned']:.3g}"
        parts.append(f"epsilon {privacy['spent']:.3g}{planned}")
    parts += [f"{each['name']}: {each['text']}" for each in view["alerts"]]
    return "  ".join(parts)


def screen(view: Mapping[str, Any]) -> RenderableType:
    """How a run is, for a terminal."""
    from perfedrec.runs.progress import size

    totals, began = view["totals"], datetime.fromtimestamp(view["began"]).strftime("%Y-%m-%d %H:%M")
    users = "" if view["users"] is None else f"{counted(view['users'], 'user')}, "
    title = Text.assemble(
        (view["method"], "bold"), f"  run {view['run']}  ", (view["state"], "bold"), f"  {view['place']}"
    )
    why = [Text(view["why"])] if view["why"] else []
    facts = (
        f"{users}{size(totals['bytes_up'])} up, {size(totals['bytes_down'])} down, {totals['seconds']:.1f} s in rounds"
    )
    full = WIDTH * view["done"] // max(view["planned"], 1)
    bar = Text.assemble(("━" * full, "green"), ("━" * (WIDTH - full), "dim"))
    parts: list[RenderableType] = [
        title,
        *why,
        bar,
        Text(f"{facts}; started {began}"),
        _nodes(view),
        _rounds(view),
        *([_unusual(view)] if view["unusual"] else []),
        _figures(view),
    ]
    return Group(*parts)


def _nodes(view: Mapping[str, Any]) -> Table:
    table = Table("node", "state", "users", "rounds without it", "last reason", title="nodes", title_justify="left")
    for each in view["nodes"]:
        counts = ", ".join(f"{reason} {count}" for reason, count in each["without"].items())
        users = "" if each["users"] is None else f"{each['users']:,}"
        table.add_row(each["name"], Text(each["state"], STYLES.get(each["state"], "")), users, counts, each["detail"])
    return table


def _rounds(view: Mapping[str, Any]) -> Table:
    from perfedrec.runs.progress import size

    metric = view["accuracy"]["metric"]
    table = Table("", "clients", "seconds", "up", "down", metric, title="last rounds", title_justify="left")
    for each in view["history"][-ROUNDS:]:
        valid = (each["valid"] or {}).get(metric)
        clients = f"{each['clients']} of {each['cohort']}" + (
            f", aborted: {each['aborted']}" if each["aborted"] else ""
        )
        sent = (size(each["bytes_up"]), size(each["bytes_down"]))
        name = each["name"] if each["phase"] == "train" else f"{each['name']} {each['phase']}"
        table.add_row(name, clients, f"{each['seconds']:.2f}", *sent, "" if valid is None else f"{valid:.4f}")
    return table


def _unusual(view: Mapping[str, Any]) -> Table:
    """What stood out last, and where decisions are taken."""
    caption = f"decide: perfedrec federation nodes {view['keys']}" if view["keys"] else None
    table = Table("", "node", "what", title="what stood out", title_justify="left", caption=caption)
    for each in view["unusual"][-ROUNDS:]:
        table.add_row(each["name"], ", ".join(each["nodes"]), each["text"])
    return table


def _figures(view: Mapping[str, Any]) -> Table:
    """Accuracy, privacy and alerts, each with its name."""
    accuracy, table = view["accuracy"], Table(show_header=False, box=None)
    if accuracy["best"] is not None:
        test = "" if accuracy["test"] is None else f"; test {accuracy['test']:.4f}"
        best = f"{accuracy['last']:.4f}, best {accuracy['best']:.4f} in {accuracy['best_round']}{test}"
        table.add_row(Text("accuracy", "bold"), f"{accuracy['metric']} {best}")
    table.add_row(Text("privacy", "bold"), spent(view["privacy"]))
    for each in view["alerts"]:
        table.add_row(Text(each["name"], "bold red"), each["text"])
    if not view["alerts"]:
        table.add_row(Text("alerts", "bold"), "none")
    return table


def spent(privacy: Mapping[str, Any]) -> str:
    """The privacy that was spent, against the plan, in one sentence."""
    if privacy["spent"] is None:
        return privacy["claim"] or "not known before the first round"
    planned = privacy["spent"] if privacy["planned"] is None else privacy["planned"]
    return (
        f"epsilon {privacy['spent']:.3g} of {planned:.3g} planned, against the coordinator, delta {privacy['delta']:g}"
    )


def page(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="folder of a run (serve --output), or one with several runs in it")
    ],
    port: Annotated[int, typer.Option(help="port on 127.0.0.1 to listen on (0: a free one)")] = 0,
    token: Annotated[
        Path | None,
        typer.Option(help="file with the operator's token, which is made at the first start (default: operator.token)"),
    ] = None,
    listen_on: Annotated[int | None, typer.Option(hidden=True)] = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Show how a federation is on a page for its operator, until SIGTERM or Ctrl-C. Also after the end of the run.

    Where FOLDER is a run, the token lies beside it, otherwise in FOLDER. Nobody gets in without it.

    [bold]perfedrec federation page runs --port 9500[/bold]
    """
    with one_line():
        from perfedrec.core.extras import needed_by

        with needed_by("federation page", "web"):
            from perfedrec.web.guard import Access, token_file
            from perfedrec.web.operator import ENTER, operator_page
            from perfedrec.web.running import Listener, listening, serve
        from perfedrec.federation.status import home

        place = token or home(folder) / TOKEN
        access = Access(token_file(place))
        with ExitStack() as stack:
            if listen_on is None:
                listener = stack.enter_context(listening(port))
            else:
                inherited = stack.enter_context(socket.socket(fileno=listen_on))
                listener = Listener(inherited, f"http://127.0.0.1:{inherited.getsockname()[1]}")
            # Logs may be read by others: a token is shown on a terminal only.
            where = f"{listener.address}/?token={access.one_time()} (once), and " if sys.stderr.isatty() else ""
            print(f"operator's page: {where}{listener.address}{ENTER} with the token in {place}", file=sys.stderr)
            if until_stdin_closes:
                threading.Thread(target=_end_with_parent, daemon=True).start()
            serve(operator_page(folder, access), listener)


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
