"""What the coordinator and the nodes agree on, as text."""

from __future__ import annotations

import pytest

from perfedrec import configure
from perfedrec.core.errors import ConfigError
from perfedrec.federation.agreement import build, method_of


@pytest.mark.parametrize(
    ("preset", "overrides", "privacy"),
    [
        ("paper", ("clusters.n_clusters=3", "personal.learned=true"), None),
        ("recommended", ("model.embedding_dim=24",), "secure"),
        ("recommended", (), "private"),
        ("fedmf", ("client.l2=0.5",), None),
        ("gpfedrec", (), None),
    ],
)
def test_a_method_survives_being_written_down(preset: str, overrides: tuple[str, ...], privacy: str | None) -> None:
    algorithm = None if preset in ("paper", "recommended") else preset
    config = configure(preset, overrides=overrides, privacy=privacy, algorithm=algorithm)
    text, expected = method_of(config), config.build()
    again = build(text)
    assert type(again) is type(expected)
    assert again.settings == expected.settings  # with the noise that was solved
    assert again.settings.privacy.noise.any == (privacy == "private")
    assert "[run]" not in text
    assert "[data]" not in text


def test_an_epsilon_without_noise_is_refused() -> None:
    """Or a node would hand its sums over without any."""
    text = method_of(configure("recommended", privacy="private"))
    start, rest = text.split("[privacy.noise]")
    bare = start + rest[rest.find("[") :] if "[" in rest else start
    with pytest.raises(ConfigError, match="asks for an epsilon and names no noise"):
        build(bare)


def test_a_file_of_code_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not come with perfedrec"):
        build('algorithm = "somewhere.py:Method"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        build("algorithm = ")
