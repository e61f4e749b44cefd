"""Configuration: sources, precedence, and mistakes answered with the nearest name."""

from pathlib import Path

import pytest

from perfedrec.core.errors import ConfigError
from perfedrec.experiment import config


@pytest.mark.parametrize("preset", config.presets())
def test_a_preset_survives_the_way_through_toml(preset: str, tmp_path: Path) -> None:
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


def test_sources_have_to_make_sense_together_and_not_each_alone(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[privacy]\nnoise_scale = 0.2\n")  # its clip is the preset's
    assert config.load("paper", file).privacy.noise_scale == 0.2
    with pytest.raises(ConfigError, match="noise_scale needs clip"):
        config.load("recommended", file)
    file.write_text("[data]\nk_core = 2\n")  # a method that is fitted at once has no rounds by its preset
    assert config.resolve(None, file, algorithm="item_knn").run.rounds == 0
    file.write_text("[privacy]\nnoise_scale = -1\n")
    with pytest.raises(ConfigError, match=r"some.toml: privacy.noise_scale: .* greater than or equal to 0"):
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
        ("client.learning_rate=inf", "client.learning_rate: Input should be a finite number"),
        ("privacy.epsilon=nan", "finite number"),
        ("personal.pretrained=0.9", "needs pretraining.kind = spectral"),
    ],
)
def test_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("paper", overrides=[override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_and_an_unknown_part_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean paper"):
        config.load("papr")
    with pytest.raises(ConfigError, match="did you mean clusters"):
        config.load("paper", without=["cluster"])


@pytest.mark.parametrize("part", config.ABLATIONS)
def test_each_ablation_changes_a_preset(part: str) -> None:
    changed = [config.load(preset, without=[part]) != config.load(preset) for preset in ("recommended", "paper")]
    assert any(changed)
