"""perfedrec forget."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from perfedrec.cli.common import AsJson, Moved, Quiet, console, one_line, reporter
from perfedrec.core.errors import ConfigError, reason

if TYPE_CHECKING:
    from perfedrec.runs.certificate import Certificate


def forget(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    output: Annotated[Path, typer.Option(help="new folder for the run without the users")],
    user: Annotated[list[str] | None, typer.Option(help="id of a user to forget; repeatable")] = None,
    users: Annotated[
        Path | None, typer.Option(help="file with an id a line: all users of a node, or those of an attacker")
    ] = None,
    method: Annotated[str, typer.Option(help="exact, replay, correction or resum (see docs/forgetting.md)")] = "exact",
    reference: Annotated[
        Path | None, typer.Option(help="output of --method exact for the same users, to compare with")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="share of the rounds of training that others play, not with exact (default: of the method)"),
    ] = None,
    max_share: Annotated[float, typer.Option(help="largest share of a run's users who may be forgotten")] = 0.05,
    sign: Annotated[
        Path | None,
        typer.Option(help="private key of the operator, which signs the certificate (needs the extra flower)"),
    ] = None,
    data: Moved = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Forget users: write a run without their influence, and a certificate that says how it was made and measured.

    [bold]perfedrec forget runs/a --user 42 --output runs/b[/bold]

    [bold]perfedrec forget runs/a --users node.txt --method exact --output runs/b[/bold]
    """
    with one_line():
        from perfedrec.forgetting.forget import Request
        from perfedrec.forgetting.forget import forget as run_forget
        from perfedrec.forgetting.statements import interrupted
        from perfedrec.runs.forget_log import Limits
        from perfedrec.runs.signals import InterruptedRunError

        if not 0 < max_share <= 1:
            raise ConfigError(f"--max-share is {max_share:g}; expected a share above 0, at most 1")
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"--share is {share:g}; expected a share from 0 to 1")
        request = Request([*(user or ()), *_listed(users)], method, share, reference)
        limits, signed = Limits(share=max_share), _signer(sign)
        try:
            found = run_forget(run, request, output, data=data, limits=limits, progress=reporter(quiet, as_json))
        except KeyboardInterrupt:  # while data were read: nothing has been noted or written
            raise InterruptedRunError(interrupted(run, output), signal.SIGINT) from None
        if sign is not None:
            found = signed(found)
            found.write(output)
        if as_json:
            print(json.dumps(json.loads(found.text())))
            return
        print_certificate(found)
        console.print(f"run and certificate.json written to {output}", soft_wrap=True)


def _signer(path: Path | None) -> Callable[[Certificate], Certificate]:
    """What signs a certificate with the private key in a file, which is read now: before anything is trained."""
    if path is None:
        return lambda certificate: certificate
    from perfedrec.federation.signing import sign
    from perfedrec.runtimes.flower.keys import private_key

    return partial(sign, key=private_key(path))


def _listed(path: Path | None) -> list[str]:
    """The ids in a file, one a line; empty lines are left out."""
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); expected a file with an id a line") from None


def print_certificate(found: Certificate) -> None:
    """Print a certificate as people read it."""
    table = Table("certificate", "", show_header=False, title="certificate", title_justify="left", box=None)
    for name, text in found.lines():
        table.add_row(Text(name, "bold"), text)
    console.print(table)
