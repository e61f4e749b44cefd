"""perfedrec config: presets, options and configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from perfedrec.cli.common import Algorithm, AsJson, console, one_line

app = typer.Typer(help="Show presets, options and configurations.", no_args_is_help=True)


@app.command("list")
def config_list(as_json: AsJson = False) -> None:
    """List methods, presets, privacy profiles, and the parts that --without switches off."""
    with one_line():
        from perfedrec.core.dotted import as_text
        from perfedrec.methods.registry import METHODS
        from perfedrec.runs.preset_files import ABLATIONS, presets

        names = {"methods": list(METHODS), "presets": presets(), "privacy profiles": presets("profiles")}
        if as_json:
            print(json.dumps({**names, "without": ABLATIONS}))
            return
        for kind, found in names.items():
            console.print(f"{kind}: {', '.join(found)}")
        table = Table("--without", "sets", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[0].no_wrap = True
        for part, changes in ABLATIONS.items():
            table.add_row(part, ", ".join(f"{key}={as_text(value)}" for key, value in changes.items()))
        console.print(table)


@app.command("keys")
def config_keys(algorithm: Algorithm = None, as_json: AsJson = False) -> None:
    """List all options of a method, each with the value in its preset and a description.

    [bold]perfedrec config keys --algorithm lightgcn[/bold]
    """
    with one_line():
        from perfedrec.core.dotted import as_text, flat, keys
        from perfedrec.runs.config import resolve

        config = resolve(algorithm=algorithm)
        about = keys(type(config))
        values = {key: field.default for key, field in about.items()}  # a dump leaves some options out
        values |= flat(config.model_dump(mode="json", by_alias=True))
        if as_json:
            print(json.dumps({key: {"default": values[key], "description": about[key].description} for key in about}))
            return
        table = Table("key", "default", "description", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[0].no_wrap = True
        table.columns[1].overflow = "fold"
        if console.is_terminal:
            table.columns[1].max_width = 14
        for key, field in about.items():
            table.add_row(key, as_text(values[key]), field.description)
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
