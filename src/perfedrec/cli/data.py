"""perfedrec data: inspect, prepare and download interaction data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from perfedrec.cli.common import AsJson, Columns, Format, Header, KCore, MinRating, console, one_line, print_data
from perfedrec.core.counted import counted

app = typer.Typer(help="Inspect, prepare and download interaction data.", no_args_is_help=True)


@app.command("info")
def data_info(
    file: Annotated[str, typer.Argument(help="file, folder, or synthetic:users=..,items=..")],
    format: Format = "auto",
    columns: Columns = "",
    header: Header = None,
    min_rating: MinRating = None,
    relations: Annotated[Path | None, typer.Option(help="file of relations between users, such as trust.txt")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a file is read, and its users, items, density, degrees, ratings and times; or those of a data set.

    [bold]perfedrec data info ratings.csv[/bold]
    """
    with one_line():
        from perfedrec.data import describe, load, parse_columns, read_relations, read_with_report
        from perfedrec.data.interactions import unique_ids
        from perfedrec.data.prepare import rated

        title, chosen = file, parse_columns(columns)
        read: dict[str, Any]
        if file.partition(":")[0] == "synthetic" or Path(file).is_dir():
            data = load(file, format=format, columns=chosen, header=header, min_rating=min_rating)
            facts, title, lines = describe(data.train), f"{file}, training part", data.notes.lines()
            users, known, read = data.train.user_ids, data.relations, {"remarks": lines}
        else:
            frame, report = read_with_report(file, format, chosen, header=header, min_rating=min_rating)
            if min_rating is not None:
                frame = rated(frame, min_rating)
            facts, lines, read = describe(frame), report.lines(), report.facts()
            users, known = unique_ids(frame["user"]), None
            if again := facts["duplicates"]:
                repeated = f"{counted(again, 'row')} {'repeats' if again == 1 else 'repeat'} a pair of user and item"
                lines.append(f"{repeated} (duplicates): a pair is one interaction, the earliest")
        if relations is not None:
            known, said = read_relations(relations, users)
            lines = [*lines, *said]
        if known is not None:
            facts["relations"] = known.facts()
        if as_json:
            print(json.dumps(facts | {"read": read}, default=str))
            return
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)
        table = Table("figure", "value", title=title)
        for name, value in flat(facts):
            if value is not None:
                table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
        console.print(table)


@app.command("prepare")
def data_prepare(
    source: Annotated[str, typer.Argument(help="file, folder, or synthetic:users=..,items=..")],
    output: Annotated[Path, typer.Option(help="folder to write train, valid and test to; must be new or empty")],
    format: Format = "auto",
    columns: Columns = "",
    header: Header = None,
    min_rating: MinRating = None,
    k_core: KCore = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="leave-one-out, ratio, global-time, folds or users (default: what the options below belong to)"
        ),
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="shares of train, valid and test, for ratio and global-time: 0.8,0.1,0.1")
    ] = None,
    valid_from: Annotated[str | None, typer.Option(help="date where validation starts, for global-time")] = None,
    test_from: Annotated[str | None, typer.Option(help="date where test starts, for global-time")] = None,
    folds: Annotated[int | None, typer.Option(max=2**31 - 1, help="number of folds, for folds")] = None,
    fold: Annotated[int, typer.Option(help="the fold that is tested, from 0")] = 0,
    test_users: Annotated[
        float | None, typer.Option(help="share of users who are held out from training as a whole, for users: 0.1")
    ] = None,
    order: Annotated[
        str, typer.Option(help="order of a user's interactions: auto, time, file (its lines) or random")
    ] = "auto",
    ties: Annotated[
        str, typer.Option(help="a user's interactions at the same time: random (order), or together (never split)")
    ] = "random",
    seed: Annotated[int, typer.Option(help="seed of what is random in the split")] = 0,
) -> None:
    """Filter and split interactions, and write them as a data set.

    Leave-one-out and ratio follow the time of each user, so that training has interactions that are later than tested
    ones of other users; global-time has none.

    [bold]perfedrec data prepare ratings.csv --min-rating 4 --k-core 5 --output prepared[/bold]
    """
    with one_line():
        from perfedrec.data import load, parse_columns, parse_ratio, write

        dataset = load(
            source,
            format=format,
            columns=parse_columns(columns),
            header=header,
            min_rating=min_rating,
            k_core=k_core or 0,
            split_how=split,
            ratio=None if ratio is None else parse_ratio(ratio),
            valid_from=valid_from,
            test_from=test_from,
            folds=folds,
            fold=fold,
            test_users=test_users,
            order=order,
            ties=ties,
            seed=seed,
        )
        write(dataset, output)
        print_data(dataset)
        console.print(f"written to {output}", soft_wrap=True)


@app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="ml-100k, ml-1m, ...")],
    output: Annotated[Path, typer.Option(help="folder to unpack into")] = Path("data"),
) -> None:
    """Download a public data set, verify its checksum, and show its licence.

    [bold]perfedrec data fetch ml-100k --output data[/bold]
    """
    with one_line():
        from perfedrec.data import SOURCES, fetch

        folder = fetch(name, output)
        console.print(SOURCES[name].licence)
        console.print(f"unpacked in {folder}", soft_wrap=True)


def flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The figures of nested dicts, each with the names on its way."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value
