"""The configuration: its sources, which of them wins, and messages that name the nearest valid name."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from perfedrec.compare.bench import read
from perfedrec.compare.tune import read_space
from perfedrec.core.dotted import as_text, flat, keys, put
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.mistakes import explain
from perfedrec.core.nearest import nearest
from perfedrec.methods.registry import METHODS
from perfedrec.runs import config, preset_files
from perfedrec.runs.folder import RunFolder


@pytest.mark.parametrize("preset", preset_files.presets())
def test_a_preset_is_the_same_after_it_was_written_to_toml_and_read(preset: str, tmp_path: Path) -> None:
    first = config.load(preset)
    file = tmp_path / "all.toml"
    file.write_text(first.to_toml())
    assert config.load(None, file) == first
    assert config.resolve(None, file) == first  # on top of its method's preset


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[run]\nrounds = 7\nseed = 3\n")
    loaded = config.load("paper", file, ["run.rounds=9", "privacy.clip=off", "privacy.noise_scale=0"], run__seed=4)
    assert (loaded.run.rounds, loaded.run.seed, loaded.privacy.clip) == (9, 4, None)
    assert loaded.client.loss == "bpr"


def test_options_have_to_fit_together_in_all_sources_and_not_in_each_one(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[privacy]\nnoise_scale = 0.2\n")  # the clip comes from the preset
    assert config.load("paper", file).privacy.noise_scale == 0.2
    with pytest.raises(ConfigError, match="noise_scale needs clip"):
        config.load("recommended", file)
    file.write_text("[data]\nk_core = 2\n")  # the preset of a method that is fitted at once has no rounds
    assert config.resolve(None, file, algorithm="item_knn").run.rounds == 0
    file.write_text("[privacy]\nnoise_scale = -1\n")
    with pytest.raises(ConfigError, match=r"some.toml: privacy.noise_scale: expected at least 0 \(given: -1\)"):
        config.load("paper", file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("client.learning_rat=1", "did you mean client.learning_rate?"),
        ("learning_rate=1", "learning_rate"),
        ("run.rounds", "has no value"),
        ("run.rounds=-1", "run.rounds"),
        ("client.loss=hinge", "client.loss"),
        ("personal.local=-0.9", "personal.local"),
        ("client.learning_rate=inf", "client.learning_rate: expected a finite number (given: inf)"),
        ("privacy.epsilon=nan", "finite number"),
        ("run.rounds=1.5", "run.rounds: expected a whole number (given: 1.5)"),
        ("run.rounds=off", "run.rounds: expected a whole number (given: off)"),
        ("run.rounds.x=1", "run.rounds: expected a whole number (given: a section)"),
        ("run=1", "run: expected a section (given: 1)"),
        ("data.split=half", "data.split: expected leave-one-out, ratio, global-time, folds or users (given: 'half')"),
        ("data.ratio=[1, 2]", "data.ratio: expected three shares, such as [0.8, 0.1, 0.1] (given: [1, 2])"),
        ("data.ratio=1,0", "data.ratio: expected three shares"),
        ("data.folds=1", "data: split folds needs the number of folds, at least 2, got 1"),
        ("data.ties=all", "data.ties: expected random or together"),
        ("pretraining.kind=simgcl_", "(given: 'simgcl_'); did you mean simgcl?"),
        ("run.select_by=ndgc@10", "(given: 'ndgc@10'); did you mean ndcg@10?"),
        ("run.select_by=Recal", "(given: 'Recal'); did you mean recall@20?"),
        ("model.embedding_dim=true", "model.embedding_dim: expected a whole number (given: true)"),
        ("privacy.clip=false", "privacy.clip: expected a number or off (given: false)"),
        ("data.test=a.csv", "data: a given split needs train and test, and valid if there is one"),
        ("run.dropout_rate=2", "run.dropout_rate: expected at most 1 (given: 2)"),
        (
            "method.l2=1",
            "there is no section method; perfedrec config keys --algorithm NAME lists",
        ),
        ("neighbourhood.gamma=none", "neighbourhood.gamma: expected a number or off (given: 'none')"),
        ("client.learning_rate=none", "client.learning_rate: expected a number (given: 'none')"),
        ("personal.pretrained=0.9", "needs pretraining.kind = spectral"),
    ],
)
def test_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("paper", overrides=[override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "name", "near"),
    [
        ("ultragcn", "method.dropout", None),  # l2 is in the same section, and no more like it than others
        ("ultragcn", "method.lr", None),
        ("ultragcn", "method.temperature", None),
        ("ultragcn", "run.epochs", None),
        ("perfedrec_pp", "client.dropout", None),
        ("perfedrec_pp", "personal.share", None),
        ("ultragcn", "method.batchsize", "method.batch_size"),
        ("ultragcn", "method.dim", "method.embedding_dim"),
        ("ultragcn", "method.neg_weight", "method.negative_weight"),
        ("lightgcn", "method.layers", "method.n_layers"),
        ("lightgcn", "model.l2", "method.l2"),
        ("perfedrec_pp", "clint.learning_rate", "client.learning_rate"),
        ("perfedrec_pp", "server.learning_rat", "server.learning_rate"),
        ("perfedrec_pp", "privacy.eps", "privacy.epsilon"),
        ("perfedrec_pp", "k_cor", "data.k_core"),
        ("perfedrec_pp", "run.local_steps", "client.local_steps"),
    ],
)
def test_a_name_is_suggested_only_where_it_is_near(algorithm: str, name: str, near: str | None) -> None:
    found = nearest(name, keys(config.config_type(algorithm)))
    assert found == ("" if near is None else f"; did you mean {near}?")


def test_where_no_name_is_near_the_list_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        config.resolve(algorithm="ultragcn", overrides=["method.dropout=0.1"])
    assert str(caught.value).endswith(
        "there is no option method.dropout; perfedrec config keys --algorithm NAME lists what a method has"
    )


@pytest.mark.parametrize(
    ("algorithm", "names", "least"),
    [
        ("perfedrec_pp", ("neighbourhood.alpha", "neighbourhood.beta", "neighbourhood.gamma"), 0),
        ("rp3beta", ("method.alpha", "method.beta"), 0),
        ("lightgcn_pp", ("method.alpha", "method.beta"), -2),
    ],
)
def test_exponents_of_degrees_have_the_same_limits(algorithm: str, names: tuple[str, ...], least: int) -> None:
    for key in names:
        config.resolve(algorithm=algorithm, overrides=[f"{key}=2"])
        config.resolve(algorithm=algorithm, overrides=[f"{key}={least}"])
        with pytest.raises(ConfigError, match=f"{key}: expected at most 2 "):
            config.resolve(algorithm=algorithm, overrides=[f"{key}=2.01"])
        with pytest.raises(ConfigError, match=f"{key}: expected at least {least} "):
            config.resolve(algorithm=algorithm, overrides=[f"{key}={least - 0.01}"])


def test_the_split_is_the_one_that_the_other_options_belong_to(tmp_path: Path) -> None:
    def data(*overrides: str) -> config.DataSettings:
        return config.load(None, None, overrides).data

    assert (data().split, data("data.order=random").split) == ("leave-one-out", "leave-one-out")
    assert data("data.ratio=[0.6, 0.2, 0.2]").split == "ratio"
    assert data("data.ratio=0.6,0.2,0.2").ratio == (0.6, 0.2, 0.2)
    assert data("data.split=global-time", "data.ratio=[0.6, 0.2, 0.2]").split == "global-time"
    assert data("data.folds=5", "data.fold=2").split == "folds"
    dated = data("data.valid_from=2020-01-01", "data.test_from=2020-02-01T00:00:00Z")
    assert (dated.split, dated.valid_from, dated.test_from) == (
        "global-time",
        "2020-01-01",
        "2020-02-01 00:00:00+00:00",
    )
    assert data("data.valid_from=5", "data.test_from=6").valid_from == "5"
    with pytest.raises(ConfigError, match="ratio changes nothing with split leave-one-out"):
        data("data.split=leave-one-out", "data.ratio=[0.6, 0.2, 0.2]")
    whole = config.load(None, None, ["data.folds=5"])
    assert config.check(tomllib.loads(whole.to_toml())) == whole


def test_train_and_test_on_the_command_line_replace_a_split_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data]\ntrain = "a"\nvalid = "b"\ntest = "c"\n')
    given = config.load(None, tmp_path / "a.toml", data__train="x", data__test="y").data
    assert (given.train, given.valid, given.test) == ("x", None, "y")


@pytest.mark.parametrize("name", METHODS)
def test_every_mistake_is_reported_in_our_own_words(name: str) -> None:
    """Every option of every method, with values of many types: the message names it, without words of pydantic."""
    kind, told = config.config_type(name), 0
    for key in set(keys(kind)) - {"algorithm"}:  # which names the class
        for value in ("x", True, -1e9, 1e12, 0.5, [1], {"a": 1}, float("nan")):
            tree: dict[str, Any] = {"algorithm": name}
            put(tree, key, value)
            try:
                kind.model_validate(tree)
            except ValidationError as error:
                if error.errors()[0]["type"] != "value_error":
                    said, told = explain(error.errors(), kind), told + 1
                    assert said.startswith(f"{key}: expected "), said
                    assert "Input should" not in said
    assert told > 100


def test_the_message_about_an_unreadable_file_has_no_error_number(tmp_path: Path) -> None:
    missing, folder, binary = tmp_path / "missing.toml", tmp_path / "folder.toml", tmp_path / "binary.toml"
    folder.mkdir()
    binary.write_bytes(b"\xff\xfe")
    for file, why in (
        (missing, "there is no such file or folder"),
        (folder, "it is a folder"),
        (binary, "not UTF-8 text"),
    ):
        for reading, expected in (
            (lambda path: config.load(None, path), "a TOML file"),
            (read_space, "a TOML file with a table [space]"),
            (lambda path: read(path, tmp_path / "out"), "the TOML file of a comparison"),
        ):
            with pytest.raises(ConfigError) as caught:
                reading(file)
            assert str(caught.value).startswith(f"{file}: cannot be read (")
            assert f"{why}); expected {expected}" in str(caught.value)
    with pytest.raises(
        CheckpointError, match=r"config\.toml cannot be read \(there is no such file or folder\); expected the"
    ):
        RunFolder(tmp_path).config()
    with pytest.raises(
        CheckpointError, match=r"result\.json cannot be read \(there is no such file or folder\); expected the"
    ):
        RunFolder(tmp_path).summary()


def test_an_unknown_preset_and_an_unknown_part_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean paper"):
        config.load("papr")
    with pytest.raises(ConfigError, match="did you mean clusters"):
        config.load("paper", without=["cluster"])


def test_a_part_that_a_method_does_not_have_cannot_be_switched_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.resolve(algorithm="mf", without=["clusters"])
    assert str(caught.value) == "mf has no part 'clusters' to switch off; expected none: mf has no such parts"
    with pytest.raises(ConfigError, match=r"fedmf has no part 'clusters' .*; expected one of privacy, averaging, ser"):
        config.resolve(algorithm="fedmf", without=["averaging", "clusters"])
    assert config.resolve(algorithm="fedmf", without=["privacy"]).settings.privacy.clip is None


@pytest.mark.parametrize("part", preset_files.ABLATIONS)
def test_each_ablation_changes_a_preset(part: str) -> None:
    changed = [config.load(preset, without=[part]) != config.load(preset) for preset in ("recommended", "paper")]
    assert any(changed)


def test_lengths_of_lists_can_be_written_in_several_ways(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[run]\nks = [20, 5]\n")
    assert (
        config.load(file=file).run.ks
        == config.load(overrides=["run.ks=5,20"]).run.ks
        == config.load(run__ks="20,5").run.ks
        == (5, 20)
    )
    assert config.load(overrides=["run.ks=7"]).run.cutoffs == (7, 20)
    assert config.load(overrides=["run.ks=7", "run.select_by=mrr@7"]).run.cutoffs == (7,)
    for wrong in ("0", "[]", "5,x", "[2.5]", "true"):
        with pytest.raises(ConfigError, match=r"run\.ks: expected whole numbers from 1, such as 5,10,20"):
            config.load(overrides=[f"run.ks={wrong}"])


def test_a_run_with_the_old_lengths_of_lists_is_the_same_as_before_there_were_any() -> None:
    before = config.load().model_dump(mode="json")
    del before["run"]["ks"]
    assert config.identity(config.load().model_dump(mode="json")) == config.identity(before)
    assert config.identity(config.load(run__ks="5").model_dump(mode="json")) != config.identity(before)


def test_a_preset_of_another_method_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mf.toml").write_text('algorithm = "mf"\n')
    for given in ({"algorithm": "mf"}, {"file": tmp_path / "mf.toml"}):
        with pytest.raises(ConfigError, match="preset lightgcn is that of another method than mf; expected method"):
            config.resolve("lightgcn", **given)
    assert config.resolve("lightgcn", algorithm="lightgcn") == config.resolve(algorithm="lightgcn")
    for general in ("recommended", "paper"):
        assert config.resolve(general, algorithm="perfedrec_pp").algorithm == "perfedrec_pp"


@pytest.mark.parametrize("profile", [None, "paper"])
def test_the_defence_that_the_docs_choose_fits_profiles_that_show_uploads(profile: str | None) -> None:
    file = Path(__file__).parents[2] / "deploy" / "defence.toml"
    chosen = config.load("recommended", file, privacy=profile).settings.defence
    assert (chosen.row_clip, chosen.row_length, chosen.report_length) == (0.3, 1.5, 1.0)
    assert (chosen.holders, chosen.alike) == (5, 0.5)


def test_the_defence_that_the_docs_choose_for_secret_sums_fits_their_profile() -> None:
    file = Path(__file__).parents[2] / "deploy" / "defence-secure.toml"
    loaded = config.load("recommended", file, privacy="secure")
    assert loaded.settings.defence.group_size == loaded.settings.privacy.min_clients == 32
    with pytest.raises(ConfigError, match="secure sums in a basis"):
        config.load("recommended", file)


def test_values_as_they_are_shown_are_taken_back() -> None:
    usual = config.resolve()
    values = {key: field.default for key, field in keys(type(usual)).items()}
    values |= flat(usual.model_dump(mode="json", by_alias=True))
    assert as_text(values["privacy.clip"]) == "off"
    assert config.resolve(overrides=[f"{key}={as_text(value)}" for key, value in values.items()]) == usual
