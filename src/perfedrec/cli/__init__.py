"""The command line. There is one module for each group of commands; this module puts them together.

Commands import large modules only when they run, so that help and completion are fast.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from perfedrec.cli import (
    attack,
    bench,
    config,
    data,
    federation,
    forget,
    models,
    node,
    node_bulk,
    node_serve,
    nodes,
    owner,
    pages,
    privacy,
    processes,
    report,
    training,
    tune,
    watching,
)


@contextmanager
def _one_line(context: click.Context | None = None) -> Iterator[None]:
    """Print an error in the command line as one line, like all other errors; and so Ctrl-C before a command begins.
    ``context`` is that of the whole program, once it is made."""
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else _path(context)
        message = re.split(r"\.? \(?Did you mean ", message)[0]  # what it calls near is too far
        message += _meaning(error)
        hint = _as_key(error) or _as_option(error) or _near(error)
        print(f"error: {message[:1].lower()}{message[1:]}; see {command} --help{hint}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _path(context: click.Context | None) -> str:
    """The command that the words of the command line name, for an error that does not know it."""
    found, command = ["perfedrec"], None if context is None else context.command
    for word in () if context is None else context.meta.get(_WORDS, ()):
        if not isinstance(command, click.Group) or (command := command.commands.get(word)) is None:
            break
        found.append(word)
    return " ".join(found)


def _as_key(error: click.UsageError) -> str:
    """What to write in place of an unknown option that is a key of the section [data]."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return ""
    if not any("--set" in each.opts for each in error.ctx.command.params):
        return ""
    from perfedrec.runs.data_settings import DataSettings

    key = error.option_name.lstrip("-").replace("-", "_")
    own = any(f"--{key.replace('_', '-')}" in each.opts for each in error.ctx.command.params)
    return f"; expected --set data.{key}=..." if key in DataSettings.model_fields and not own else ""


_PLACES = ("run", "folder", "file", "path", "data")
"""Names by which people call what a command is about, where that is an argument."""


def _near(error: click.UsageError) -> str:
    """The option or the command that was meant, where its name is near."""
    from perfedrec.core.nearest import nearest

    if error.ctx is None:
        return ""
    if isinstance(error, click.NoSuchOption):
        given, params = error.option_name.lstrip("-"), error.ctx.command.params
        arguments = [each for each in params if isinstance(each, click.Argument)]
        meant = [each for each in arguments if each.name == given] or arguments[: given in _PLACES]
        if meant and len({*meant, *arguments}) == 1:
            what = f"{error.ctx.command_path} {meant[0].make_metavar(error.ctx)}"
            return f"; expected it without --{given}, as in {what}"
        names = [name.lstrip("-") for each in params for name in (*each.opts, *each.secondary_opts) if name[:1] == "-"]
        return nearest(given, [name for name in names if len(name) > 1], "--")
    unknown = re.match("No such command '(.*?)'", error.format_message())
    if unknown and isinstance(error.ctx.command, click.Group):
        return nearest(unknown[1], error.ctx.command.list_commands(error.ctx))
    return ""


def _meaning(error: click.UsageError) -> str:
    """What an option that is missing is."""
    if not isinstance(error, click.MissingParameter) or not isinstance(error.param, click.Option):
        return ""
    return f", the {(error.param.help or '').partition(';')[0].removeprefix('the ')}" if error.param.help else ""


def _as_option(error: click.UsageError) -> str:
    """What to write where the value of an option was given without its name."""
    if error.ctx is None:
        return ""
    known, extra = {name for each in error.ctx.command.params for name in each.opts}, _extra(error, error.ctx)
    if isinstance(error, click.MissingParameter):
        known &= {*error.param.opts} & {"--run", "--store"} if error.param is not None else set()
    name = next((each for each in ("--run", "--data", "--store") if each in known), None)
    return f"; expected {name} {shlex.quote(extra)}" if name and extra else ""


def _extra(error: click.UsageError, context: click.Context) -> str:
    """The only word of the command line that is of no option and no argument; nothing where there is none, or more."""
    found = re.fullmatch(r"Got unexpected extra argument \((.*)\)", error.format_message())
    if found is not None or not isinstance(error, click.MissingParameter):
        return found[1] if found is not None else ""
    words = list(context.meta.get(_WORDS, ()))[len(context.command_path.split()) - 1 :]
    rest = context.command.make_parser(context).parse_args(words)[1]
    return rest[0] if len(rest) == 1 else ""


def _print_what_can_be_printed() -> None:
    """Let a character that the terminal's encoding does not have be printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _check_encoding(words: list[str]) -> None:
    """Refuse words that Python could not read, because they are not in the encoding of the locale."""
    for word in words:
        if re.search("[\udc80-\udcff]", word):
            text, encoding = os.fsencode(word).decode("utf-8", "replace"), sys.getfilesystemencoding()
            other = "" if encoding == "utf-8" else ", or a locale with UTF-8, such as LC_ALL=C.UTF-8 (or PYTHONUTF8=1)"
            raise click.UsageError(f"the word {text} cannot be read; expected text in {encoding}{other}")


_WORDS = "perfedrec.words"
"""Where a context keeps the words of the command line."""


class _Commands(TyperGroup):
    def make_context(self, info_name: str | None, args: list[str], *given: Any, **named: Any) -> click.Context:
        _print_what_can_be_printed()
        with _one_line():
            _check_encoding(args)
            words = tuple(args)  # click takes them out of the list
            context = super().make_context(info_name, args, *given, **named)
            context.meta[_WORDS] = words
            return context

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    name="perfedrec",
    cls=_Commands,
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
    attack.attack,
    forget.forget,
    bench.bench,
    tune.tune,
    report.report,
):
    app.command()(command)
app.command()(federation.serve)
app.command()(pages.tour)
node.app.command("items")(owner.items)
node.app.command("remove")(owner.remove)
node.app.command("dismiss")(owner.dismiss)
node.app.command("export-user")(owner.export_user)
node.app.command("privacy")(owner.privacy)
node.app.command("rules")(owner.rules)
node.app.command("run")(processes.run)
federation.app.command("forget")(forget.forget_in_federation)
federation.app.command("watch")(watching.watch)
federation.app.command("page")(watching.page)
federation.app.command("nodes")(nodes.nodes)
node.app.command("serve")(node_serve.serve)
node.app.command("app")(pages.app)
node.app.command("lists")(node_bulk.lists)
node.app.command("vectors")(node_bulk.vectors)
for name, group in (
    ("data", data.app),
    ("privacy", privacy.app),
    ("node", node.app),
    ("federation", federation.app),
    ("models", models.app),
    ("service", processes.service),
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
