"""perfedrec forget, and perfedrec federation forget."""

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

from perfedrec.cli.common import AsJson, Moved, Quiet, command, console, one_line, reporter
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


def forget_in_federation(
    run: Annotated[Path, typer.Argument(help="folder of a federation's run")],
    request: Annotated[
        Path | None, typer.Option(help="request that perfedrec node forget --request wrote (with --keys)")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="folder with the public keys of registered nodes (*.pub)")] = None,
    node: Annotated[
        str | None, typer.Option(help="instead of a request: a node that is forgotten wholly (with --replay)")
    ] = None,
    new_run: Annotated[
        Path | None, typer.Option(help="run that was trained without the user, which is then checked and certified")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="new folder: make the run there without the user, from parts of nodes (run.keep_uploads)"),
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(help="private key of the operator, which signs the certificate (federation key)")
    ] = None,
    max_share: Annotated[float, typer.Option(help="largest share of a run's users who may be forgotten")] = 0.05,
    per_day: Annotated[int, typer.Option(min=1, help="most requests of a node within 24 hours")] = 20,
    as_json: AsJson = False,
) -> None:
    """Accept a node's signed request to forget a user: check it, note it in forgetting.jsonl, write a certificate.

    [bold]perfedrec federation forget federation/run --request ann.request --keys keys --sign operator[/bold]

    [bold]perfedrec federation forget federation/run --node n7 --replay federation/without[/bold]
    """
    with one_line():
        from perfedrec.federation.requests import accept, forget_node
        from perfedrec.runs.forget_log import Limits

        if new_run is not None and replay is not None:
            raise ConfigError("--new-run and --replay were both given; expected one of them")
        limits = Limits(max_share, per_day)
        if node is not None:
            if replay is None or request is not None:
                raise ConfigError("--node forgets a node without a request; expected --replay FOLDER, and no --request")
            found, file = forget_node(run, node, replay, limits, sign), f"forgotten-node-{node}.json"
        else:
            if request is None or keys is None:
                raise ConfigError("nobody asks to be forgotten; expected --request FILE and --keys FOLDER, or --node")
            found = accept(run, request, keys, limits, new_run, sign, replay)
            file = f"forgotten-{found.run['request']}.json"
        if as_json:
            print(json.dumps(json.loads(found.text())))
            return
        print_certificate(found)
        console.print(f"written to {run / file}", soft_wrap=True)
        if replay is not None:
            from perfedrec.federation.replay import going_on
            from perfedrec.forgetting.forget import SHARES

            words = {**going_on(replay, SHARES["resum"]), "nodes": keys or "KEYS", "certificates": "CERTIFICATES"}
            again = command("serve", "--resume", *(word for name in words for word in (f"--{name}", words[name])))
            console.print(
                f"{replay} has the run without them; go on with {again}, and --host and --port as before (it has its "
                "own configuration: --preset, --config, --set and --privacy are refused)",
                soft_wrap=True,
            )


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
