"""The command line: one module for each group of commands, put together here.

Heavy imports are made inside the commands, so that help and completion answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from perfedrec.cli import bench, config, data, federation, node, node_run, privacy, report, training, tune

app = typer.Typer(
    name="perfedrec",
    help="Personalised federated recommendation with self-supervised pre-training.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (
    training.train,
    training.demo,
    training.evaluate,
    training.recommend,
    privacy.audit,
    bench.bench,
    tune.tune,
    report.report,
):
    app.command()(command)
app.command()(federation.serve)
node.app.command("run")(node_run.run)
for name, group in (
    ("data", data.app),
    ("privacy", privacy.app),
    ("node", node.app),
    ("federation", federation.app),
    ("service", node_run.service),
    ("config", config.app),
):
    app.add_typer(group, name=name)


def _version(value: bool) -> None:
    if value:
        from perfedrec import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Personalised federated recommendation with self-supervised pre-training."""
