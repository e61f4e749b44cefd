"""perfedrec node: what the owner of a node sees and decides: what left it, its rules, and each user's own data."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from perfedrec.cli.common import AsJson, console, one_line
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError

StoreFile = Annotated[Path, typer.Option("--store", help="the node's file")]
User = Annotated[str, typer.Option("--user", help="id of a user")]
UserAndItems = Annotated[str, typer.Argument(help="id of a user")]

WHAT = {
    "who takes part": "told who takes part",
    "model": "received a model",
    "table of items": "ordered a table of items",
    "secure sum": "exchanged keys for a secure sum",
    "train": "a round of training",
    "evaluate": "how well lists rank",
    "degrees": "how often each item occurs",
    "spectral": "a pass before training",
    "sizes": "sizes of clusters",
    "clusters": "a pass for clusters",
    "join": "first sums of neighbours",
}
"""What a node has answered, by the phase in its journal."""


def privacy(
    store: StoreFile,
    user: Annotated[str | None, typer.Option("--user", help="only answers that this user is in")] = None,
    limit: Annotated[int, typer.Option(help="how many of the newest entries are shown")] = 30,
    as_json: AsJson = False,
) -> None:
    """Show what has left this node: when, to whom, under which protection, how much; and what was refused.

    [bold]perfedrec node privacy --store home.node[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        with Node.open(store) as node:
            rows, totals = node.journal(user, limit), node.privacy()
        if as_json:
            print(json.dumps({**totals, "journal": rows}))
            return
        _print_journal(rows, f"what left {store}" + (f", with {user} in it" if user else ""))
        _print_totals(totals)


def _print_journal(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The journal as a table, and below it the statements that it refers to."""
    statements: dict[tuple[str, str], int] = {}
    columns = ("when", "what", "round", "users", "other nodes", "sent", "received", "epsilon", "protection")
    table = Table(*columns, title=title)
    for row in rows:
        found, number = row["protection"], ""
        if found is not None:
            key = found["profile"], found["statement"]
            number = f"{found['profile']} [{statements.setdefault(key, len(statements) + 1)}]"
        what = WHAT.get(row["phase"], f"phase {row['phase']}")
        if row["refused"] is not None:
            after = "" if row["stage"] is None else f"{what}, after stage {row['stage']} "
            what = f"{after}refused: {row['refused']}"
        what += f" ({row['times']} times)" if row["times"] > 1 else ""
        table.add_row(
            datetime.fromtimestamp(row["time"]).strftime("%Y-%m-%d %H:%M:%S"),
            what,
            *("" if row[name] is None else str(row[name]) for name in ("round", "users", "others")),
            *(f"{row[name]:,} B" for name in ("sent", "received")),
            _epsilon(row),
            number,
        )
    if not rows:
        console.print("nothing has left this node, and nothing was refused", soft_wrap=True)
        return
    console.print(table)
    if any(row["others"] == 0 for row in rows):
        console.print("other nodes 0: the coordinator saw the sum of this node alone", soft_wrap=True)
    for (profile, text), place in statements.items():
        console.print(f"[{place}] protection {profile}: {text}", soft_wrap=True, highlight=False)


def _epsilon(row: Mapping[str, Any]) -> str:
    if row["epsilon"] is not None:
        return f"{row['epsilon']:.3g}"
    return "" if row["users"] is None or row["phase"] == "who takes part" else "none"


def _print_totals(totals: Mapping[str, Any]) -> None:
    for run in totals["runs"]:
        spent = "no guarantee of differential privacy"
        if run["epsilon"] is not None:
            spent = f"epsilon {run['epsilon']:.3g} so far, against {run['against']}"
        refused = f", {run['refusals']} refused" if run["refusals"] else ""
        name = "no run" if run["run"] is None else f"run {run['run']}"
        name += "" if run["coordinator"] is None else f" of {run['coordinator']}"
        size = f"{run['sent']:,} bytes sent, {run['received']:,} received"
        console.print(
            f"{name}: {counted(run['answers'], 'answer')}{refused}; {size}; {spent}", soft_wrap=True, highlight=False
        )


def rules(
    store: StoreFile,
    require: Annotated[
        str | None,
        typer.Option(help="the least protection of a run: none, paper, secure, private; usual: back to the default"),
    ] = None,
    pause: Annotated[bool, typer.Option("--pause", help="answer nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="answer again after --pause")] = False,
    leave: Annotated[
        bool, typer.Option("--leave", help="take part in no run, and in none of those so far again")
    ] = False,
    come_back: Annotated[bool, typer.Option("--come-back", help="take part in new runs again after --leave")] = False,
    as_json: AsJson = False,
) -> None:
    """Show or change what this node insists on. A node that runs obeys at once.

    [bold]perfedrec node rules --store home.node --require private[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        for first, second, both in (
            ("--pause", "--resume", pause and resume),
            ("--leave", "--come-back", leave and come_back),
        ):
            if both:
                raise ConfigError(f"{first} and {second} were both given; expected one of them")
        with Node.open(store) as node:
            changes: dict[str, Any] = {} if require is None else {"require": None if require == "usual" else require}
            changes |= {"paused": pause} if pause or resume else {}
            changes |= {"left": leave} if leave or come_back else {}
            found = node.set_rules(**changes)
        if as_json:
            print(json.dumps(found))
            return
        for line in _rules(found):
            console.print(line, soft_wrap=True, highlight=False)


def _rules(found: Mapping[str, Any]) -> list[str]:
    from perfedrec.runtimes.node.rules import REQUIRED

    names, why = found["require"], "these rules say so"
    if found["chosen"] is None:
        why = "the usual, because the rules say nothing" if names == [REQUIRED] else "node run was started like that"
    elif names != [found["chosen"]]:
        why = "these rules and the start of node run say so"
    least = "no protection" if names == ["none"] else f"at least the protection of profile {' and '.join(names)}"
    lines = [f"a run needs {least} ({why})"]
    if found["left"]:
        return [*lines, "the node has left the federation: it takes part in no run (--come-back: in new runs)"]
    return [*lines, "the node is paused: it answers nothing (--resume)" if found["paused"] else "the node takes part"]


def items(store: StoreFile, user: User, as_json: AsJson = False) -> None:
    """Show the items that are stored about a user.

    [bold]perfedrec node items --store home.node --user ann[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        with Node.open(store) as node:
            own, dismissed = node.items_of(user), node.dismissed(user)
        if as_json:
            print(json.dumps({"user": user, "items": own, "dismissed": dismissed}))
            return
        table = Table("item", "title", "", title=f"items of {user}")
        for row, mark in [*((row, "") for row in own), *((row, "dismissed") for row in dismissed)]:
            table.add_row(str(row["item"]), row["title"] or "", mark)
        console.print(table)


def remove(
    user: UserAndItems,
    items: Annotated[list[str], typer.Argument(help="items whose interactions are deleted")],
    store: StoreFile,
) -> None:
    """Delete interactions of a user. What they have added to earlier sums stays there.

    [bold]perfedrec node remove ann i17 --store home.node[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        with Node.open(store) as node:
            count = node.remove(user, *items)
        print(f"{counted(count, 'interaction')} of {user} deleted", flush=True)


def dismiss(
    user: UserAndItems,
    items: Annotated[list[str], typer.Argument(help="items that are not to be recommended")],
    store: StoreFile,
    undo: Annotated[bool, typer.Option("--undo", help="recommend them again")] = False,
) -> None:
    """Never recommend items to a user again. That stays on the node, and is not trained on.

    [bold]perfedrec node dismiss ann i4 --store home.node[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        with Node.open(store) as node:
            count = (node.restore if undo else node.dismiss)(user, *items)
        what = "recommended again" if undo else "not recommended any more"
        print(f"{counted(count, 'item')} {what} to {user}", flush=True)


def export_user(
    store: StoreFile,
    user: User,
    output: Annotated[Path, typer.Option(help="the file to write: .json has everything, .csv the items")],
) -> None:
    """Write what is stored about a user to a file: everything as JSON, or the items as CSV, which node import reads.

    [bold]perfedrec node export-user --store home.node --user ann --output ann.json[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        if output.suffix not in (".json", ".csv"):
            raise ConfigError(f"--output {output}: expected a name that ends in .json or .csv")
        if output.exists():
            raise ConfigError(f"{output}: exists already; expected a new file")
        with Node.open(store) as node:
            rows, everything = node.items_of(user), node.export(user) if output.suffix == ".json" else {}
        with open(output, "x", encoding="utf-8", newline="") as file:
            if output.suffix == ".json":
                json.dump(everything, file, indent=1, ensure_ascii=False)
                file.write("\n")
            else:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["user", "item", "title"])
                writer.writerows([user, row["item"], row["title"] or ""] for row in rows)
        console.print(f"{output}: {counted(len(rows), 'item')} of {user}", soft_wrap=True)
