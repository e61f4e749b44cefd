"""How far methods get on Yelp with a little training: validation Recall@20 as measured, from below and from above.

A standard error over users is .004, but the same users are asked: seeds differ by .002 at most here.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from perfedrec import configure, load, train

LEVELS = [
    ("lightgcn", "lightgcn", ["run.rounds=2"], 0.0592),
    ("xsimgcl", "xsimgcl", ["run.rounds=2"], 0.0582),
    ("lightgcn_pp", "lightgcn_pp", ["run.rounds=2"], 0.0807),
    (
        "recommended",
        "perfedrec_pp",
        ["run.rounds=0", "personal.neighbourhood=0"],
        0.0816,
    ),  # spectral pre-training alone
    ("fedgnn", "fedgnn", ["run.rounds=40", "run.evaluate_every=40"], 0.0577),
]


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "name", "overrides", "level"), LEVELS)
def test_level_on_yelp(
    preset: str, name: str, overrides: list[str], level: float, real_data: Callable[[str], Path]
) -> None:
    config = configure(preset, overrides=overrides, algorithm=name)
    result = train(config.build(), load(str(real_data("yelp"))), config.run, config=config)
    assert result.valid["recall@20"] == pytest.approx(level, abs=0.004)
