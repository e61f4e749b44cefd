"""Held-out items choose the weights of the personal models."""

from __future__ import annotations

import pytest
import torch

from perfedrec import configure, load, train
from perfedrec.core.errors import ConfigError
from perfedrec.methods.federated.personal import SHARES, n_steps, step

DATA = "synthetic:users=120,items=60,clusters=2,interactions_per_user=8,seed=3"
SMALL = {"model__embedding_dim": 8, "rounds": 2, "evaluate_every": 1, "select_by": "ndcg@10", "device": "cpu"}


def test_the_settings_give_each_model_each_share_and_keep_the_others_in_proportion() -> None:
    weights, allowed = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([False, True, True, True])
    assert n_steps(weights) == 1 + 3 * len(SHARES)
    found = [step(weights, allowed, number) for number in range(n_steps(weights))]
    assert found[0].tolist() == [0.0, 0.125, 0.375, 0.5]
    for number, model in enumerate((1, 2, 3)):
        own = torch.stack(found[1 + number * len(SHARES) :][: len(SHARES)])
        assert own[:, model].tolist() == list(SHARES)
        assert own.sum(1).tolist() == pytest.approx([1.0] * len(SHARES))
        a, b = (each for each in (1, 2, 3) if each != model)
        assert torch.allclose(own[:, a] * weights[b], own[:, b] * weights[a])
    assert all(float(each[0]) == 0 for each in found)  # a model with weight 0 stays out


def test_a_model_that_was_left_alone_can_be_mixed_again() -> None:
    alone, allowed = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([True, True, True])
    found = step(alone, allowed, 1 + len(SHARES) + SHARES.index(0.5))
    assert found.tolist() == [0.25, 0.5, 0.25]


def test_one_model_alone_leaves_nothing_to_choose() -> None:
    assert n_steps(torch.tensor([0.0, 2.0, 0.0, 0.0])) == 1


def test_chosen_weights_are_no_worse_on_validation_and_used_in_lists() -> None:
    data = load(DATA)
    start = {"personal__local": 0.0, "personal__cluster": 0.0, "personal__global": 1.0, "personal__pretrained": 0.02}
    fixed = train("perfedrec_pp", data, **SMALL, **start)
    found = train("perfedrec_pp", data, **SMALL, **start, personal__chosen=True)
    for a, b in zip(fixed.history, found.history, strict=True):
        assert a.report == b.report  # training is not changed
        assert b.valid["ndcg@10"] >= a.valid["ndcg@10"]
    assert found.history[-1].valid["ndcg@10"] > fixed.history[-1].valid["ndcg@10"]
    mix = found.recommender.state.mix
    assert mix.shape == (4,)
    assert mix[:2].tolist() == [0.0, 0.0]
    parts = found.recommender.explain(torch.arange(120))
    scores = found.recommender.raw_scores(torch.arange(120))
    assert torch.allclose(sum(parts.values()), scores, atol=1e-5)


def test_weights_are_either_learned_or_chosen() -> None:
    with pytest.raises(ConfigError, match="learned and chosen are two ways to the same weights"):
        configure("recommended", personal__learned=True, personal__chosen=True)
