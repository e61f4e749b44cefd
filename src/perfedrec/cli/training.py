"""train, demo, evaluate and recommend."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from perfedrec.cli.common import (
    Algorithm,
    AsJson,
    Columns,
    Data,
    Moved,
    Preset,
    Profile,
    RunFolder,
    console,
    one_line,
    print_data,
    print_list,
    print_privacy,
    reporter,
)
from perfedrec.core.errors import ConfigError, reason

if TYPE_CHECKING:
    from perfedrec.runs.training import Result


def train(
    data: Data = None,
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
    track: Annotated[list[str] | None, typer.Option(help="log to tensorboard or mlflow (extras)")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on interactions, evaluate, and write a run folder.

    [bold]perfedrec train --data ratings.csv --rounds 300[/bold]

    [bold]perfedrec train --data FOLDER --preset paper --without clusters --output runs/a[/bold]

    [bold]perfedrec train --resume --output runs/a[/bold]
    """
    with one_line():
        from perfedrec.runs import config as configuration
        from perfedrec.runs.trackers import trackers
        from perfedrec.runs.training import latest_checkpoint, open_data, read_config
        from perfedrec.runs.training import train as run_training

        output = output or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        told = trackers(track or (), output)
        checkpoint = None
        if resume:
            others = (data, train_file, valid, test, format, columns or None, algorithm, preset, privacy, config)
            if set_ or without or any(each is not None for each in (*others, seed, dropout_rate)):
                raise ConfigError(
                    "--resume goes on with the run's own configuration; only --rounds and --device may change"
                )
            resolved, checkpoint = read_config(output), latest_checkpoint(output, skip_damaged=previous)
            changes = {key: value for key, value in (("rounds", rounds), ("device", device)) if value is not None}
            tree = resolved.model_dump(by_alias=True)
            tree["run"] |= changes
            resolved = configuration.check(tree)
        else:
            if previous:
                raise ConfigError("--previous tells --resume to skip damaged checkpoints; expected both or neither")
            if data and (train_file or valid or test):
                raise ConfigError("expected either --data or the three files --train, --valid and --test")
            given: dict[str, Any] = {"data__train": train_file, "data__valid": valid, "data__test": test}
            given |= {"data__path": data, "data__format": format, "data__columns": columns or None}
            given |= {"run__rounds": rounds, "run__seed": seed, "run__dropout_rate": dropout_rate}
            given |= {"run__device": device}
            resolved = configuration.resolve(
                preset, config, set_ or (), without or (), privacy=privacy, algorithm=algorithm, **given
            )
        dataset = open_data(resolved.data)
        if not (quiet or as_json):
            print_data(dataset)
        result = run_training(
            resolved.build(),
            dataset,
            resolved.run,
            reporter=reporter(quiet, as_json),
            trackers=told,
            output=output,
            config=resolved,
            resume=checkpoint,
        )
        print_result(result, as_json)
        for each in told if not as_json else ():
            console.print(f"logged: {each.hint()}", soft_wrap=True)


def demo(
    output: Annotated[Path | None, typer.Option(help="folder to write the run to (default: runs/demo-TIME)")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Train PerFedRec++ on the embedded synthetic data and show what comes out.

    [bold]perfedrec demo --output runs/demo[/bold]
    """
    with one_line():
        from perfedrec.runs import config as configuration
        from perfedrec.runs.training import open_data
        from perfedrec.runs.training import train as run_training

        overrides = ("run.rounds=100", "clusters.start=5", "clusters.every=20", "selection.n_clients_per_round=128")
        resolved = configuration.load("recommended", None, overrides)
        dataset = open_data(resolved.data)
        print_data(dataset)
        output = output or Path("runs") / datetime.now().strftime("demo-%Y-%m-%d-%H%M%S")
        result = run_training(
            resolved.build(), dataset, resolved.run, reporter=reporter(quiet, False), output=output, config=resolved
        )
        print_result(result, False)
        user = dataset.train.user_ids[0]
        print_explained(result, str(user), 5)
        console.print(f"Next: perfedrec recommend --run {output} --user {user}", soft_wrap=True)
        console.print("      perfedrec train --data YOUR_FILE", soft_wrap=True)


def evaluate(
    run: RunFolder,
    part: Annotated[str, typer.Option(help="test or valid")] = "test",
    data: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics of a stored run again.

    [bold]perfedrec evaluate --run runs/a --json[/bold]
    """
    with one_line():
        from perfedrec.runs.training import open_run

        result, _ = open_run(run, data)
        metrics = result.evaluate(part)
        if as_json:
            print(json.dumps({"part": part, "metrics": metrics}))
        else:
            console.print(metric_table({part: metrics}))


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
    with one_line():
        from perfedrec.runs.training import open_run

        if all_users == (user is not None) or all_users == (output is None):
            raise ConfigError("expected either --user ID or --all-users --output FILE")
        if output is not None and output.suffix not in (".parquet", ".csv"):
            raise ConfigError(f"--output is {output}; expected a name that ends in .parquet or .csv")
        result, _ = open_run(run, data)
        if user is not None and as_json:
            print(json.dumps({"user": user, "items": result.explain(user, k).drop("user").to_dicts()}))
        elif user is not None:
            print_explained(result, user, k)
        elif output is not None:
            frame = result.recommend(None, k)
            temporary = output.with_name(f".{output.name}.part")
            try:
                frame.write_parquet(temporary) if output.suffix == ".parquet" else frame.write_csv(temporary)
                temporary.replace(output)
            except OSError as error:
                raise ConfigError(f"{output}: cannot be written ({reason(error)})") from None
            if as_json:
                print(json.dumps({"rows": frame.height, "output": str(output)}))
            else:
                console.print(f"{frame.height} rows in {output}", soft_wrap=True)


def print_result(result: Result, as_json: bool) -> None:
    from perfedrec.runs.training import read_summary

    assert result.output is not None
    summary = read_summary(result.output)
    if as_json:
        print(json.dumps({**summary, "output": str(result.output)}))
        return
    columns = {"test": summary["test"], "valid": summary["valid"], "popularity, test": summary["popularity"]}
    if summary["test_sampled"]:
        columns[f"test, {summary['protocols']['test_sampled']}"] = summary["test_sampled"]
    if any(values.get("users") for values in columns.values()):
        console.print(metric_table(columns))
    else:
        console.print("nobody could be evaluated: nothing is held out for validation or test", soft_wrap=True)
    sent = summary["communication"]
    console.print(
        which_round(summary),
        soft_wrap=True,
    )
    if sent["bytes_up"]:
        console.print(
            f"sent: {sent['uploads_per_client']:.1f} uploads a client of {sent['bytes_up_per_upload'] / 1000:.1f} kB, "
            f"and {sent['bytes_down_per_upload'] / 1e6:.2f} MB down for each",
            soft_wrap=True,
        )
    print_privacy(summary["privacy"])
    console.print(f"run written to {result.output}", soft_wrap=True)


def which_round(summary: dict[str, Any]) -> str:
    best, n_phases = summary["best_round"], summary["prelude"]
    name = f"round {best}" if best > 0 or not n_phases else f"round {best + n_phases} of {n_phases} before training"
    return f"chosen by validation: {name}" if summary["valid"].get("users") else f"no validation data: {name}, the last"


def metric_table(columns: dict[str, dict[str, float]]) -> Table:
    caption = "full ranking of all items unseen in training"
    if any("sampled" in name for name in columns):
        caption += "; each held-out item among sampled negatives where it says so, which flatters every method"
    table = Table("metric", *columns, caption=caption, caption_justify="left")
    table.min_width = 50
    names = [f"{name}@{k}" for k in (10, 20) for name in ("recall", "ndcg", "hr", "mrr", "precision", "coverage")]
    for name in names:
        row = [f"{values[name]:.4f}" if name in values else "-" for values in columns.values()]
        table.add_row(name, *row)
    return table


def print_explained(result: Result, user: str, k: int) -> None:
    print_list(result.explain(user, k).drop("user"), user)
