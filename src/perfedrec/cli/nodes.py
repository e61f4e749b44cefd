"""perfedrec federation nodes: who may take part, and what the operator decides about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, console, one_line
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError

if TYPE_CHECKING:
    from perfedrec.federation.members import Known, Register

STYLES = {"member": "green", "new": "yellow", "held": "yellow", "excluded": "red"}


def nodes(
    keys: Annotated[Path, typer.Argument(metavar="KEYS", help="folder with the nodes' public keys (serve --nodes)")],
    exclude: Annotated[
        str | None, typer.Option(metavar="NAME", help="let a node take no part from the next round on")
    ] = None,
    admit: Annotated[
        str | None, typer.Option(metavar="NAME", help="let what a node sends count from the next round on")
    ] = None,
    undo: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="undo a decision; the one before it holds again")
    ] = None,
    because: Annotated[str, typer.Option(metavar="TEXT", help="the reason, for whoever reads the decision")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the nodes of a federation and all decisions about them, or decide about one.

    A decision holds from the next round on, without a restart of serve, and in later runs with these keys.

    [bold]perfedrec federation nodes keys[/bold]

    [bold]perfedrec federation nodes keys --exclude node7 --because "its sums are ten times as large"[/bold]

    [bold]perfedrec federation nodes keys --undo 4[/bold]
    """
    with one_line():
        from perfedrec.federation.members import Known, Register

        if sum(each is not None for each in (exclude, admit, undo)) > 1:
            raise ConfigError("expected one of --exclude, --admit and --undo")
        if because and all(each is None for each in (exclude, admit, undo)):
            raise ConfigError("--because is the reason of a decision; expected --exclude, --admit or --undo with it")
        _check_keys(keys)
        register, number = Register(keys), None
        before = register.nodes()
        if exclude is not None:
            number = register.exclude(exclude, because)
        elif admit is not None:
            number = register.admit(admit, because)
        elif undo is not None:
            number = register.undo(undo, because)
        if as_json:
            print(json.dumps({"nodes": [asdict(each) for each in _all(register)], "decisions": _decisions(register)}))
        elif number is None:
            _show(register)
        else:
            name = next(str(each["node"]) for each in register.lines() if each["number"] == number)
            each = register.nodes()[name]
            how = f" (--undo {number} undoes it)" if undo is None else ""
            was = before.get(name, Known(name))
            held = (was.state, was.left) == (each.state, each.left)
            when = "already: this changes nothing" if held else "from the next round on"
            console.print(f"decision {number}: {name} is {_called(each)} {when}{how}", soft_wrap=True)


def _check_keys(folder: Path) -> None:
    """Raise :class:`ConfigError` for what is no folder with public keys."""
    if not folder.exists():
        raise ConfigError(f"{folder}: no such folder; expected the folder of serve --nodes")
    if not any(folder.glob("*.pub")):
        inside = folder / "keys"
        meant = f", perhaps {inside}" if any(inside.glob("*.pub")) else ""
        raise ConfigError(f"{folder}: no public keys (*.pub); expected the folder of serve --nodes{meant}")


def _all(register: Register) -> list[Known]:
    """The nodes that have a key, and those that had one."""
    from perfedrec.federation.members import Known

    known = register.nodes()
    names = sorted({*register.names(), *known} - {"service"})
    return [known.get(name, Known(name)) for name in names]


def _decisions(register: Register) -> list[dict[str, Any]]:
    """All decisions in their order; each says whether it was undone, and by which number."""
    lines = register.lines()
    undone = {each["of"]: each["number"] for each in lines if each["event"] == "undo"}
    chosen = ("exclude", "admit", "hold", "undo")
    return [{**each, "undone": undone.get(each["number"])} for each in lines if each["event"] in chosen]


def _show(register: Register) -> None:
    table = Table("node", "state", "users", "known since", "why", title="nodes", title_justify="left")
    for each in _all(register):
        users = "" if each.users is None else f"{each.users:,}"
        since = "" if each.since is None else _moment(each.since)
        table.add_row(each.name, Text(each.state, STYLES[each.state]), users, since, Text(each.why))
    console.print(table)
    decisions = _decisions(register)
    if not decisions:
        console.print("no decisions so far")
        return
    table = Table("decision", "on", "node", "", "why", title="decisions", title_justify="left")
    for line in decisions:
        what = line["event"] if line["event"] != "undo" else f"undo {line['of']}"
        what += f" (undone by {line['undone']})" if line["undone"] is not None else ""
        row = (str(line["number"]), _moment(line["time"]), str(line["node"]), what, str(line.get("because", "")))
        table.add_row(*(Text(each) for each in row))
    console.print(table)


def _called(each: Known) -> str:
    return {"member": "a member", "new": f"new, with {counted(each.left, 'round')} left,"}.get(each.state, each.state)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
