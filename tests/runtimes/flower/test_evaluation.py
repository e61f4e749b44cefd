"""Nodes evaluate a model: the figures are those of a naive ranking, and only sums over enough users are opened."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import log2
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from tests.parity.deployment import Deployment
from tests.parity.federation import N_USERS, settings

from perfedrec.core.keys import words_of
from perfedrec.core.records import copied
from perfedrec.evaluation.sample import in_sample
from perfedrec.privacy.policy import Policy
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.runtimes.evaluation import PARTS, Question
from perfedrec.runtimes.flower import NodeApp, Owner
from perfedrec.runtimes.flower.codec import UploadError
from perfedrec.runtimes.flower.evaluation import RECORD, read_question
from perfedrec.runtimes.flower.node_loop import answer

SECURE = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "min_clients": 3, "min_contributors": 1}
HOLDS_OUT = '[evaluation]\nhold_out = "leave-one-out"\n'
KS = (5, 10)


def deployed(folder: Path, rounds: int = 3, configuration: str = HOLDS_OUT, **parts: Any) -> Deployment:
    found = Deployment(settings(**{"pretraining": {"cluster_passes": 0}, **parts}), folder)
    coordinator = found.coordinator
    assert coordinator.federation.setup is not None
    setup = replace(coordinator.federation.setup, configuration=configuration)
    coordinator.federation = replace(coordinator.federation, setup=setup)
    for _ in range(rounds):
        found.play()
    return found


def naive(given: Deployment, part: str) -> dict[str, float]:
    """Mean recall and NDCG over users, with sorted lists and sets."""
    served, sums = given.algorithm.serving(given.flower), dict[str, list[float]]()
    for store in given.nodes.values():
        users = store.everyone()
        rows, positions = store.rows(users)
        states = store.load_client_states(users, positions)
        scores = given.algorithm.scores(given.algorithm.broadcast(served, users), rows, states)
        for place in range(users.numel()):
            one = users[place : place + 1]
            wanted, valid = (set(store.held_out(one, PARTS[each]).items.tolist()) for each in (part, "valid"))
            seen = set(rows.items[rows.segments == place].tolist()) | (valid if part == "test" else set())
            ranked = [item for item in scores[place].argsort(descending=True).tolist() if item not in seen]
            for k in KS:
                hits = [item in wanted for item in ranked[:k]]
                gain = sum(hit / log2(place + 2) for place, hit in enumerate(hits))
                sums.setdefault(f"recall@{k}", []).append(sum(hits) / len(wanted))
                sums.setdefault(f"ndcg@{k}", []).append(gain)
                sums.setdefault(f"precision@{k}", []).append(sum(hits) / k)
    return {name: sum(values) / len(values) for name, values in sums.items()}


@pytest.mark.parametrize("privacy", [{}, SECURE], ids=["none", "secure"])
def test_figures_are_those_of_a_naive_ranking(tmp_path: Path, privacy: dict[str, Any]) -> None:
    # Neighbour sums do not pass through the coordinator, so that the naive ranking could not have them.
    given = deployed(tmp_path, rounds=8, privacy=privacy, model={"neighbours": False})
    served, number = given.algorithm.serving(given.flower), given.flower.round
    for part in PARTS:
        sent = len(given.grid.sent)
        found = given.coordinator.evaluate(served, Question(part, KS, number))
        assert found.why == ""
        assert found.choices[0]["users"] == N_USERS  # all have three items or more
        assert "standard_error" not in found.choices[0]
        expected = naive(given, part)
        assert {name: found.choices[0][name] for name in expected} == pytest.approx(expected, abs=2**-36)
        assert 0 < expected["recall@10"] < 1
        # Whatever the method's other sums are, no answer is in the clear: only the last stage opens the sum.
        up = [each.message for each in given.grid.sent[sent:] if each.up]
        assert {each.metadata.message_type.partition(".")[2] for each in up} == {"keys", "shares", "masked", "unmask"}
        assert (found.bytes_up > 0, found.bytes_down > 0) == (True, True)
    assert given.coordinator.rejected == []


def test_a_sample_of_users_is_that_of_a_simulation(tmp_path: Path) -> None:
    """Each node knows which of its users are asked, and the squares that tell the standard error are sums as well."""
    given = deployed(tmp_path, rounds=4, model={"neighbours": False})
    served, number = given.algorithm.serving(given.flower), given.flower.round
    found = given.coordinator.evaluate(served, Question("valid", KS, number, (), "recall@10", 0.5)).choices[0]
    values = []
    for store in given.nodes.values():
        names = {identity: name for name, identity in store.user_ids().items()}
        users = store.everyone()
        chosen = in_sample(words_of(names[each] for each in users.tolist()), 0.5)
        rows, positions = store.rows(users)
        states = store.load_client_states(users, positions)
        scores = given.algorithm.scores(given.algorithm.broadcast(served, users), rows, states)
        scores[rows.segments, rows.items] = -torch.inf
        for place in chosen.nonzero().squeeze(1).tolist():
            wanted = store.held_out(users[place : place + 1], PARTS["valid"]).items
            values.append(float(torch.isin(scores[place].topk(10).indices, wanted).sum()) / wanted.numel())
    own = torch.tensor(values, dtype=torch.float64)
    assert found["users"] == len(values) < N_USERS
    assert found["recall@10"] == pytest.approx(float(own.mean()), abs=2**-36)
    assert found["standard_error"] == pytest.approx(float((own.var() / len(values) * 0.5).sqrt()), abs=1e-9)


@pytest.mark.parametrize(("metric", "share"), [("recall@10", 0.0), ("recall@10", 1.5), ("recall@7", 0.5), ("", 0.5)])
def test_a_node_refuses_a_sample_that_cannot_be(metric: str, share: float) -> None:
    record = {"part": "valid", "ks": [5, 10], "keep": [0], "metric": metric, "share": share}
    with pytest.raises(UploadError, match=f"share {share} of users"):
        read_question(RecordDict({RECORD: ConfigRecord(record)}), 3)


def test_users_rank_with_what_the_service_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbour sums, first vectors and lists do not pass through the coordinator."""
    given, seen = deployed(tmp_path, pretraining={"kind": "contrastive"}, personal={"neighbourhood": 1.0}), list[Any]()
    plain = given.algorithm.scoring
    monkeypatch.setattr(
        given.algorithm, "scoring", lambda broadcast, *more: (seen.append(broadcast), plain(broadcast, *more))[1]
    )
    number = given.flower.round
    given.coordinator.evaluate(given.algorithm.serving(given.flower), Question("valid", KS, number))
    assert given.coordinator.rejected == []
    assert sum(each.groups.numel() for each in seen) == N_USERS
    for each in seen:
        assert min(each.neighbours.abs().max(), each.start.abs().max(), each.low_rank.abs().max()) > 0
        assert bool((each.near >= 0).any())


def test_held_out_items_never_enter_training(tmp_path: Path) -> None:
    given = deployed(tmp_path, privacy=SECURE)
    for store in given.nodes.values():
        users = store.everyone()
        rows, _ = store.rows(users)
        held = [store.held_out(users, part) for part in PARTS.values()]
        assert torch.equal(rows.counts, given.population.rows(users)[0].counts - 2)
        assert [each.offsets.diff().tolist() for each in held] == [[1] * users.numel()] * 2
        for place in range(users.numel()):
            own = {int(each.items[place]) for each in held} | set(rows.items[rows.segments == place].tolist())
            assert own == set(given.population.rows(users[place : place + 1])[0].items.tolist())


def test_a_new_item_is_trained_on_and_the_held_out_ones_stay(tmp_path: Path) -> None:
    given = deployed(tmp_path, rounds=1)
    store = given.nodes[100]
    users = store.everyone()
    before, held = store.rows(users)[0].items.tolist(), store.held_out(users, PARTS["test"]).items.tolist()
    own = set(given.population.rows(users)[0].items.tolist())
    item = next(item for item in range(60) if item not in own)
    (name,) = store.user_ids()
    store.add_interactions(name, str(item))
    given.play()
    assert store.rows(users)[0].items.tolist() == sorted([*before, item])
    assert store.held_out(users, PARTS["test"]).items.tolist() == held


def test_a_figure_over_too_few_users_is_not_opened(tmp_path: Path) -> None:
    given = deployed(tmp_path, privacy=SECURE | {"min_clients": 12})
    served, sent = given.algorithm.serving(given.flower), len(given.grid.sent)
    for node in (101, 103):  # their users have too few items to hold any out
        store = given.nodes[node]
        with store._database.writing() as db:
            db.execute("DELETE FROM held_out")
    found = given.coordinator.evaluate(served, Question("valid", KS, given.flower.round))
    assert found.choices == ()
    assert found.why.endswith("stage masked: 5 clients are too few for a sum; expected at least 12")
    stages = {each.message.metadata.message_type for each in given.grid.sent[sent:]}
    assert "train.unmask" not in stages  # it is refused before the sum can be opened


def test_a_sum_is_opened_with_one_set_of_nodes_only(tmp_path: Path) -> None:
    given = deployed(tmp_path, privacy=SECURE)
    served, question = given.algorithm.serving(given.flower), Question("valid", KS, given.flower.round)
    first = given.coordinator.evaluate(served, question)
    assert given.coordinator.evaluate(served, question).choices == first.choices
    whole = given.coordinator._assembled()
    given.coordinator.directory = replace(whole, hosts={k: v for k, v in whole.hosts.items() if k != 101})
    second = given.coordinator.evaluate(served, question)
    assert second.choices == ()
    refused = [(each.reason, each.detail) for each in given.coordinator.rejected if each.reason == "failed"]
    assert refused
    called = f"the sum of the validation metrics after {given.flower.round} rounds and phases of run a run"
    for _, detail in refused:
        assert detail.startswith(f"{called} was opened with other nodes or users; the difference")


def test_a_later_round_does_not_change_the_figures_of_a_kept_one(tmp_path: Path) -> None:
    given = deployed(tmp_path, model={"neighbours": False})
    number = given.flower.round
    served = copied(given.algorithm.serving(given.flower))  # later rounds use the same storage
    valid = given.coordinator.evaluate(served, Question("valid", KS, number))
    expected = naive(given, "test")
    for _ in range(3):
        given.play()
        later = given.algorithm.serving(given.flower)
        given.coordinator.evaluate(later, Question("valid", KS, given.flower.round, keep=(number,)))
    found = given.coordinator.evaluate(served, Question("test", KS, number)).choices[0]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2**-36)
    assert valid.choices[0]["users"] == N_USERS
    with given.nodes[100]._database.reading() as db:
        kept = {each for (each,) in db.execute("SELECT DISTINCT round FROM kept_states")}
    assert kept == {number, given.flower.round}


def test_an_owner_who_requires_noise_refuses_to_evaluate(tmp_path: Path) -> None:
    class NoiseAlone(Policy):
        """It allows every method."""

        def objection(self, algorithm: Any) -> None:
            return None

    given = deployed(tmp_path)
    noise = PrivacySettings(aggregation="secure", norm="l2", clip=1.0, epsilon=8.0)
    owner = Owner(lambda: (NoiseAlone("private", noise),))
    refusing = NodeApp(given.nodes[101], lambda _: given.algorithm, "1", given.bundles[101], owner)
    given.apps[101] = partial(answer, refusing.app())
    found = given.coordinator.evaluate(given.algorithm.serving(given.flower), Question("valid", KS, given.flower.round))
    assert found.choices[0]["users"] == N_USERS - given.hosts[101].numel()
    (refused,) = given.coordinator.rejected
    assert (refused.node, refused.phase, refused.reason) == (101, "evaluate", "policy")
    assert "there is no noise in phase evaluate" in refused.detail


def test_the_number_of_a_question_is_that_of_no_round_and_of_no_other_question() -> None:
    numbers = [Question(part, KS, played).number for played in range(5) for part in PARTS]
    assert len(set(numbers)) == 10
    assert max(numbers) < -1
    called = [Question.sum_called(Question(part, KS, 38).number) for part in ("valid", "test")]
    whole = "the sum of the {} metrics after 38 rounds and phases"
    assert called == [whole.format("validation"), whole.format("test")]
    assert Question.sum_called(0) == "the sum of round 0"


def test_users_are_ranked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = deployed(tmp_path, rounds=2)
    question = Question("valid", KS, given.flower.round)
    whole = given.coordinator.evaluate(given.algorithm.serving(given.flower), question).choices
    monkeypatch.setattr("perfedrec.runtimes.flower.evaluation.RANKED_AT_ONCE", 3)
    assert given.coordinator.evaluate(given.algorithm.serving(given.flower), question).choices == whole
