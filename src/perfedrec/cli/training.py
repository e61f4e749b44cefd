"""perfedrec train, demo, evaluate and recommend."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from perfedrec.cli.common import (
    Algorithm,
    AsJson,
    Columns,
    ConfigFile,
    Data,
    FinishedRun,
    Header,
    KCore,
    Ks,
    MinRating,
    Moved,
    Preset,
    Profile,
    Quiet,
    command,
    console,
    hint_to_resume,
    lengths,
    one_line,
    print_communication,
    print_data,
    print_list,
    print_privacy,
    refuse_with_resume,
    reporter,
)
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError, DataError, reason

if TYPE_CHECKING:
    from perfedrec.runs.config import Config
    from perfedrec.runs.progress import Reporter, Tracker
    from perfedrec.runs.result import Result
    from perfedrec.runs.summary import Summary


Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value (see perfedrec config keys); repeatable")
]
Without = Annotated[list[str] | None, typer.Option(help="part to switch off (see perfedrec config list); repeatable")]
Output = Annotated[Path | None, typer.Option(help="folder to write the run to (default: runs/TIME)")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="continue the run in --output with its own configuration; --rounds, --device and --data may change",
    ),
]
Previous = Annotated[bool, typer.Option("--previous", help="with --resume: skip damaged checkpoints")]
Track = Annotated[list[str] | None, typer.Option(help="log to tensorboard or mlflow (extras); repeatable")]


def train(
    data: Data = None,
    train_file: Annotated[str | None, typer.Option("--train", help="training file of a given split")] = None,
    valid: Annotated[
        str | None, typer.Option(help="validation file of a given split (default: part of training)")
    ] = None,
    test: Annotated[str | None, typer.Option(help="test file of a given split")] = None,
    format: Annotated[str | None, typer.Option(help="format of the files (default: detected)")] = None,
    columns: Columns = "",
    header: Header = None,
    min_rating: MinRating = None,
    k_core: KCore = None,
    train_on_valid: Annotated[
        bool, typer.Option("--train-on-valid", help="train on training and validation together, as some papers do")
    ] = False,
    relations: Annotated[
        Path | None, typer.Option(help="file of relations between users, for social methods (sept, mhcn)")
    ] = None,
    algorithm: Algorithm = None,
    preset: Preset = None,
    privacy: Profile = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    without: Without = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of training")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of all random numbers")] = None,
    ks: Ks = None,
    dropout_rate: Annotated[float | None, typer.Option(help="share of a cohort that drops out")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    output: Output = None,
    resume: Resume = False,
    previous: Previous = False,
    track: Track = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train on interactions, evaluate, and write a run folder.

    [bold]perfedrec train --data ratings.csv --rounds 300[/bold]

    [bold]perfedrec train --data FOLDER --preset paper --without clusters --output runs/a[/bold]

    [bold]perfedrec train --resume --output runs/a[/bold]
    """
    with one_line(), _run_folder(output, "", resume) as output:
        from perfedrec.runs.checkpoint import number_of
        from perfedrec.runs.config import resolve
        from perfedrec.runs.trackers import trackers
        from perfedrec.runtimes.cluster import loaded

        logs = trackers(track or (), output)
        source = _source(data, train_file, valid, test, format, columns, header)
        source |= {"data__min_rating": min_rating, "data__k_core": k_core}
        source |= {"data__train_on_valid": train_on_valid or None, "data__relations": relations and str(relations)}
        run: dict[str, Any] = {"run__rounds": rounds, "run__seed": seed, "run__device": device}
        run |= {"run__dropout_rate": dropout_rate, "run__ks": ks}
        if resume:
            fixed = {**source, **run, "algorithm": algorithm, "preset": preset, "privacy": privacy, "config": config}
            _check_resume({**fixed, "set": set_ or None, "without": without or None})
            resolved, checkpoint = _resumed(output, data, rounds, device, previous)
        else:
            _check_start(data, (train_file, valid, test), previous)
            given = {"privacy": privacy, "algorithm": algorithm, **source, **run}
            resolved, checkpoint = resolve(preset, config, set_ or (), without or (), **given), None
        again = [word for each in track or () for word in ("--track", each)]
        if resume:  # a new run has stored these
            again += [] if rounds is None else ["--rounds", str(rounds)]
            again += [] if device is None else ["--device", device]
        show = reporter(quiet, as_json)
        if resolved.run.workers and not (quiet or as_json):
            loaded()
            where = resolved.run.cluster or "on this machine"
            print(f"starting {resolved.run.workers} workers with Ray ({where}), which takes a while", file=sys.stderr)
        result = _play(
            resolved, output, show, data=not (quiet or as_json), trackers=logs, resume=checkpoint, again=again
        )
        if checkpoint is not None and len(result.history) == number_of(checkpoint):
            print("no round was left to play; --rounds with a larger number plays more", file=sys.stderr)
        print_result(result, as_json)
        for each in logs if not as_json else ():
            console.print(f"logged: {each.hint()}", soft_wrap=True)


@contextmanager
def _run_folder(output: Path | None, prefix: str, resume: bool = False) -> Iterator[Path]:
    """The folder of a run. Without ``output`` it is a new one under ``runs``, named after the time, for this process
    alone; it is removed if nothing was written to it."""
    if output is not None:
        yield output
        return
    if resume:
        raise ConfigError("--resume continues the run in --output, which is not given; expected --output FOLDER")
    first = Path("runs") / datetime.now().strftime(f"{prefix}%Y-%m-%d-%H%M%S")
    made = not first.parent.exists()
    folder, numbers = first, count(2)
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = first.with_name(f"{first.name}-{next(numbers)}")
    try:
        yield folder
    finally:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
            if made:
                first.parent.rmdir()


def _source(
    data: str | None,
    train: str | None,
    valid: str | None,
    test: str | None,
    format: str | None,
    columns: str,
    header: bool | None,
) -> dict[str, Any]:
    """The options of the section [data] that say which files are read, and how."""
    return {
        "data__train": train,
        "data__valid": valid,
        "data__test": test,
        "data__path": data,
        "data__format": format,
        "data__columns": columns or None,
        "data__header": None if header is None else "yes" if header else "no",
    }


def _check_start(data: str | None, files: Sequence[str | None], previous: bool) -> None:
    if previous:
        raise ConfigError("--previous makes --resume skip damaged checkpoints; expected both options or neither")
    if data and any(files):
        raise ConfigError("the data are given twice; expected either --data, or --train, --test and perhaps --valid")


def _check_resume(given: Mapping[str, object]) -> None:
    """Refuse options that belong to the configuration of a run, by their keys, but for those that may change."""
    options = {f"--{key.rpartition('__')[2].replace('_', '-')}": value for key, value in given.items()}
    for free in ("--path", "--rounds", "--device"):
        del options[free]
    refuse_with_resume(
        options,
        "the configuration of the run",
        "only --rounds and --device may change, and --data where the same data lie elsewhere now; --track, --previous, "
        "--quiet and --json are no part of it",
    )


def _resumed(
    output: Path, data: str | None, rounds: int | None, device: str | None, previous: bool
) -> tuple[Config, Path]:
    """The configuration of the run in a folder, with the path of the ``data``, ``rounds`` and ``device`` as now, and
    its newest checkpoint."""
    from perfedrec.runs.config import check
    from perfedrec.runs.data_settings import moved_to
    from perfedrec.runs.folder import RunFolder

    folder = RunFolder(output)
    if folder.is_federation:
        raise ConfigError(f"{output}: is the run of a federation; expected perfedrec serve --resume, or federation up")
    resolved, checkpoint = folder.config(), folder.latest_checkpoint(skip_damaged=previous)
    if rounds is not None:
        folder.check_rounds(rounds, checkpoint)
    if data is not None:
        resolved = resolved.model_copy(update={"data": moved_to(resolved.data, data)})
    tree = resolved.model_dump(by_alias=True)
    tree["run"] |= {key: value for key, value in (("rounds", rounds), ("device", device)) if value is not None}
    return check(tree), checkpoint


def _play(
    config: Config,
    output: Path,
    reporter: Reporter,
    *,
    data: bool,
    trackers: Sequence[Tracker] = (),
    resume: Path | None = None,
    again: Sequence[str] = (),
) -> Result:
    """Open the data, print their sizes if ``data``, and train. What can be refused without the data comes first.
    Without the sizes, what an option does not do as it seems to is still said, as an error would be.

    The message of an interrupted run names the command that continues it, with the words ``again`` at its end."""
    from perfedrec.runs.checkpoint import folders
    from perfedrec.runs.config import open_data
    from perfedrec.runs.folder import RunFolder
    from perfedrec.runs.training import train as run_training

    algorithm = config.build()
    config.check_here()
    if resume is None:
        RunFolder(output).check_free()
    try:
        dataset = open_data(config.data, config.attributes)
    except DataError as error:
        if resume is None or config.data != RunFolder(output).config().data:
            raise
        text = str(error)
        joined = " If" if text.endswith("?") else "; if"
        raise DataError(f"{text}{joined} the data of the run {output} lie elsewhere now, name them by --data") from None
    if data:
        print_data(dataset, remarks=algorithm.remarks(dataset.n_users))
    else:
        for remark in algorithm.remarks(dataset.n_users):
            print(remark, file=sys.stderr)
    words = ("train", "--resume", "--output", output, *again)
    with hint_to_resume(words, lambda: bool(folders(output / "checkpoints"))):
        return run_training(
            config, dataset, output=output, resume=resume or False, progress=reporter, callbacks=trackers
        )


def demo(
    output: Annotated[Path | None, typer.Option(help="folder to write the run to (default: runs/demo-TIME)")] = None,
    quiet: Quiet = False,
) -> None:
    """Train PerFedRec++ on synthetic data, and show the results and one list of recommendations.

    [bold]perfedrec demo --output runs/demo[/bold]
    """
    with one_line(), _run_folder(output, "demo-") as output:
        from perfedrec.runs.config import load

        overrides = ("run.rounds=100", "clusters.start=5", "clusters.every=20", "selection.n_clients_per_round=128")
        result = _play(load("recommended", None, overrides), output, reporter(quiet, False), data=True)
        print_result(result, False)
        user = result.dataset.train.user_ids[0]
        print_explained(result, str(user), 5)
        console.print(f"Next: {command('recommend', '--run', output, '--user', user)}", soft_wrap=True)
        console.print(f"      {command('train', '--data', 'YOUR_FILE')}", soft_wrap=True)


def evaluate(
    run: FinishedRun,
    part: Annotated[str, typer.Option(help="test or valid")] = "test",
    ks: Ks = None,
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics of a finished run again, from its stored model.

    [bold]perfedrec evaluate --run runs/a --json[/bold]
    """
    with one_line():
        from perfedrec.runs.result import open_run

        result, _ = open_run(run, data)
        metrics = result.evaluate(part, lengths(ks))
        if as_json:
            print(json.dumps({"part": part, "metrics": metrics, **_basis(result)}))
        else:
            if result.basis:
                print_data(result.dataset)
            if metrics.get("users"):
                console.print(metric_table({part: metrics}))
            else:
                held = "testing" if part == "test" else "validation"
                console.print(f"no user was evaluated: no interactions are held out for {held}", soft_wrap=True)
            print_basis(result)


def recommend(
    run: FinishedRun,
    user: Annotated[str | None, typer.Option(help="id of a user, as in the data")] = None,
    k: Annotated[int, typer.Option(help="length of the list")] = 20,
    all_users: Annotated[bool, typer.Option("--all-users", help="write the lists of all users to --output")] = False,
    output: Annotated[Path | None, typer.Option(help="file for --all-users: .parquet or .csv")] = None,
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Recommend unseen items, and show how much each of the mixed models adds to their scores.

    [bold]perfedrec recommend --run runs/a --user 42 --k 20[/bold]

    [bold]perfedrec recommend --run runs/a --all-users --output lists.parquet[/bold]
    """
    with one_line():
        from perfedrec.runs.result import open_run

        if user is not None and output is not None and not all_users:
            raise ConfigError(
                "--output goes with --all-users; expected --user ID without it (--json prints a list as JSON)"
            )
        if all_users == (user is not None) or all_users == (output is None):
            raise ConfigError("the users are not clear; expected either --user ID, or --all-users and --output FILE")
        if output is not None and output.suffix not in (".parquet", ".csv"):
            raise ConfigError(f"--output is {output}; expected a name that ends in .parquet or .csv")
        if output is not None and output.exists() and not _holds_lists(output):
            raise ConfigError(f"{output} exists and holds no lists; expected a new file, or lists to replace")
        result, _ = open_run(run, data)
        if user is not None and as_json:
            items = result.explain(user, k).drop("user").to_dicts()
            known = result.dataset.train
            (own,) = known.user_ids[[known.user_index(user)]].tolist()  # a number or text, as the ids of items
            print(json.dumps({"user": own, "items": items, **_basis(result)}))
        elif user is not None:
            print_explained(result, user, k)
            print_basis(result)
        elif output is not None:
            frame = result.recommend(None, k)
            temporary = output.with_name(f".{output.name}.part")
            try:
                frame.write_parquet(temporary) if output.suffix == ".parquet" else frame.write_csv(temporary)
                temporary.replace(output)
            except OSError as error:
                raise ConfigError(f"{output}: cannot be written ({reason(error)})") from None
            finally:
                temporary.unlink(missing_ok=True)
            if as_json:
                print(json.dumps({"rows": frame.height, "output": str(output), **_basis(result)}))
            else:
                console.print(f"{counted(frame.height, 'row')} in {output}", soft_wrap=True)
                print_basis(result)


def _holds_lists(path: Path) -> bool:
    """Whether a file is what ``recommend --all-users`` writes."""
    import polars as pl

    try:
        found = pl.read_parquet_schema(path) if path.suffix == ".parquet" else pl.read_csv(path, n_rows=0).schema
    except (OSError, pl.exceptions.PolarsError):
        return False
    return list(found) == ["user", "item", "rank", "score"]


def print_result(result: Result, as_json: bool) -> None:
    """Print what a run has recorded: metrics, the best round, communication and privacy."""
    from perfedrec.runs.folder import RunFolder

    assert result.output is not None and result.config is not None
    summary = RunFolder(result.output).summary()
    if as_json:
        print(json.dumps({**summary.stored(), "output": str(result.output)}))
        return
    columns = {"test": summary.test, "valid": summary.valid, "popularity, test": summary.popularity}
    if summary.test.get("users") and not summary.valid.get("users"):
        del columns["valid"]
    if summary.test_sampled:
        columns[f"test, {summary.protocols['test_sampled']}"] = summary.test_sampled
    if any(values.get("users") for values in columns.values()):
        console.print(metric_table(columns))
    else:
        console.print("no user was evaluated: no interactions are held out for validation or test", soft_wrap=True)
    sent = summary.communication
    console.print(which_round(summary, len(result.history)), soft_wrap=True)
    run, trained = result.config.run, len(result.history) - summary.n_phases
    if run.patience and trained < run.rounds:
        console.print(
            f"ended after {trained} of {counted(run.rounds, 'round')} (run.patience = {run.patience})", soft_wrap=True
        )
    if tested := summary.of_sample(summary.test):
        console.print(f"tested{tested}", soft_wrap=True)
    if summary.chosen:
        console.print(what_was_chosen(summary), soft_wrap=True)
    if sent["bytes_up"]:
        print_communication(sent)
    print_privacy(summary.privacy)
    console.print(f"run written to {result.output}", soft_wrap=True)


def which_round(summary: Summary, played: int) -> str:
    """The round whose model is used, as text, after a number of rounds that were ``played``."""
    if not played:
        return "no round was played: the model is the one before training"
    best, n_phases = summary.best_round, summary.n_phases
    name = f"round {best}" if best > 0 or not n_phases else f"phase {best + n_phases} of {n_phases} before training"
    if summary.valid.get("users"):
        unused = "; the rounds of training did not improve on it" if best <= 0 and played > n_phases else ""
        return f"best round by validation: {name}{summary.of_sample()}{unused}"
    return f"no validation data, so the last round is used: {name}"


def what_was_chosen(summary: Summary) -> str:
    """The options that held-out items have chosen, as text."""
    return "chosen on validation data: " + ", ".join(f"{name} {value:.3g}" for name, value in summary.chosen.items())


def metric_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of metrics with one column for each of ``columns``."""
    caption = "full ranking of all items unseen in training"
    if any("sampled" in name for name in columns):
        caption += "; columns with sampled negatives rank each held-out item among these, which favours every method"
    from perfedrec.evaluation.ranking import METRICS, cutoffs_of

    table = Table("metric", *columns, caption=caption, caption_justify="left")
    table.min_width = 50
    ks = cutoffs_of(name for values in columns.values() for name in values)
    names = [f"{name}@{k}" for k in ks for name in (*METRICS, "coverage")]
    for name in (each for each in names if any(each in values for values in columns.values())):
        row = [f"{values[name]:.4f}" if name in values else "-" for values in columns.values()]
        table.add_row(name, *row)
    return table


def print_basis(result: Result) -> None:
    """Print what lists are made from, where that is not the whole model of the run."""
    if result.basis:
        console.print(f"made from {result.basis}", soft_wrap=True)


def _basis(result: Result) -> dict[str, str]:
    """The same for JSON."""
    return {"basis": result.basis} if result.basis else {}


def print_explained(result: Result, user: str, k: int) -> None:
    """Print the ``k`` best items of a user, with the part of each model in their scores."""
    print_list(result.explain(user, k).drop("user").to_dicts(), user)
