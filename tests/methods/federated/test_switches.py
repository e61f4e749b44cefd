"""Every option has an effect: with one option changed, the same world has other scores."""

from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.methods.federated.toys import settings, world

SOFTMAX = (("client__loss", "softmax"),)
SPECTRAL = (("pretraining__kind", "spectral"), ("model__encoder", "spectral"))
CONTRASTIVE = (("pretraining__kind", "contrastive"),)
NOISY = (("privacy__clip", 0.05), ("privacy__noise_scale", 0.01))


@cache
def scores(options: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    changes = dict(options)
    here = world(**changes)
    here.play(4 + len(here.algorithm.phases))
    result = here.scores()
    assert bool(result.isfinite().all())
    return result


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ((), {"attributes": True}),
        ((), {"model__encoder": "spectral"}),
        ((), {"model__n_layers": 0}),
        ((), {"model__n_layers": 1}),
        ((), {"model__n_layers": 3}),
        ((), {"model__neighbours": False}),
        ((), {"model__refresh_every": 1}),
        ((), {"model__init_scale": 0.2}),
        ((), {"client__loss": "softmax"}),
        ((), {"client__similarity": "cosine"}),
        ((), {"client__leave_one_out": True}),
        ((), {"client__learning_rate": 0.5}),
        ((), {"client__user_learning_rate": 0.1}),
        ((), {"client__local_steps": 2}),
        ((), {"client__l2": 0.1}),
        (SOFTMAX, {"client__n_negatives": 3}),
        (SOFTMAX, {"client__temperature": 0.5}),
        ((), {"privacy__clip": 0.02}),
        ((("privacy__clip", 0.05),), {"privacy__noise_scale": 0.01}),
        (NOISY, {"privacy__noise_scale": 0.02}),
        ((), {"privacy__pseudo_items": 0.5}),
        ((), {"privacy__masking": 0.4}),
        ((), {"server__optimizer": "fedavg"}),
        ((), {"server__optimizer": "fedadagrad"}),
        ((), {"server__optimizer": "fedyogi"}),
        ((), {"server__learning_rate": 0.1}),
        ((), {"server__beta1": 0.5}),
        ((), {"server__beta2": 0.5}),
        ((), {"server__epsilon": 0.1}),
        ((), {"server__weighting": "interactions"}),
        ((), {"clusters__n_clusters": 0}),
        ((), {"clusters__n_clusters": 2}),
        ((), {"clusters__start": 2}),
        ((), {"clusters__stop": 2}),
        ((), {"clusters__every": 1}),
        ((), {"clusters__learning_rate": 0.5}),
        ((), {"clusters__proportional": False}),
        ((), {"selection__n_clients_per_round": 11}),
        ((), {"personal__local": 0.6, "personal__cluster": 0.2, "personal__global": 0.2}),
        ((), {"personal__local": 0.0, "personal__cluster": 0.6, "personal__global": 0.4}),
        ((("model__init_scale", 1.5),), {"personal__learned": True}),  # its step grows with the scores
        ((), {"pretraining__kind": "contrastive"}),
        ((), {"pretraining__kind": "spectral"}),
        (SPECTRAL, {"pretraining__passes": 2}),
        (SPECTRAL, {"pretraining__at": "clients"}),
        (SPECTRAL, {"pretraining__cluster_passes": 1}),
        (SPECTRAL, {"model__encoder": "lightgcn"}),
        (CONTRASTIVE, {"pretraining__steps": 8}),
        (CONTRASTIVE, {"model__n_layers": 0}),
        ((), {"defence__row_clip": 0.01}),
        ((), {"defence__row_length": 1.1}),
        ((), {"defence__row_step": 1e-3}),
        ((), {"defence__sparse": 0.3}),
        ((), {"defence__report_length": 0.5}),
        ((), {"defence__rule": "median"}),
        ((("defence__rule", "trimmed-mean"),), {"defence__malicious": 0.4}),
        ((("defence__rule", "krum"),), {"defence__malicious": 0.3}),
        ((("defence__rule", "clip"), ("defence__threshold", 1.0)), {"defence__threshold": 0.5}),
        ((("defence__rule", "quorum"),), {"defence__quorum": 3}),
        (SPECTRAL, {"defence__max_edges": 2}),
        (SPECTRAL, {"defence__holders": 6}),
        (SPECTRAL, {"defence__alike": 0.2}),
    ],
    ids=str,
)
def test_each_option_changes_the_scores(base: tuple[tuple[str, Any], ...], change: dict[str, Any]) -> None:
    before, after = scores(base), scores(tuple((dict(base) | change).items()))
    difference = float((before - after).abs().max())
    assert difference > 1e-5 * float(before.abs().max())  # rounding is below 1e-6


def test_perfedrec_equals_perfedrec_pp_without_pretraining() -> None:
    tables = []
    for plus in (False, True):
        here = world(plus=plus)
        here.play(4)
        tables.append(here.state.items)
    assert torch.equal(tables[0], tables[1])
    here = world(**dict(CONTRASTIVE))
    here.play(4)
    assert not torch.allclose(here.state.items, tables[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"personal__local": 0.0, "personal__cluster": 0.0, "personal__global": 0.0},
        {"personal__pretrained": 0.5},  # no pre-trained model that could recommend
        {"model__layers": 2},  # unknown
        {"client__loss": "hinge"},
        {"privacy__masking": 1.0},
        {"privacy__noise_scale": 0.1},  # without a clip
        {"pretraining__steps": 0},
    ],
    ids=str,
)
def test_contradictory_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**changes)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        settings().model.n_layers = 5
