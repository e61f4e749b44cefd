"""What ``train`` takes: names, configurations and objects, data of every form, callbacks, progress."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from perfedrec import (
    ConfigError,
    Dataset,
    Entry,
    PerFedRecPP,
    RunSettings,
    configure,
    list_methods,
    load,
    open_run,
    train,
)
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Bar, Lines, Notebook, Progress, best_reporter

DATA = "synthetic:users=80,items=60,clusters=2,interactions_per_user=8,seed=3,relations=3"
MF: dict[str, Any] = {"evaluate_every": 2, "method__batch_size": 128, "method__embedding_dim": 8}
FEDERATED: dict[str, Any] = {"rounds": 2, "selection__n_clients_per_round": 40, "model__embedding_dim": 8}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load(DATA)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_is_trained_by_its_name(name: str, dataset: Dataset) -> None:
    options: dict[str, Any] = {}
    if name in list_methods("federated"):
        options = {"rounds": 1, "selection__n_clients_per_round": 40}
    elif configure(name).run.rounds:
        options = {"rounds": 1}
    result = train(name, dataset, **options)
    assert result.config is not None
    assert result.config.algorithm == name
    assert result.recommend(k=3).height == 3 * dataset.n_users


def test_a_name_stands_for_its_preset_with_changes(dataset: Dataset) -> None:
    result = train("mf", dataset, RunSettings(seed=5), rounds=3, **MF)
    preset, config = configure("mf"), result.config
    assert config is not None
    assert (config.run.seed, config.run.rounds, config.run.evaluate_every) == (5, 3, 2)
    assert config.run.patience == preset.run.patience  # not set anywhere else
    assert config.settings == preset.settings.model_copy(update={"batch_size": 128, "embedding_dim": 8})


def test_a_name_a_configuration_and_an_object_give_the_same_model(dataset: Dataset) -> None:
    config = configure("recommended", **{f"run__{k}" if k == "rounds" else k: v for k, v in FEDERATED.items()})
    results = [
        train("perfedrec_pp", dataset, **FEDERATED),
        train(config, dataset),
        train(config.model_copy(update={"run": RunSettings()}), dataset, rounds=2),
        train(PerFedRecPP(config), dataset, config.run),
        train(config.build(), dataset, rounds=2),
        train(config.build(), dataset, config.run, config=config),
    ]
    first = results[0].recommend(k=5)
    assert all(each.recommend(k=5).equals(first) for each in results)


def test_an_object_that_is_fitted_at_once_needs_no_rounds(dataset: Dataset) -> None:
    named, built = train("item_knn", dataset), train(configure("item_knn").build(), dataset)
    assert built.config is not None
    assert built.config.run.rounds == 0
    assert built.recommend(k=3).equals(named.recommend(k=3))
    with pytest.raises(ConfigError, match=r"is fitted at once; expected run.rounds = 0"):
        train(configure("item_knn").build(), dataset, rounds=2)


def test_data_may_be_named_by_the_call_or_by_the_configuration(dataset: Dataset, tmp_path: Path) -> None:
    expected = train("item_knn", dataset).recommend(k=3)
    assert train("item_knn", DATA).recommend(k=3).equals(expected)
    assert train(configure("item_knn", data__path=DATA)).recommend(k=3).equals(expected)
    dataset.train.frame().write_csv(tmp_path / "a.csv")
    for data in (str(tmp_path / "a.csv"), tmp_path / "a.csv"):
        result = train("item_knn", data, data__k_core=2, output=str(tmp_path / "run" / type(data).__name__))
        assert result.output is not None
        assert open_run(str(result.output))[0].recommend(k=3).equals(result.recommend(k=3))


def test_a_privacy_profile_and_a_file_are_options_of_a_name(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[run]\nseed = 9\n")
    result = train("fedmf", dataset, file=str(tmp_path / "mine.toml"), privacy="paper", **FEDERATED)
    assert result.config is not None
    assert result.config.run.seed == 9
    assert result.config.privacy == configure("fedmf", privacy="paper").privacy  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lightgn", {}, "for your own; did you mean lightgcn?"),
        ("mf", {"round": 3}, "there is no option round"),
        ("mf", {"method__dim": 3}, "there is no option method__dim"),
        ("mf", {"rounds": -1}, "run.rounds"),
        ("item_knn", {"rounds": 5}, "item_knn is fitted at once; expected run.rounds = 0"),
        (configure("item_knn").build(), {"method__shrink": 1.0}, "method__shrink: .* cannot change after it was made"),
        ("item_knn", {"resume": True}, "expected output=FOLDER"),
    ],
)
def test_a_mistake_is_said_in_one_line(method: Any, options: dict[str, Any], message: str, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(method, dataset, **options)
    assert "\n" not in str(caught.value)


# --- callbacks ---


def test_functions_see_each_round(dataset: Dataset) -> None:
    seen: list[Entry] = []
    result = train("mf", dataset, rounds=4, callbacks=[seen.append], **MF)
    assert [entry.report.round for entry in seen] == [0, 1, 2, 3]
    assert [entry.valid is not None for entry in seen] == [False, True, False, True]
    assert seen == result.history


@pytest.mark.parametrize("last", [3, 4])
def test_a_function_can_end_the_training_and_the_last_round_is_evaluated(
    last: int, dataset: Dataset, tmp_path: Path
) -> None:
    """Whether it would have been evaluated (round 4) or not (3). Later functions are told of the last round too."""
    told: list[int] = []

    def stop(entry: Entry) -> bool:
        return entry.report.round + 1 == last

    result = train(
        "mf",
        dataset,
        rounds=50,
        output=tmp_path / "run",
        callbacks=[stop, lambda entry: told.append(entry.report.round)],
        **MF,
    )
    assert told == list(range(last))
    assert result.history[-1].valid is not None
    assert result.best_round <= last
    whole = train("mf", dataset, rounds=last, **MF)
    assert result.recommend(k=5).equals(whole.recommend(k=5))
    assert RunFolder(tmp_path / "run").history() == result.history
    assert result.summary().best_round == result.best_round


def test_a_run_that_a_function_ended_can_be_continued(dataset: Dataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {**MF, "patience": 0}
    folder = str(tmp_path / "run")
    train("mf", dataset, rounds=6, output=folder, callbacks=[lambda entry: entry.report.round == 2], **options)
    resumed = train("mf", dataset, rounds=6, output=folder, resume=True, **options)
    assert len(resumed.history) == 6
    assert resumed.recommend(k=5).equals(train("mf", dataset, rounds=6, **options).recommend(k=5))


def test_an_error_in_a_function_reaches_its_caller(dataset: Dataset) -> None:
    def broken(entry: Entry) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train("mf", dataset, rounds=2, callbacks=[broken], **MF)


# --- progress ---


def test_progress_is_shown_where_it_is_asked_for(dataset: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    train("mf", dataset, rounds=2, **MF)
    assert capfd.readouterr().err == ""
    train("mf", dataset, rounds=2, progress=True, **MF)
    assert "round 2/2" in capfd.readouterr().err


def test_a_notebook_shows_one_line_that_changes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython is replaced: what is given to it is what a notebook would show."""
    shown: list[str] = []

    class Handle:
        def update(self, bar: Notebook) -> None:
            shown.append(bar._repr_html_())

    def display(bar: Notebook, display_id: bool) -> Handle:
        assert display_id
        shown.append(bar._repr_html_())
        return Handle()

    fake = types.ModuleType("IPython.display")
    fake.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    train("mf", dataset, rounds=3, progress=Notebook(), **MF)
    assert shown[0].startswith('<progress max="3" value="0">')
    assert shown[-1].startswith('<progress max="3" value="3">')
    assert "round 3/3" in shown[-1]
    assert "recall@20" in shown[-1]


def test_what_shows_progress_follows_from_where_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from perfedrec.runs import progress

    assert isinstance(best_reporter(), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(best_reporter(), Bar)
    monkeypatch.setattr(progress, "Console", lambda stderr: types.SimpleNamespace(is_jupyter=True))
    assert isinstance(best_reporter(), Notebook)


def test_a_notebook_that_was_never_started_can_be_stopped() -> None:
    Notebook().stop(Progress(0, "recall@20"))


# --- short descriptions ---


def test_settings_show_what_differs_from_the_defaults_and_their_help_lists_all_options() -> None:
    assert repr(RunSettings(rounds=3)) == "RunSettings(rounds=3)"
    assert repr(configure("mf", run__seed=4)).startswith("Config(algorithm='mf', run=RunSettings(")
    assert len(repr(configure("paper"))) < 1200
    assert repr(PerFedRecPP()) == "PerFedRecPP()"
    assert repr(configure("item_knn", method__shrink=2.0).build()) == "ItemKNN(shrink=2.0)"
    assert RunSettings.__doc__ is not None
    for name, field in RunSettings.model_fields.items():
        assert f"- ``{name}`` ({field.default!r}): {field.description}" in RunSettings.__doc__


def test_swapped_arguments_are_an_error_that_gives_the_order(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"given Dataset as its method; expected first the method .*, then the data"):
        train(dataset, "mf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("min_rating", "there is no option min_rating; did you mean data__min_rating?"),
        ("round", "there is no option round; did you mean rounds?"),
        ("run__round", "there is no option run__round; did you mean rounds?"),
        ("data__min_ratng", "there is no option data__min_ratng; did you mean data__min_rating?"),
        ("algorithm", "there is no option algorithm"),
        ("zzz", "there is no option zzz; perfedrec config keys lists all, with __ instead of the dot"),
    ],
)
@pytest.mark.parametrize("method", ["mf", configure("mf")])
def test_an_unknown_option_is_named_with_the_nearest_keyword(
    method: Any, option: str, message: str, dataset: Dataset
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(method, dataset, **{option: 3})
    assert str(caught.value).startswith(message)
