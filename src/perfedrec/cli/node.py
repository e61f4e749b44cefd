"""perfedrec node: a node's own file, and what its owner does with it without a coordinator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from perfedrec.cli.common import AsJson, Columns, FinishedRun, Format, Header, Moved, console, one_line, print_list
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError

app = typer.Typer(help="Keep users' data on a node, and recommend there.", no_args_is_help=True)

StoreFile = Annotated[Path, typer.Option("--store", help="the node's file")]
ModelFile = Annotated[Path | None, typer.Option("--model", help="a model that perfedrec node export wrote")]
User = Annotated[str, typer.Option("--user", help="id of a user")]


@app.command("init")
def node_init(
    store: StoreFile,
    catalogue: Annotated[
        Path | None, typer.Option(help="all items of the federation in its order: one id a line, or parquet")
    ] = None,
    model: ModelFile = None,
) -> None:
    """Make the file of a new node, from the federation's catalogue or from a model file.

    If the federation uses user attributes, its user_encoding.csv has to be beside the catalogue.

    [bold]perfedrec node init --store home.node --catalogue items.txt[/bold]
    """
    with one_line():
        from perfedrec.data import read_catalogue
        from perfedrec.runtimes.node import Store

        if (catalogue is None) == (model is None):
            raise ConfigError("expected either --catalogue FILE or --model FILE, which has a catalogue")
        if catalogue is not None:  # with the encoding of attributes beside it
            common, given = read_catalogue(catalogue), None
        else:
            assert model is not None
            from perfedrec.federation.model_file import read_model

            given = read_model(model)
            common = given.catalogue
        with Store.create(store, common.item_ids, encoding=common.encoding) as made:
            if given is not None:
                given.give(made)
            attributes = f", {counted(made.n_user_attributes, 'user attribute')}" if made.encoding is not None else ""
            console.print(
                f"{store}: {counted(made.n_items, 'item')}{attributes}, catalogue {made.catalogue}", soft_wrap=True
            )


@app.command("import")
def node_import(
    file: Annotated[Path, typer.Argument(help="interactions of one or many users, in any format of perfedrec data")],
    store: StoreFile,
    format: Format = "auto",
    columns: Columns = "",
    header: Header = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="leave out interactions with items that are not in the catalogue")
    ] = False,
    first_identity: Annotated[
        int | None,
        typer.Option(
            help="identity of the first new user (default: the federation gives identities when the node joins)"
        ),
    ] = None,
) -> None:
    """Import a file of interactions, completely or not at all. Interactions that are there already stay as they are.

    If the federation uses user attributes, they are read from user_attributes.csv beside the file.

    [bold]perfedrec node import mine.csv --store home.node[/bold]
    """
    with one_line():
        from perfedrec.data import parse_columns, read_with_report
        from perfedrec.federation.offline import import_file
        from perfedrec.runtimes.node import Store

        frame, report = read_with_report(file, format, parse_columns(columns), header=header, held_out=True)
        with Store.open(store) as opened:
            users, interactions, skipped, described = import_file(opened, file, frame, skip_unknown, first_identity)
        left = f", {skipped} with unknown items left out" if skipped else ""
        left += f", attributes of {counted(described, 'user')}" if described else ""
        console.print(f"{counted(interactions, 'new interaction')}, {counted(users, 'new user')}{left}", soft_wrap=True)
        console.print(report.lines()[0], soft_wrap=True, highlight=False)


@app.command("add")
def node_add(
    user: Annotated[str, typer.Argument(help="id of a user, who may be new")],
    items: Annotated[list[str], typer.Argument(help="items that the user has interacted with")],
    store: StoreFile,
) -> None:
    """Add interactions of a user. They are on the disk when the command reports them.

    [bold]perfedrec node add ann i17 --store home.node[/bold]
    """
    with one_line():
        from perfedrec.runtimes.node.file import NodeFile

        with NodeFile.open(store) as opened:
            new = opened.add_interactions(user, *items)
        print(f"{counted(new, 'new interaction')} of {user}", flush=True)


@app.command("catalogue")
def node_catalogue(
    file: Annotated[Path, typer.Argument(help="table of items: CSV, parquet, or MovieLens u.item or movies.csv")],
    store: StoreFile,
) -> None:
    """Give items titles, pictures and attributes, which are then in the node's file.

    A table has a column item with ids, and may have title, picture (a file beside the table) and any others.

    [bold]perfedrec node catalogue movies.csv --store home.node[/bold]
    """
    with one_line():
        from perfedrec.core.nearest import listing
        from perfedrec.data.details import read_details
        from perfedrec.federation.owner import Node

        found = read_details(file)
        with Node.open(store) as node:
            known, others = node.describe(found)
        titles, pictures = (sum(map(bool, each)) for each in zip(*((x.title, x.picture) for x in found), strict=True))
        named = list(dict.fromkeys(name for each in found for name in each.attributes))
        about = f"{file} has {counted(titles, 'title')}, {counted(pictures, 'picture')}"
        about += f", and {listing(named)}" if named else ""
        left = f", {others} left out that the catalogue does not have"
        console.print(f"{about}: {counted(known, 'item')} described{left if others else ''}", soft_wrap=True)


@app.command("recommend")
def node_recommend(
    store: StoreFile,
    user: User,
    k: Annotated[int, typer.Option(help="length of the list")] = 20,
    as_json: AsJson = False,
) -> None:
    """Recommend to a user of this node; no other machine is asked.

    [bold]perfedrec node recommend --store home.node --user ann --k 10[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        with Node.open(store) as node:
            found = node.recommend(user, k)
            empty = "has or has dismissed every item" if node.dismissed(user) else "has all items"
        if as_json:
            print(json.dumps({"user": user, "items": found}))
        else:
            print_list(found, user, empty)


@app.command("status")
def node_status(store: StoreFile, as_json: AsJson = False) -> None:
    """Show how much is in a node's file.

    [bold]perfedrec node status --store home.node[/bold]
    """
    with one_line():
        from perfedrec.cli.data import flat
        from perfedrec.federation.owner import Node

        with Node.open(store) as node:
            found = node.status()
        if as_json:
            print(json.dumps(found))
            return
        table = Table("figure", "value", title=found.pop("store"))
        for name, value in flat(found):
            table.add_row(name.replace("_", " "), "none" if value is None else str(value))
        console.print(table)


@app.command("forget")
def node_forget(
    store: StoreFile,
    user: User,
    request: Annotated[
        Path | None, typer.Option(help="new file for a signed request to the federation, to forget the user as well")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="private key of this node, which signs the request")] = None,
) -> None:
    """Delete everything that a node has about a user, and overwrite the deleted data.

    [bold]perfedrec node forget --store home.node --user ann[/bold]

    [bold]perfedrec node forget --store home.node --user ann --request ann.request --key node7[/bold]
    """
    with one_line():
        from perfedrec.federation.owner import Node

        if (request is None) != (key is None):
            raise ConfigError("a request is signed with the key of this node; expected both --request and --key")
        with Node.open(store) as node:
            if request is not None and key is not None:
                from perfedrec.federation.requests import make

                make(node, user, key).write(request)  # before: afterwards nobody knows the user's number
            stays = node.forget(user)
        if request is not None:
            console.print(f"{request}: give it to the operator (perfedrec federation forget)", soft_wrap=True)
        console.print(f"nothing about {user} is left in {store}", soft_wrap=True)
        console.print(stays, soft_wrap=True, highlight=False)


@app.command("verify")
def node_verify(
    certificate: Annotated[Path, typer.Argument(help="certificate that the operator gave back: forgotten-NAME.json")],
    operator: Annotated[Path, typer.Option(help="public key of the operator (.pub)")],
    request: Annotated[
        Path | None, typer.Option(help="request that the certificate must be about (not for one of perfedrec forget)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a certificate: that the operator has signed it, that it is whole, and that it is about your request.

    [bold]perfedrec node verify forgotten-1f.json --operator operator.pub --request ann.request[/bold]
    """
    with one_line():
        from perfedrec.cli.forget import print_certificate
        from perfedrec.federation.requests import verify

        found = verify(certificate, operator, request)
        if as_json:
            print(json.dumps(json.loads(found.text())))
            return
        print_certificate(found)
        about = "" if request is None else f", and about the request in {request}"
        console.print(f"{certificate}: signed with the key in {operator}, as it is{about}", soft_wrap=True)


@app.command("export")
def node_export(
    run: FinishedRun,
    output: Annotated[Path, typer.Option(help="the file to write")],
    data: Moved = None,
) -> None:
    """Write the model of a finished run to a file, for nodes that did not take part. It holds nothing about any user.

    [bold]perfedrec node export --run runs/a --output served.model[/bold]
    """
    with one_line():
        from perfedrec.federation.model_file import export

        export(run, output, data)
        console.print(f"model written to {output}", soft_wrap=True)


@app.command("receive")
def node_receive(
    store: StoreFile, model: Annotated[Path, typer.Option(help="a model that perfedrec node export wrote")]
) -> None:
    """Recommend with a newer model from now on.

    [bold]perfedrec node receive --store home.node --model served.model[/bold]
    """
    with one_line():
        from perfedrec.federation.model_file import read_model
        from perfedrec.runtimes.node import Store

        given = read_model(model)
        with Store.open(store) as opened:
            given.give(opened)
        console.print(f"{store}: serves {given.run}, round {given.round}", soft_wrap=True)
