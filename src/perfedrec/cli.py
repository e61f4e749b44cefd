"""The command line: train, evaluate, recommend, data, demo, config.

Heavy imports are made inside the commands, so that help and completion answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from perfedrec.core.errors import ConfigError, PerfedrecError

if TYPE_CHECKING:
    from perfedrec.experiment.run import Result

app = typer.Typer(
    name="perfedrec",
    help="Personalised federated recommendation with self-supervised pre-training.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at, prepare and download interaction data.", no_args_is_help=True)
config_app = typer.Typer(help="Show presets, options and configurations.", no_args_is_help=True)
privacy_app = typer.Typer(
    help="Plan the noise that an epsilon takes, and see what a run guarantees.", no_args_is_help=True
)
app.add_typer(data_app, name="data")
app.add_typer(privacy_app, name="privacy")
app.add_typer(config_app, name="config")
console = Console()

Profile = Annotated[
    str | None, typer.Option("--privacy", help="privacy profile: paper, secure or private (see docs/privacy.md)")
]
Preset = Annotated[
    str | None,
    typer.Option(help="recommended (the default), paper (the published hyper-parameters), or a method's (its default)"),
]
Algorithm = Annotated[
    str | None, typer.Option("--algorithm", help="a method (see perfedrec config list), or file.py:Class for your own")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
RunFolder = Annotated[Path, typer.Option("--run", help="folder of a finished run")]
Moved = Annotated[str | None, typer.Option("--data", help="where the data lies now, if it has moved since")]
Format = Annotated[str, typer.Option(help="format of the files; auto detects it from their content")]
Columns = Annotated[str, typer.Option(help="where columns are, as user=customer,item=2,rating=stars,timestamp=4")]


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors that a person can act on become one line and an exit code."""
    try:
        yield
    except PerfedrecError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


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


@app.command()
def train(
    data: Annotated[str | None, typer.Option(help="file, folder, or synthetic:users=..,items=..")] = None,
    train_file: Annotated[str | None, typer.Option("--train", help="training file of a given split")] = None,
    valid: Annotated[str | None, typer.Option(help="validation file of a given split")] = None,
    test: Annotated[str | None, typer.Option(help="test file of a given split")] = None,
    format: Annotated[str | None, typer.Option(help="format of the files (default: detected)")] = None,
    columns: Columns = "",
    algorithm: Algorithm = None,
    preset: Preset = None,
    privacy: Profile = None,
    config: Annotated[Path | None, typer.Option(help="TOML file on top of the preset")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; see perfedrec config keys")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="a part to switch off; see perfedrec config list")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of training")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random")] = None,
    dropout_rate: Annotated[float | None, typer.Option(help="share of a cohort that drops out")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    output: Annotated[Path | None, typer.Option(help="folder to write the run to (default: runs/TIME)")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --output, with its own configuration")
    ] = False,
    previous: Annotated[bool, typer.Option("--previous", help="with --resume: skip damaged checkpoints")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on interactions, evaluate, and write a run folder.

    [bold]perfedrec train --data ratings.csv --rounds 300[/bold]

    [bold]perfedrec train --data FOLDER --preset paper --without clusters --output runs/a[/bold]

    [bold]perfedrec train --resume --output runs/a[/bold]
    """
    with _one_line():
        from perfedrec.experiment import config as configuration
        from perfedrec.experiment.run import latest_checkpoint, open_data, read_config
        from perfedrec.experiment.run import train as run_training

        output = output or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        checkpoint = None
        if resume:
            if (
                data
                or train_file
                or config
                or set_
                or without
                or privacy
                or seed is not None
                or dropout_rate is not None
            ):
                raise ConfigError(
                    "--resume goes on with the run's own configuration; only --rounds and --device may change"
                )
            resolved, checkpoint = read_config(output), latest_checkpoint(output, skip_damaged=previous)
            changes = {key: value for key, value in (("rounds", rounds), ("device", device)) if value is not None}
            tree = resolved.model_dump(by_alias=True)
            tree["run"] |= changes
            resolved = configuration.check(tree)
        else:
            if data and train_file:
                raise ConfigError("expected either --data or the three files --train, --valid and --test")
            given: dict[str, Any] = {
                "data__train": train_file,
                "data__valid": valid,
                "data__test": test,
                "data__format": format,
            }
            given["data__columns"] = columns or None
            given |= {"run__rounds": rounds, "run__seed": seed, "run__dropout_rate": dropout_rate}
            given |= {"run__device": device, "data__path": data}
            given["algorithm"] = algorithm
            preset = preset or configuration.default_preset(algorithm)
            resolved = configuration.load(preset, config, set_ or (), without or (), privacy=privacy, **given)
        dataset = open_data(resolved.data)
        if not (quiet or as_json):
            _print_data(dataset)
        result = run_training(
            resolved.build(),
            dataset,
            resolved.run,
            reporter=_reporter(quiet, as_json),
            output=output,
            config=resolved,
            resume=checkpoint,
        )
        _print_result(result, as_json)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="folder to write the run to (default: runs/demo-TIME)")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Train PerFedRec++ on the embedded synthetic data and show what comes out.

    [bold]perfedrec demo --output runs/demo[/bold]
    """
    with _one_line():
        from perfedrec.experiment import config as configuration
        from perfedrec.experiment.run import open_data
        from perfedrec.experiment.run import train as run_training

        overrides = ("run.rounds=100", "clusters.start=5", "clusters.every=20", "selection.n_clients_per_round=128")
        resolved = configuration.load("recommended", None, overrides)
        dataset = open_data(resolved.data)
        _print_data(dataset)
        output = output or Path("runs") / datetime.now().strftime("demo-%Y-%m-%d-%H%M%S")
        result = run_training(
            resolved.build(), dataset, resolved.run, reporter=_reporter(quiet, False), output=output, config=resolved
        )
        _print_result(result, False)
        user = dataset.train.user_ids[0]
        _print_explained(result, str(user), 5)
        console.print(f"Next: perfedrec recommend --run {output} --user {user}", soft_wrap=True)
        console.print("      perfedrec train --data YOUR_FILE", soft_wrap=True)


@app.command()
def evaluate(
    run: RunFolder,
    part: Annotated[str, typer.Option(help="test or valid")] = "test",
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics of a stored run again.

    [bold]perfedrec evaluate --run runs/a --json[/bold]
    """
    with _one_line():
        from perfedrec.experiment.run import open_run

        result, _ = open_run(run, data)
        metrics = result.evaluate(part)
        if as_json:
            print(json.dumps({"part": part, "metrics": metrics}))
        else:
            console.print(_metric_table({part: metrics}))


@app.command()
def recommend(
    run: RunFolder,
    user: Annotated[str | None, typer.Option(help="id of a user, as in the data")] = None,
    k: Annotated[int, typer.Option(help="length of the list")] = 20,
    all_users: Annotated[bool, typer.Option("--all-users", help="lists of all users, written to --output")] = False,
    output: Annotated[Path | None, typer.Option(help="file for --all-users: .parquet or .csv")] = None,
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Recommend unseen items, and tell which of the mixed models moved them.

    [bold]perfedrec recommend --run runs/a --user 42 --k 20[/bold]

    [bold]perfedrec recommend --run runs/a --all-users --output lists.parquet[/bold]
    """
    with _one_line():
        from perfedrec.experiment.run import open_run

        if all_users == (user is not None):
            raise ConfigError("expected either --user ID or --all-users --output FILE")
        if all_users and (output is None or output.suffix not in (".parquet", ".csv")):
            raise ConfigError(f"--all-users writes to --output {output}; expected a name that ends in .parquet or .csv")
        result, _ = open_run(run, data)
        if user is not None and as_json:
            print(json.dumps({"user": user, "items": result.explain(user, k).drop("user").to_dicts()}))
        elif user is not None:
            _print_explained(result, user, k)
        elif output is not None:
            frame = result.recommend(None, k)
            temporary = output.with_name(f".{output.name}.part")
            try:
                frame.write_parquet(temporary) if output.suffix == ".parquet" else frame.write_csv(temporary)
                temporary.replace(output)
            except OSError as error:
                raise ConfigError(f"{output}: cannot be written ({error})") from None
            console.print(f"{frame.height} rows in {output}", soft_wrap=True)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    rounds: Annotated[str, typer.Option(help="rounds of training to capture, as 1,50")] = "1",
    trials: Annotated[int, typer.Option(help="canaries sent through each noisy release")] = 100_000,
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Attack a run's own uploads. Exit code 1 where canaries show more than was claimed.

    [bold]perfedrec audit runs/a --rounds 1,50[/bold]
    """
    with _one_line():
        from rich.progress import Progress

        from perfedrec.experiment.audit import audit as run_audit

        try:
            chosen = [int(each) for each in rounds.split(",")]
        except ValueError:
            raise ConfigError(f"--rounds is {rounds!r}; expected numbers, as 1,50") from None
        with Progress(console=Console(stderr=True), transient=True, disable=as_json or not sys.stderr.isatty()) as bar:
            task = bar.add_task("playing the run again", total=None)
            found = run_audit(
                run, chosen, trials, data, lambda done, total: bar.update(task, completed=done, total=total)
            )
        if as_json:
            print(json.dumps(found.plain()))
        else:
            _print_audit(found)
            console.print(f"written to {run / 'audit.json'}", soft_wrap=True)
        if found.failed:
            print("error: canaries show a larger epsilon than was claimed", file=sys.stderr)
            raise typer.Exit(1)


def _print_audit(found: Any) -> None:
    table = Table("attack", "round", "figure", "reached", "guessing", "popularity", "cases")
    for each in found.findings:
        where = "-" if each.round is None else str(each.round or "pre")
        popular = "-" if each.popularity is None else f"{each.popularity:.3f}"
        row = (each.attack, where, each.metric, f"{each.value:.3f}", f"{each.guessing:.3f}", popular, str(each.cases))
        table.add_row(*row)
    console.print(table)
    if found.bounds:
        table = Table("canaries on", "epsilon claimed", "shown, any noise", "shown, normal noise", "trials", "")
        for each in found.bounds:
            normal = "-" if each.lower_gaussian is None else f"{each.lower_gaussian:.2f}"
            verdict = "[red]above the claim[/red]" if each.failed else "within"
            table.add_row(each.what, f"{each.claim:.2f}", f"{each.lower:.2f}", normal, str(each.trials), verdict)
        console.print(table)
    else:
        console.print("canaries: no epsilon is claimed, so there is none to exceed")
    for note in found.notes:
        console.print(f"not attacked: {note}", soft_wrap=True)


@data_app.command("info")
def data_info(
    file: Annotated[str, typer.Argument(help="a file of interactions, or synthetic:users=..,items=..")],
    format: Format = "auto",
    columns: Columns = "",
    as_json: AsJson = False,
) -> None:
    """Users, items, density, degree distribution and time range of a file.

    [bold]perfedrec data info ratings.csv[/bold]
    """
    with _one_line():
        from perfedrec.data import Interactions, describe, load, parse_columns

        path = Path(file)
        if file.startswith("synthetic:") or path.is_dir():
            facts = describe(load(file, format=format, columns=parse_columns(columns)).train)
        else:
            facts = describe(Interactions.from_file(path, format=format, columns=parse_columns(columns)))
        if as_json:
            print(json.dumps(facts, default=str))
            return
        table = Table("figure", "value", title=file)
        for name, value in _flat(facts):
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
        console.print(table)


@data_app.command("prepare")
def data_prepare(
    source: Annotated[str, typer.Argument(help="file, folder, or synthetic:users=..,items=..")],
    output: Annotated[Path, typer.Option(help="new folder for train, valid and test")],
    format: Format = "auto",
    columns: Columns = "",
    min_rating: Annotated[float | None, typer.Option(help="ratings below this are no interaction")] = None,
    k_core: Annotated[int, typer.Option(help="drop users and items with fewer interactions, repeatedly")] = 0,
    split: Annotated[str, typer.Option(help="leave-one-out or ratio")] = "leave-one-out",
    order: Annotated[str, typer.Option(help="auto, time or random")] = "auto",
    seed: Annotated[int, typer.Option(help="seed of a random split")] = 0,
) -> None:
    """Filter and split interactions, and write them as a data set of their own.

    [bold]perfedrec data prepare ratings.csv --min-rating 4 --k-core 5 --output prepared[/bold]
    """
    with _one_line():
        from perfedrec.data import load, parse_columns, write

        dataset = load(
            source,
            format=format,
            columns=parse_columns(columns),
            min_rating=min_rating,
            k_core=k_core,
            split_how=split,
            order=order,
            seed=seed,
        )
        write(dataset, output)
        _print_data(dataset)
        console.print(f"written to {output}", soft_wrap=True)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="ml-100k, ml-1m, ...")],
    output: Annotated[Path, typer.Option(help="folder to unpack into")] = Path("data"),
) -> None:
    """Download a public data set, check it, and show its licence.

    [bold]perfedrec data fetch ml-100k --output data[/bold]
    """
    with _one_line():
        from perfedrec.data import SOURCES, fetch

        folder = fetch(name, output)
        console.print(SOURCES[name].licence)
        console.print(f"unpacked in {folder}", soft_wrap=True)


@privacy_app.command("plan")
def privacy_plan(
    epsilon: Annotated[float, typer.Option(help="user-level epsilon against the coordinator")],
    users: Annotated[int, typer.Option(help="how many users there are")],
    delta: Annotated[float, typer.Option(help="delta, well below 1 / users")] = 1e-5,
    items: Annotated[int, typer.Option(help="how many items there are")] = 7_500,
    dim: Annotated[int, typer.Option(help="length of the vectors in training")] = 64,
    passes: Annotated[int, typer.Option(help="passes of spectral pre-training")] = 3,
    rounds: Annotated[int, typer.Option(help="rounds of training, if there are to be any")] = 0,
    cohort: Annotated[int, typer.Option(help="clients in a round of training, on average")] = 256,
    cap: Annotated[int | None, typer.Option(help="rounds a user takes part in at most (default: the mean)")] = None,
    as_json: AsJson = False,
) -> None:
    """The noise for an epsilon, and what accuracy to expect under it.

    [bold]perfedrec privacy plan --epsilon 8 --delta 1e-5 --users 50000 --rounds 200[/bold]
    """
    with _one_line():
        from perfedrec.privacy.plan import plan_spectral, plan_training

        for name, value in (("epsilon", epsilon), ("users", users), ("items", items), ("passes", passes), ("dim", dim)):
            if value <= 0:
                raise ConfigError(f"--{name} is {value:g}; expected more than 0")
        if not 0 < delta < 1:
            raise ConfigError(f"--delta is {delta:g}; expected a number between 0 and 1")
        spectral = plan_spectral(epsilon, delta, users, items, passes)
        training = plan_training(epsilon, delta, users, items, dim, rounds, cohort, cap) if rounds > 0 else None
        if as_json:
            found = {"pretraining": {"multipliers": spectral.multipliers, "users_per_noise": spectral.signal}}
            found["pretraining"]["expect"] = spectral.expectation
            if training is not None:
                found["training"] = {**vars(training), "expect": training.expectation}
            print(json.dumps(found))
            return
        table = Table("profile private: pre-training alone", "", title=f"epsilon {epsilon:g}, delta {delta:g}, a user")
        for name, multiplier in spectral.multipliers.items():
            times = passes if name == "spectral" else 1
            table.add_row(f"noise on {name}, {times}x", f"{multiplier:.3g} times a user's part")
        table.add_row("users per unit of noise", f"{spectral.signal:.0f}")
        table.add_row("expect, from Yelp", spectral.expectation)
        console.print(table)
        if training is not None:
            table = Table(f"or {rounds} rounds of {cohort} clients", "")
            table.add_row("participations a user", f"{training.rate * rounds:.1f} on average, at most {training.cap}")
            table.add_row("noise a round, coordinator", f"{training.coordinator:.3g} times the clip")
            table.add_row("noise a round, recipients alone", f"{training.recipients:.3g} times the clip (Poisson)")
            table.add_row("largest sum over noise", f"{training.signal:.2g}")
            table.add_row("expect", training.expectation)
            console.print(table)


@privacy_app.command("report")
def privacy_report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")], as_json: AsJson = False
) -> None:
    """What a run guarantees, to whom, and what it released.

    [bold]perfedrec privacy report runs/a[/bold]
    """
    with _one_line():
        from perfedrec.experiment.audit import read_audit
        from perfedrec.experiment.run import read_summary
        from perfedrec.privacy.report import audited

        block, found = read_summary(run)["privacy"], read_audit(run)
        if found is not None:
            block["audit"] = audited(found)
        if as_json:
            print(json.dumps(block))
            return
        _print_privacy(block)
        table = Table("release", "times", "a user in", "sampling", "noise", "noise / part")
        for each in block["releases"]:
            noise = f"{each['noise_multiplier']:.3g}" if each["noise"] != "none" else each["reason"]
            shown = (each["release"], each["times"], each["participations"], each["sampling"], each["noise"], noise)
            table.add_row(*map(str, shown))
        console.print(table)


def _print_privacy(block: dict[str, Any]) -> None:
    from perfedrec.privacy.report import lines

    table = Table("privacy", "", show_header=False, title="privacy", title_justify="left", box=None)
    for name, text in lines(block):
        table.add_row(f"[bold]{name}[/bold]", Text(text))
    console.print(table)


@config_app.command("list")
def config_list() -> None:
    """Methods, presets, privacy profiles, and the parts that --without switches off."""
    from perfedrec.experiment import config as configuration
    from perfedrec.experiment.methods import METHODS

    console.print("methods: " + ", ".join(METHODS))
    console.print("presets: " + ", ".join(configuration.presets()))
    console.print("privacy profiles: " + ", ".join(configuration.presets("profiles")))
    table = Table("--without", "sets")
    for part, changes in configuration.ABLATIONS.items():
        table.add_row(part, ", ".join(f"{key}={'off' if value is None else value}" for key, value in changes.items()))
    console.print(table)


@config_app.command("keys")
def config_keys(algorithm: Algorithm = None) -> None:
    """Every option of a method with its default and what it does.

    [bold]perfedrec config keys --algorithm lightgcn[/bold]
    """
    with _one_line():
        from perfedrec.experiment import config as configuration

        kind = configuration.config_type(algorithm or configuration.DEFAULT)
        table = Table("key", "default", "description")
        for key, field in configuration.keys(kind).items():
            table.add_row(key, str(field.default), field.description)
        console.print(table)


@config_app.command("show")
def config_show(what: Annotated[str, typer.Argument(help="a preset, a run folder or a TOML file")]) -> None:
    """A whole configuration as TOML.

    [bold]perfedrec config show paper > mine.toml[/bold]
    """
    with _one_line():
        from perfedrec.experiment import config as configuration
        from perfedrec.experiment.run import read_config

        path = Path(what)
        if what not in configuration.presets() and path.is_dir():
            resolved = read_config(path)
        elif what not in configuration.presets() and path.is_file():
            resolved = configuration.load(None, path)
        else:
            resolved = configuration.load(what)
        print(resolved.to_toml(), end="")


def _reporter(quiet: bool, as_json: bool) -> Any:
    from perfedrec.experiment import progress

    if quiet:
        return progress.Quiet()
    if as_json:
        return progress.JsonLines()
    return progress.Bar() if sys.stderr.isatty() else progress.Lines()


def _print_data(dataset: Any) -> None:
    train = dataset.train
    console.print(
        f"[bold]{dataset.name}[/bold]: {train.n_users} users, {train.n_items} items, "
        f"{train.n_interactions} interactions",
        soft_wrap=True,
    )
    for line in dataset.notes.lines():
        console.print(Padding(Text(line), (0, 0, 0, 2)))


def _print_result(result: Result, as_json: bool) -> None:
    from perfedrec.experiment.run import read_summary

    assert result.output is not None
    summary = read_summary(result.output)
    if as_json:
        print(json.dumps({**summary, "output": str(result.output)}))
        return
    columns = {"test": summary["test"], "valid": summary["valid"], "popularity, test": summary["popularity"]}
    console.print(_metric_table(columns))
    sent = summary["communication"]
    console.print(
        _which_round(summary),
        soft_wrap=True,
    )
    console.print(
        f"sent: {sent['uploads_per_client']:.1f} uploads a client of {sent['bytes_up_per_upload'] / 1000:.1f} kB, and "
        f"{sent['bytes_down_per_upload'] / 1e6:.2f} MB down for each",
        soft_wrap=True,
    )
    _print_privacy(summary["privacy"])
    console.print(f"run written to {result.output}", soft_wrap=True)


def _which_round(summary: dict[str, Any]) -> str:
    best, prelude = summary["best_round"], summary["prelude"]
    name = f"round {best}" if best > 0 or not prelude else f"round {best + prelude} of {prelude} before training"
    return f"chosen by validation: {name}" if summary["valid"].get("users") else f"no validation data: {name}, the last"


def _metric_table(columns: dict[str, dict[str, float]]) -> Table:
    table = Table("metric", *columns, caption="full ranking of all items unseen in training", caption_justify="left")
    table.min_width = 50
    names = [f"{name}@{k}" for k in (10, 20) for name in ("recall", "ndcg", "hr", "mrr", "precision", "coverage")]
    for name in names:
        row = [f"{values[name]:.4f}" if name in values else "-" for values in columns.values()]
        table.add_row(name, *row)
    return table


def _print_explained(result: Result, user: str, k: int) -> None:
    explained = result.explain(user, k)
    models = [
        name for name in explained.columns[4:-1] if (explained[name].abs() > 1e-9).any()
    ]  # without those of weight 0
    table = Table("rank", "item", "score", *models, "moved", title=f"for user {user}")
    for row in explained.iter_rows(named=True):
        parts = [f"{row[name]:.3f}" for name in ("score", *models)]
        table.add_row(str(row["rank"]), str(row["item"]), *parts, f"{row['moved']:+d}")
    console.print(table)
    console.print(f"score = {' + '.join(models)}; moved: places gained over the global model alone")


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value
