"""Held-out items choose the weights of the personal models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perfedrec import configure, load, train
from perfedrec.core.compiled import usable
from perfedrec.core.errors import ConfigError
from perfedrec.evaluation import Held
from perfedrec.methods.federated.personal import BETAS, MODELS, N_SETTINGS, SHARES, Setting, shares_of, step, turns
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes.simulator import PersonalRecommender, Simulator

DATA = "synthetic:users=120,items=60,clusters=2,interactions_per_user=8,seed=3"
SMALL = {"model__embedding_dim": 8, "rounds": 2, "evaluate_every": 1, "select_by": "ndcg@10", "device": "cpu"}


def test_a_model_gets_each_share_and_the_others_stay_in_proportion() -> None:
    start, names = Setting(torch.tensor([0.0, 1.0, 3.0, 4.0]), 0.5), ["cluster", "global", "pretrained"]
    for turn, model in ((0, 3), (1, 2), (2, 1), (3, 3)):  # from the last to the first, over and over
        found = [step(start, names, turn, number) for number in range(N_SETTINGS)]
        assert {each.beta for each in found} == {0.5}
        assert found[0].weights.tolist() == [0.0, 0.125, 0.375, 0.5]
        own = torch.stack([each.weights for each in found[1:]])
        assert own[:, model].tolist() == pytest.approx(list(SHARES))
        assert own.sum(1).tolist() == pytest.approx([1.0] * len(SHARES))
        a, b = (each for each in (1, 2, 3) if each != model)
        assert torch.allclose(own[:, a] * start.weights[b], own[:, b] * start.weights[a])
        assert not own[:, 0].any()  # a model with weight 0 stays out


def test_the_exponent_of_the_neighbourhood_model_has_a_turn_after_its_share() -> None:
    names = ["global", "neighbourhood"]
    assert turns(names) == ["neighbourhood", "beta", "global"]
    assert turns(names[1:]) == ["beta"]
    start = Setting(torch.tensor([0.0, 0.0, 1.0, 0.0, 3.0]), 0.5)
    found = [step(start, names, 1, number) for number in range(N_SETTINGS)]
    assert [each.beta for each in found] == [0.5, *BETAS]
    assert all(each.weights.tolist() == [0.0, 0.0, 0.25, 0.0, 0.75] for each in found)


def test_a_model_that_was_left_alone_can_be_mixed_again() -> None:
    found = step(Setting(torch.tensor([0.0, 1.0, 0.0]), 0.5), ["local", "cluster", "global"], 1, 1 + SHARES.index(0.5))
    assert found.weights.tolist() == [0.25, 0.5, 0.25]


def test_one_model_alone_leaves_nothing_to_choose() -> None:
    alone = {"local": 0.0, "cluster": 0.0, "global": 0.0, "neighbourhood": 0.0, "pretrained": 2.0}
    built = configure("recommended", **{f"personal__{name}": weight for name, weight in alone.items()}).build()
    assert built.n_choices == 1


def test_before_training_only_models_that_are_ready_take_turns() -> None:
    method = configure("recommended").build()
    state = train("perfedrec_pp", load(DATA), **SMALL).recommender.state
    start = replace(state, round=len(method.phases), mix=None, beta=None)
    for turn in range(6):
        found = [method.choose(replace(start, turn=turn), number) for number in range(method.n_choices)][1:]
        if turn % 3 == 1:
            assert [each.beta for each in found] == list(BETAS)
        else:
            assert torch.stack([each.mix for each in found])[:, (4, 0, 3)[turn % 3]].tolist() == pytest.approx(
                list(SHARES)
            )


def test_no_turn_is_lost_while_there_is_one_model_alone() -> None:
    """In sums the first turn comes with the last pass, which makes the neighbourhood model."""
    options = {"model__embedding_dim": 8, "personal__neighbourhood": 0.43, "privacy__min_clients": 2}
    config = configure("recommended", privacy="secure", **options)
    simulator = Simulator(config.build(), load(DATA), device="cpu")
    valid, seen = load(DATA).valid, []
    held = Held.of(valid.offsets, valid.items, simulator.device)
    phases = [each.name for each in simulator.algorithm.phases]
    before = phases.count("spectral") + phases.index("spectral") - 1
    for _ in range(before + 3):
        simulator.play()
        simulator.evaluate(held, (10,), "ndcg@10")
        seen.append((simulator.state.turn, bool(torch.isclose(simulator.state.mix[4], torch.tensor(0.43 / 1.43)))))
    assert before > 2
    assert seen[:before] == [(0, True)] * before
    assert [turn for turn, _ in seen[before:]] == [1, 2, 3]
    assert not seen[before][1]


def test_turns_begin_with_the_first_upload_where_there_is_a_service() -> None:
    simulator = Simulator(configure("recommended", model__embedding_dim=8).build(), load(DATA), device="cpu")
    held = Held.of(load(DATA).valid.offsets, load(DATA).valid.items, simulator.device)
    simulator.play()
    simulator.evaluate(held, (10,), "ndcg@10")
    assert simulator.state.turn == 1


def test_another_exponent_is_that_of_the_service() -> None:
    """Lists that a service divided by one power of the degree, and a client by the rest."""
    options = {"model__embedding_dim": 8, "neighbourhood__list_length": 60, "personal__chosen": False}
    both = []
    for beta in (0.5, 0.2):
        simulator = Simulator(configure("recommended", **options, neighbourhood__beta=beta).build(), load(DATA))
        for _ in range(simulator.n_phases + 2):
            simulator.play()
        both.append(simulator.recommender())
    users = torch.arange(120)
    own = PersonalRecommender(both[0].algorithm, replace(both[0].state, beta=0.2), both[0].population)
    assert torch.allclose(own.raw_scores(users), both[1].raw_scores(users), atol=1e-5)
    assert not torch.allclose(both[0].raw_scores(users), both[1].raw_scores(users), atol=1e-3)


@pytest.mark.parametrize("clusters", [0, 2])
def test_compared_scores_are_those_of_each_setting(clusters: int) -> None:
    options = {**SMALL, "clusters__n_clusters": clusters}
    recommender = train("perfedrec_pp", load(DATA), **options).recommender
    method, users = recommender.algorithm, torch.arange(120)
    compared = list(method.scoring(*recommender.given(users), compared=True).each())
    assert len(compared) == method.n_choices == N_SETTINGS
    for turn in range(6):
        state = replace(recommender.state, turn=turn)
        given = PersonalRecommender(method, state, recommender.population).given(users)
        compared = [each.clone() for each in method.scoring(*given, compared=True).each()]
        for number, scores in enumerate(compared):
            own = PersonalRecommender(method, method.choose(state, number), recommender.population)
            assert torch.allclose(own.raw_scores(users), scores, atol=1e-5)
            assert torch.allclose(sum(own.explain(users).values()), scores, atol=1e-5)


def test_lists_alone_are_ranked_in_tiles() -> None:
    """All scores of a block of users for all items would take a gigabyte on large data."""
    method = configure("recommended", model__embedding_dim=8).build()
    simulator = Simulator(method, load(DATA), device="cpu")
    for _ in range(simulator.n_phases + 1):
        simulator.play()
    here = simulator.recommender()
    mix = torch.tensor([float(name == "neighbourhood") for name in MODELS])
    state = replace(here.state, mix=mix, turn=turns(MODELS).index("beta"))
    given = PersonalRecommender(method, state, here.population).given(torch.tensor([5, 0, 7]))
    scoring = method.scoring(*given, compared=True)
    assert scoring.lists is not None
    assert scoring.n_settings == N_SETTINGS
    assert [bool(part.users.any()) for part in scoring.parts] == [False]
    assert usable(scoring.parts[0].users)


def test_chosen_weights_are_no_worse_on_validation_and_used_in_lists() -> None:
    data = load(DATA)
    start = {f"personal__{name}": weight for name, weight in zip(MODELS, (0.0, 0.0, 1.0, 0.02, 0.0), strict=True)}
    fixed = train("perfedrec_pp", data, **SMALL, **start, personal__chosen=False)
    found = train("perfedrec_pp", data, **SMALL, **start)
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


def test_a_model_that_is_not_there_has_no_share() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.3])
    assert shares_of(weights, MODELS, True) == pytest.approx(dict(zip(MODELS, weights.tolist(), strict=True)))
    before_clusters = shares_of(weights, MODELS, False)
    assert "cluster" not in before_clusters
    assert before_clusters["global"] == pytest.approx(0.5)
    assert shares_of(weights, MODELS[3:], False) == pytest.approx({"pretrained": 0.25, "neighbourhood": 0.75})
    nothing = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])  # as in the scores: models without weight count alike
    assert shares_of(nothing, MODELS[3:], False) == {"pretrained": 0.5, "neighbourhood": 0.5}


def test_shares_before_training_are_those_of_the_models_that_recommend(tmp_path: Path) -> None:
    result = train("perfedrec_pp", load(DATA), **{**SMALL, "rounds": 0}, output=tmp_path / "run")
    found = RunFolder(tmp_path / "run").summary().chosen
    shares = {name.removeprefix("personal."): share for name, share in found.items() if name != "neighbourhood.beta"}
    assert list(shares) == ["pretrained", "neighbourhood"]
    assert sum(shares.values()) == pytest.approx(1.0)
    parts = result.recommender.explain(torch.arange(120))
    assert {name for name, part in parts.items() if bool(part.any())} == {
        name for name, share in shares.items() if share > 0
    }


def test_what_was_chosen_is_in_the_result(tmp_path: Path) -> None:
    result = train("perfedrec_pp", load(DATA), **SMALL, output=tmp_path / "run")
    method, state = result.recommender.algorithm, result.recommender.state
    assert RunFolder(tmp_path / "run").summary().chosen == method.chosen_options(state)
    clusters = replace(state.clusters, centroids=torch.zeros(5, 8))
    trained = replace(state, round=len(method.phases) + 1, clusters=clusters)
    assert method.chosen_options(trained) == pytest.approx(
        {
            **{f"personal.{name}": share for name, share in zip(MODELS, state.mix.tolist(), strict=True)},
            "neighbourhood.beta": state.beta,
        }
    )
    train("perfedrec_pp", load(DATA), **SMALL, personal__chosen=False, output=tmp_path / "fixed")
    assert RunFolder(tmp_path / "fixed").summary().chosen == {}
    assert "chosen" not in (tmp_path / "fixed" / "result.json").read_text()
