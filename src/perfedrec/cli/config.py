"""perfedrec config: presets, options and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from perfedrec.cli.common import Algorithm, console, one_line

app = typer.Typer(help="Show presets, options and configurations.", no_args_is_help=True)


@app.command("list")
def config_list() -> None:
    """List methods, presets, privacy profiles, and the parts that --without switches off."""
    from perfedrec.methods.registry import METHODS
    from perfedrec.runs.preset_files import ABLATIONS, presets

    console.print("methods: " + ", ".join(METHODS))
    console.print("presets: " + ", ".join(presets()))
    console.print("privacy profiles: " + ", ".join(presets("profiles")))
    table = Table("--without", "sets")
    for part, changes in ABLATIONS.items():
        table.add_row(part, ", ".join(f"{key}={'off' if value is None else value}" for key, value in changes.items()))
    console.print(table)


@app.command("keys")
def config_keys(algorithm: Algorithm = None) -> None:
    """List all options of a method, each with its default and a description.

    [bold]perfedrec config keys --algorithm lightgcn[/bold]
    """
    with one_line():
        from perfedrec.runs.config import config_type
        from perfedrec.runs.dotted import keys
        from perfedrec.runs.preset_files import DEFAULT

        kind = config_type(algorithm or DEFAULT)
        table = Table("key", "default", "description")
        for key, field in keys(kind).items():
            table.add_row(key, str(field.default), field.description)
        console.print(table)


@app.command("show")
def config_show(what: Annotated[str, typer.Argument(help="a preset, a run folder or a TOML file")]) -> None:
    """Print a complete configuration as TOML.

    [bold]perfedrec config show paper > mine.toml[/bold]
    """
    with one_line():
        from perfedrec.runs import config as configuration
        from perfedrec.runs.folder import RunFolder
        from perfedrec.runs.preset_files import presets

        path = Path(what)
        if what not in presets() and path.is_dir():
            resolved = RunFolder(path).config()
        elif what not in presets() and path.is_file():
            resolved = configuration.load(None, path)
        else:
            resolved = configuration.load(what)
        print(resolved.to_toml(), end="")
