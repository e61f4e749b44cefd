"""perfedrec serve, and perfedrec federation: up, certificates, key and bundles."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfedrec.cli.common import (
    AsJson,
    Columns,
    Header,
    KCore,
    MetricsPort,
    MinRating,
    PagePort,
    Preset,
    command,
    console,
    hint_to_resume,
    one_line,
    print_communication,
    print_data,
    print_privacy,
    refuse_with_resume,
    reporter,
)
from perfedrec.core.counted import counted

if TYPE_CHECKING:
    from perfedrec.runs.config import Config
    from perfedrec.runs.summary import Summary

app = typer.Typer(help="Set up a federation: certificates, keys, or a whole one on this machine.", no_args_is_help=True)

DEFAULT_PROFILE = "secure"
"""The privacy profile of a run with real nodes, where nothing else is chosen."""

NodeProfile = Annotated[
    str | None, typer.Option("--privacy", help="privacy profile: secure (the default), private, paper or none")
]

ON_RESUME = (
    "of the configuration only --rounds may change; options that are no part of it, such as --deadline and "
    "--page-port, hold from now on"
)
"""What is possible with ``--resume``."""

NODES, DATA = 4, "synthetic:users=256,items=500"
"""Number of nodes and data of ``up``, where they are not given."""

Deadline = Annotated[
    float,
    typer.Option(help="seconds after which a round is closed with the answers that have come; one more for 2 MB sent"),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value (see perfedrec config keys); repeatable")
]
KeepSums = Annotated[
    bool, typer.Option("--keep-sums", help="keep what is opened in each round in the run's folder, for perfedrec audit")
]
Rounds = Annotated[int | None, typer.Option(help="rounds of training")]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def serve(
    output: Annotated[Path, typer.Option(help="folder to write the run to")],
    certificates: Annotated[Path, typer.Option(help="folder with ca.crt, server.pem and server.key")],
    nodes: Annotated[Path, typer.Option(help="folder with the nodes' public keys (*.pub)")],
    catalogue: Annotated[
        Path,
        typer.Option(
            help="all items of the federation in its order, the same as on the nodes: one id a line, or parquet"
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="TOML file that is applied after the preset")] = None,
    preset: Preset = None,
    privacy: NodeProfile = None,
    set_: Set = None,
    rounds: Rounds = None,
    host: Annotated[str, typer.Option(help="address to listen on (0.0.0.0 or :: for all)")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 18000,
    min_nodes: Annotated[
        int | None, typer.Option(help="nodes to wait for (default: 3 where sums are secure, or else 1)")
    ] = None,
    min_users: Annotated[int, typer.Option(help="users to wait for")] = 1,
    wait: Annotated[float, typer.Option(help="seconds to wait for them")] = 600.0,
    deadline: Deadline = 60.0,
    enough: Annotated[
        float, typer.Option(help="share of the clients asked whose answers are enough to close a round")
    ] = 1.0,
    max_users: Annotated[
        int | None, typer.Option(help="most users that a node may claim (default: any number)")
    ] = None,
    max_growth: Annotated[
        float,
        typer.Option(help="hold a node that claims more than this many times its users of an earlier run (0: do not)"),
    ] = 10.0,
    quarantine: Annotated[
        int, typer.Option(help="rounds after which what a node sends counts that is new to the federation")
    ] = 0,
    max_joins: Annotated[int, typer.Option(help="how often a node may connect in a minute")] = 30,
    max_requests: Annotated[int, typer.Option(help="requests that a node may send in a minute")] = 6_000,
    max_megabytes: Annotated[int, typer.Option(help="MB that a node may send in a minute")] = 4_096,
    metrics_port: MetricsPort = None,
    page_port: PagePort = None,
    keep_sums: KeepSums = False,
    models: Annotated[
        Path | None,
        typer.Option(help="registry of models: the model becomes a version there, and nodes get the promoted one"),
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="promote the model of this run in --models")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="continue the run in --output with its own configuration; only --rounds may change"
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
    as_json: AsJson = False,
) -> None:
    """Be the coordinator: train with nodes that hold their users' data, over a SuperLink of its own.

    [bold]perfedrec serve --config run.toml --catalogue items.txt --certificates certs --nodes keys --output f[/bold]

    [bold]perfedrec serve --resume --catalogue items.txt --certificates certs --nodes keys --output f[/bold]
    """
    with one_line():
        from perfedrec.core.errors import ConfigError
        from perfedrec.data import read_catalogue
        from perfedrec.federation.admission import Limits
        from perfedrec.federation.coordinator import Deployment, Terms
        from perfedrec.federation.coordinator import serve as run
        from perfedrec.federation.local import environment
        from perfedrec.federation.metrics import exposed
        from perfedrec.web.beside import page_beside, reserved

        os.environ |= environment()
        terms = Terms(host, port, min_nodes, min_users, wait, deadline, enough)
        limits = Limits(max_users, max_growth, quarantine, max_joins, max_requests, max_megabytes)
        ports = {"--port": port, "--metrics-port": metrics_port, "--page-port": page_port or None}
        _check_ports(ports)
        if promote and models is None:
            raise ConfigError("--promote needs a registry of models; expected --models FOLDER")
        resolved = _resolved(output, resume, preset, config, set_, privacy, rounds)
        files = {"catalogue": catalogue, "certificates": certificates, "nodes": nodes, "output": output}
        shown = {"metrics_port": metrics_port, "page_port": page_port}
        again = ["serve", "--resume", *_options(**files, rounds=rounds, **shown, **terms.changed(), **limits.changed())]
        again += [*_options(models=models), *(["--promote"] if promote else [])]
        again += ["--keep-sums"] if keep_sums else []
        with hint_to_resume(again), exposed(metrics_port) as expose, reserved(page_port) as listener:
            items, places = read_catalogue(catalogue), (output, certificates, nodes)
            given = Deployment(
                resolved,
                items,
                *places,
                terms,
                resume,
                keep_sums=keep_sums,
                models=models,
                promote=promote,
                limits=limits,
            )
            with page_beside(listener, output):
                summary = run(given, reporter(quiet, as_json), _tell, expose)
        _show(summary, output, as_json)


@app.command("up")
def up(
    nodes: Annotated[int | None, typer.Option(min=1, help=f"number of nodes (default: {NODES})")] = None,
    data: Annotated[
        str | None, typer.Option(help=f"file, folder, or synthetic:users=..,items=.. (default: {DATA})")
    ] = None,
    format: Annotated[str | None, typer.Option(help="format of the files (default: detected)")] = None,
    columns: Columns = "",
    header: Header = None,
    min_rating: MinRating = None,
    k_core: KCore = None,
    users: Annotated[int | None, typer.Option(min=1, help="number of users of the data (default: all)")] = None,
    preset: Preset = None,
    privacy: NodeProfile = None,
    set_: Set = None,
    rounds: Rounds = None,
    output: Annotated[Path, typer.Option(help="folder of the federation")] = Path("federation"),
    deadline: Deadline = 60.0,
    metrics_port: MetricsPort = None,
    page_port: PagePort = None,
    keep_sums: KeepSums = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="continue the federation in --output as it was set up; only --rounds may change"),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine, for trying it out: TLS, keys, a process and a file for each node.

    [bold]perfedrec federation up --nodes 4 --data ratings.csv --rounds 20 --output federation[/bold]
    """
    with one_line():
        from perfedrec.data import read_catalogue
        from perfedrec.federation import local
        from perfedrec.federation.agreement import evaluation_of, federated
        from perfedrec.federation.coordinator import Deployment, Terms
        from perfedrec.federation.coordinator import serve as run
        from perfedrec.federation.metrics import exposed
        from perfedrec.federation.sizing import needs
        from perfedrec.runs.config import open_data
        from perfedrec.runtimes.flower import needs_service
        from perfedrec.web.beside import page_beside, reserved

        os.environ |= local.environment()
        read: dict[str, object] = {"--data": data, "--format": format, "--columns": columns or None, "--header": header}
        read |= {"--min-rating": min_rating, "--k-core": k_core, "--nodes": nodes, "--users": users}
        if resume:
            refuse_with_resume(read, "the nodes and users in --output", ON_RESUME)
        given: dict[str, Any] = {"data__path": data or DATA, "data__format": format, "data__columns": columns or None}
        given |= {"data__min_rating": min_rating, "data__k_core": k_core}
        given["data__header"] = None if header is None else "yes" if header else "no"
        if not resume:
            local.check_free(output)
        resolved = _resolved(output / "run", resume, preset, None, set_, privacy, rounds, **given)
        method = federated(resolved)
        service, changed = needs_service(method), Terms(deadline=deadline).changed()
        again = ["federation", "up", "--resume"]
        again += _options(output=output, rounds=rounds, metrics_port=metrics_port, page_port=page_port, **changed)
        again += ["--keep-sums"] if keep_sums else []
        _check_ports({"--metrics-port": metrics_port, "--page-port": page_port or None})
        with exposed(metrics_port) as expose, reserved(page_port) as listener:
            dataset = None if resume else open_data(resolved.data, resolved.attributes)
            if dataset is not None:
                method.settings.privacy.check_users(min(users or dataset.n_users, dataset.n_users))
                count = NODES if nodes is None else nodes
                Terms(min_nodes=count).least_nodes(method)  # refused before anything is written
                if needed := needs(method, dataset.n_items):
                    needed.check_memory(count)
                if not (quiet or as_json):
                    print_data(dataset)
                held_out = evaluation_of(resolved).rule is not None
                local.lay_out(output, dataset, count, users, attributes=resolved.attributes, held_out=held_out)
            port = local.free_port()
            terms = Terms(port=port, min_nodes=sum(1 for _ in (output / "nodes").iterdir()), deadline=deadline)
            catalogue, places = read_catalogue(output / local.CATALOGUE), (output / "certificates", output / "keys")
            with hint_to_resume(again):
                run_folder = output / "run"
                deployment = Deployment(resolved, catalogue, run_folder, *places, terms, resume, keep_sums=keep_sums)
                tell = _tell if not quiet else lambda line: None
                beside = local.nodes(output, port, service, _tell)
                with page_beside(listener, run_folder):
                    summary = run(deployment, reporter(quiet, as_json), tell, expose, beside)
        _show(summary, output / "run", as_json)
        if dataset is not None and not as_json:
            mine = _options(store=output / "nodes" / "n0" / "store.db", user=dataset.train.user_ids[0])
            console.print(f"a list: {command('node', 'recommend', *mine)}", soft_wrap=True)


@app.command("certificates")
def certificates(
    folder: Annotated[Path, typer.Argument(help="folder to write to")],
    name: Annotated[
        list[str] | None,
        typer.Option(help="host or address that nodes use; repeatable (default: as before, or else this machine)"),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=36_500, help="days until the server's certificate expires")] = 365,
) -> None:
    """Make an authority and a server's certificate. If there is an authority already, renew the server's certificate.

    [bold]perfedrec federation certificates certs --name fed.example.org[/bold]
    """
    with one_line():
        from perfedrec.federation.certificates import make_certificates

        make_certificates(folder, name or (), days)
        console.print(
            f"{folder}: copy ca.crt to every node; keep server.pem and server.key here; keep ca.key secret",
            soft_wrap=True,
        )


@app.command("key")
def key(
    path: Annotated[Path, typer.Argument(help="file of the private key; the public key is written beside it")],
    operator: Annotated[
        bool, typer.Option("--operator", help="the key of the operator, who signs certificates with it")
    ] = False,
) -> None:
    """Make the key pair of a node, on that node, or that of the operator.

    [bold]perfedrec federation key node7[/bold]

    [bold]perfedrec federation key operator --operator[/bold]
    """
    with one_line():
        from perfedrec.federation.certificates import make_key
        from perfedrec.federation.signing import fingerprint_of

        make_key(path)
        if operator:
            console.print(
                f"{path} stays with the operator; give {path}.pub to the owners of all nodes, as ca.crt, and never put "
                f"it into the folder of nodes' keys; its fingerprint is {fingerprint_of(Path(f'{path}.pub'))}",
                soft_wrap=True,
                highlight=False,
            )
            return
        console.print(f"{path} stays here; copy {path}.pub to the coordinator's folder of keys", soft_wrap=True)


@app.command("bundles")
def bundles(
    folder: Annotated[Path, typer.Argument(help="folder to write to")],
    node: Annotated[list[str], typer.Option(help="name of a node; repeatable")],
) -> None:
    """Make the secret files with which nodes and the neighbourhood service keep data from the coordinator.

    To be run by somebody who is neither the coordinator nor the service. For new nodes, run it again.

    [bold]perfedrec federation bundles dealt --node n0 --node n1[/bold]
    """
    with one_line():
        from perfedrec.federation.bundles import BUNDLE, KEYS, SERVICE, deal

        deal(folder, node, folder / SERVICE)
        console.print(
            f"{folder}: copy each {BUNDLE} to its node, {SERVICE}/{KEYS} to the service, and none to the coordinator",
            soft_wrap=True,
        )


def _check_ports(ports: dict[str, int | None]) -> None:
    """Refuse one port for two purposes. ``ports`` are those that are used, by their options."""
    from perfedrec.core.errors import ConfigError

    found: dict[int, str] = {}
    for option, port in ports.items():
        if port is not None and (other := found.setdefault(port, option)) != option:
            raise ConfigError(f"{other} and {option} are both {port}; expected two ports")


def _options(**values: Any) -> list[str]:
    """The words of a command line for options that have a value."""
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def _resolved(
    output: Path,
    resume: bool,
    preset: str | None,
    config: Path | None,
    set_: list[str] | None,
    privacy: str | None,
    rounds: int | None,
    **given: Any,
) -> Config:
    """The configuration of a new run; with ``resume`` that of the run in ``output``, of which ``rounds`` alone may
    change.

    Where neither the options nor the file ``config`` choose a protection, it is that of profile secure, whatever the
    preset has.
    """
    from perfedrec.federation.agreement import with_real_noise
    from perfedrec.runs import config as configuration
    from perfedrec.runs.folder import RunFolder

    if not resume:
        profile = privacy or (None if "privacy" in configuration.in_file(config) else DEFAULT_PROFILE)
        loaded = configuration.resolve(preset, config, set_ or (), privacy=profile, run__rounds=rounds, **given)
        return with_real_noise(loaded, chosen=any(each.startswith("privacy.noise_source") for each in set_ or ()))
    fixed = {"--preset": preset, "--config": config, "--set": set_ or None, "--privacy": privacy}
    refuse_with_resume(fixed, "the run's own configuration", ON_RESUME)
    folder = RunFolder(output)
    tree = folder.config().model_dump(by_alias=True)
    if rounds is not None:
        folder.check_rounds(rounds)
        tree["run"]["rounds"] = rounds
    return with_real_noise(configuration.check(tree), chosen=True)  # the source was chosen when the run began


def _show(summary: Summary, output: Path, as_json: bool) -> None:
    """Print the summary of a run, or all of it as JSON."""
    from perfedrec.cli.training import metric_table, what_was_chosen, which_round
    from perfedrec.runs.folder import RunFolder

    if as_json:
        print(json.dumps({**summary.stored(), "output": str(output)}))
        return
    users = counted(summary.users or 0, "user")
    if summary.valid:
        figures = {**({"test": summary.test} if summary.test else {}), "valid": summary.valid}
        console.print(metric_table(figures))
        held = "" if summary.of_sample() else f"; {summary.valid['users']:.0f} of {users} hold out items"
        console.print(f"{which_round(summary, len(RunFolder(output).history()))}{held}", soft_wrap=True)
        if summary.chosen:
            console.print(what_was_chosen(summary), soft_wrap=True)
    else:
        phases = f" after {counted(summary.n_phases, 'phase')}" if summary.n_phases else ""
        played = counted(max(summary.best_round, 0), "round")
        console.print(f"{played} of training{phases}, with {users}", soft_wrap=True)
    print_communication(summary.communication)
    print_privacy(summary.privacy)
    console.print(f"run written to {output}", soft_wrap=True)
