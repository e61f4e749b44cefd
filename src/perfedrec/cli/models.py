"""perfedrec models: versions of the served model, and which of them nodes get."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from perfedrec.cli.common import AsJson, Moved, console, one_line
from perfedrec.core.errors import ConfigError

if TYPE_CHECKING:
    from perfedrec.federation.registry import Version

app = typer.Typer(help="Keep versions of served models, and choose the one that nodes get.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--registry", help="folder of the registry")]
Number = Annotated[int, typer.Argument(metavar="VERSION", help="number of a version")]
REGISTRY = Path("models")


@app.command("list")
def models_list(registry: Folder = REGISTRY, as_json: AsJson = False) -> None:
    """List all versions, with the accuracy and the privacy that each has, and which one is promoted.

    [bold]perfedrec models list --registry models[/bold]
    """
    with one_line():
        from perfedrec.federation.registry import Registry

        if not registry.exists():
            raise ConfigError(f"{registry}: there is no registry of models; expected perfedrec models add RUN first")
        opened = Registry(registry)
        found, promoted = opened.versions(), opened.promoted
        if as_json:
            rows = [{**asdict(each), "promoted": each.number == promoted} for each in found]
            print(json.dumps({"registry": str(registry), "catalogue": opened.catalogue, "versions": rows}))
            return
        table = Table("version", "", "method", "run", "metric", "validation", "test", "epsilon", "users", "added")
        for each in found:
            mark = "promoted" if each.number == promoted else ""
            figures = ["" if value is None else f"{value:.4f}" for value in (each.valid, each.test)]
            epsilon = "none" if each.epsilon is None else f"{each.epsilon:.3g}"
            added = datetime.fromtimestamp(each.added).strftime("%Y-%m-%d %H:%M")
            table.add_row(
                str(each.number), mark, each.method, each.run, each.metric, *figures, epsilon, f"{each.users:,}", added
            )
        console.print(table)


@app.command("add")
def models_add(
    run: Annotated[Path, typer.Argument(help="folder of a finished run, of a federation or simulated")],
    registry: Folder = REGISTRY,
    data: Moved = None,
    promote: Annotated[bool, typer.Option("--promote", help="let nodes get it from now on")] = False,
) -> None:
    """Add the model of a finished run as a new version. The registry is made with the first one.

    [bold]perfedrec models add run --registry models[/bold]
    """
    with one_line():
        from perfedrec.federation.registry import Registry

        opened = Registry(registry)
        version = opened.add(run, data)
        if promote:
            opened.promote(version.number)
        how = "promoted" if opened.promoted == version.number else "not promoted"
        console.print(f"{_told(version)}; {how}", soft_wrap=True)


@app.command("promote")
def models_promote(version: Number, registry: Folder = REGISTRY) -> None:
    """Let nodes get a version from now on: at the end of the next serve --models, and as the file served.model.

    [bold]perfedrec models promote 3 --registry models[/bold]
    """
    with one_line():
        from perfedrec.federation.registry import Registry

        console.print(f"{_told(Registry(registry).promote(version))}; promoted", soft_wrap=True)


@app.command("roll-back")
def models_roll_back(registry: Folder = REGISTRY) -> None:
    """Let nodes get the version again that was promoted before the present one.

    [bold]perfedrec models roll-back --registry models[/bold]
    """
    with one_line():
        from perfedrec.federation.registry import Registry

        console.print(f"{_told(Registry(registry).roll_back())}; promoted again", soft_wrap=True)


def _told(version: Version) -> str:
    test = "" if version.test is None else f", test {version.metric} {version.test:.4f}"
    return f"version {version.number}: {version.method}, run {version.run}, round {version.round}{test}"
