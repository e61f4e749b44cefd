"""What a node requires: each option that protects less is named, and equal or more protection is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from perfedrec.federation.agreement import with_real_noise
from perfedrec.federation.node import policy_of
from perfedrec.privacy.policy import Policy
from perfedrec.runs.config import load, resolve


def required(profile: str) -> Policy:
    policy = policy_of(profile)
    assert policy is not None
    return policy


def objection(profile: str, run: str, *options: str, **values: Any) -> str | None:
    config = with_real_noise(
        load("recommended", None, options, privacy=run, **values),
        chosen=any("noise_source" in each for each in options),
    )
    return required(profile).objection(config.build())


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_a_profile_satisfies_itself_and_weaker_ones(preset: str) -> None:
    profiles = ["none", "paper", "secure", "private"]
    assert policy_of("none") is None
    for place, run in enumerate(profiles):
        algorithm = with_real_noise(load(preset, privacy=run)).build()
        met = [name for name in profiles[1:] if required(name).objection(algorithm) is None]
        assert met == profiles[1 : place + 1], run


@pytest.mark.parametrize(
    ("required", "option", "said"),
    [
        ("paper", "privacy.clip=0.6", "privacy.clip is 0.6, above 0.5"),
        ("paper", "privacy.noise_scale=0.09", "privacy.noise_scale is 0.09, below 0.1"),
        ("paper", "privacy.pseudo_items=0.05", "privacy.pseudo_items changes 0.05, below 0.1"),
        ("paper", "privacy.masking=0", "privacy.masking changes 0, below 0.1"),
        ("paper", "privacy.noise_source=simulation", "privacy.noise_source is simulation, not opendp"),
        ("secure", "privacy.clip=11", "privacy.clip is 11, above 10"),
        ("secure", "privacy.clip=off", "privacy.clip is off, above 10"),
        ("secure", "privacy.norm=coordinate", "privacy.norm is coordinate, not l2"),
        ("secure", "privacy.rank=0", "privacy.rank is 0, not from 1 to 64"),
        ("secure", "privacy.rank=65", "privacy.rank is 65, not from 1 to 64"),
        ("secure", "privacy.min_contributors=4", "privacy.min_contributors is 4, below 5"),
        ("secure", "privacy.min_clients=31", "privacy.min_clients is 31, below 32"),
        ("secure", "defence.group_size=32", "defence.group_size = 32 opens sums of few clients by item"),
        ("secure", "privacy.aggregation=dense", "privacy.aggregation is dense, not secure"),
        ("secure", "selection.max_participations=51", "selection.max_participations is 51, above 50"),
        ("secure", "selection.max_participations=off", "selection.max_participations is off, above 50"),
        ("private", "privacy.epsilon=8.1", "epsilon against the coordinator is 8.1, above 8"),
        ("private", "privacy.delta=1e-3", "epsilon against the coordinator is 10.5, above 8"),
        ("private", "privacy.epsilon=off", "epsilon against the coordinator is none"),
        ("private", "privacy.noise_source=simulation", "privacy.noise_source is simulation, not opendp"),
    ],
)
def test_an_option_that_protects_less_is_named(required: str, option: str, said: str) -> None:
    found = objection(required, required, option)
    assert found is not None
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("required", "run", "options"),
    [
        ("paper", "paper", ("privacy.clip=0.4", "privacy.noise_scale=0.2", "privacy.masking=0.3")),
        ("paper", "private", ("privacy.noise_source=simulation",)),  # nobody sees an upload
        ("secure", "private", ("privacy.noise_source=simulation",)),  # it requires no noise
        ("secure", "secure", ("privacy.clip=5", "selection.max_participations=3", "clusters.n_clusters=2")),
        ("private", "private", ("privacy.epsilon=4", "privacy.delta=1e-6")),
    ],
)
def test_more_protection_is_accepted(required: str, run: str, options: tuple[str, ...]) -> None:
    assert objection(required, run, *options) is None


def test_randomised_response_can_replace_decoys_and_masking() -> None:
    """An epsilon of ln 9 per item changes a tenth of the items, as decoys and masking of profile paper do."""
    instead = ("privacy.pseudo_items=0", "privacy.masking=0")
    assert objection("paper", "paper", *instead, "privacy.randomised_response=2.19") is None
    found = objection("paper", "paper", *instead, "privacy.randomised_response=2.3")
    assert found == "privacy.randomised_response changes 0.0911, below 0.1"


def test_private_training_counts_up_to_its_limit_and_is_refused_without_noise() -> None:
    cap, policy = "selection.max_participations=5", required("private")
    pretraining = with_real_noise(load("recommended", privacy="private")).build()
    assert objection("private", "private", cap, run__rounds=20) is None  # the budget is shared with training
    found = objection("private", "private", cap, "privacy.epsilon=9", run__rounds=20)
    assert found == "epsilon against the coordinator is 9, above 8"
    assert policy.objection_to("spectral", pretraining) is None
    assert policy.objection_to("train", pretraining) == "there is no noise in phase train"
    assert required("secure").objection_to("train", pretraining) is None


@pytest.mark.parametrize("name", ["fedmf", "pfedrec", "fedncf", "fedrap", "fedgnn", "fedcia", "colr", "pfedclr"])
def test_all_methods_are_checked_in_the_same_way(name: str) -> None:
    assert required("secure").objection(resolve(algorithm=name, privacy="secure").build()) is None
    assert required("secure").objection(resolve(algorithm=name).build()) is not None
