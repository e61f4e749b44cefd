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
def test_a_method_is_the_same_after_it_was_written_as_text_and_read(
    preset: str, overrides: tuple[str, ...], privacy: str | None
) -> None:
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
    """Otherwise a node would send its sums without noise."""
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
