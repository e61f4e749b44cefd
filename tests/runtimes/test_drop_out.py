"""Clients that do not answer: they do not change anything, and a round without answers is a valid round."""

from typing import Any

import pytest
import torch
from tests.methods.federated.toys import SEED, World, world

from perfedrec.core.keys import Key
from perfedrec.core.records import copied, flatten
from perfedrec.runtimes.round import play_round, round_key, surviving

KINDS: dict[str, dict[str, Any]] = {
    "alone": {"model__neighbours": False},
    "neighbours": {},
    "contrastive": {"pretraining__kind": "contrastive"},
    "spectral": {"pretraining__kind": "spectral", "model__encoder": "spectral", "pretraining__cluster_passes": 1},
    "attributes": {"attributes": True, "server__averaging": 0.9},
}


def unequal(before: Any, after: Any) -> set[str]:
    """Names of the tensors that differ; ``None`` differs from a tensor."""
    old, new = flatten(before)[0], flatten(after)[0]
    return {
        name for name in {*old, *new} if name not in old or name not in new or not torch.equal(old[name], new[name])
    }


@pytest.mark.parametrize("kind", KINDS)
def test_when_all_drop_out_only_the_round_number_changes(kind: str) -> None:
    here = world(clusters__start=100, model__refresh_every=100, **KINDS[kind])
    before, client_state = copied(here.state), copied(here.population.client_state)
    reports = here.play(8, dropout_rate=1.0)
    assert here.state.round == 8
    assert unequal(before, here.state) == set()
    assert unequal(client_state, here.population.client_state) == set()
    for number, report in enumerate(reports):
        assert report.round == number
        assert report.cohort > 0
        assert (report.clients, report.loss, report.bytes_up, report.bytes_up_max, report.bytes_down) == (
            0,
            None,
            0,
            0,
            0,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_tables_do_not_change_when_all_drop_out_of_training(kind: str) -> None:
    here = world(clusters__start=100, model__refresh_every=100, **KINDS[kind])
    here.play(len(here.algorithm.phases) + 2)
    before, client_state = copied(here.state), copied(here.population.client_state)
    here.play(3, dropout_rate=1.0)
    assert unequal(before, here.state) == set()
    assert unequal(client_state, here.population.client_state) == set()
    here.play(1)
    assert "items" in unequal(before, here.state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_drops_out_keeps_its_state(kind: str) -> None:
    here = world(**KINDS[kind])
    here.play(len(here.algorithm.phases) + 1)
    client_state = copied(here.population.client_state)
    cohort = here.algorithm.plan(here.state, round_key(3, here.state.round).fold("plan")).cohort
    stayed = surviving(cohort, 0.5, round_key(3, here.state.round))
    reports_before = here.state.service.reports.clone()
    (report,) = here.play(1, dropout_rate=0.5)
    assert report.cohort == cohort.numel()
    assert 0 < report.clients == stayed.numel() < cohort.numel()
    after = here.population.client_state
    trained = (after.steps > client_state.steps).nonzero().squeeze(1)
    assert sorted(trained.tolist()) == sorted(stayed.tolist())
    others = torch.ones(30, dtype=torch.bool)
    others[stayed] = False
    for name in ("private", "first", "second", "steps", "mix", "loss"):
        assert torch.equal(getattr(after, name)[others], getattr(client_state, name)[others]), name
    owners = torch.repeat_interleave(torch.arange(30), here.population.offsets.diff())
    assert torch.equal(after.rows[others[owners]], client_state.rows[others[owners]])
    assert not torch.equal(after.rows[~others[owners]], client_state.rows[~others[owners]])
    assert torch.equal(here.state.service.reports[others], reports_before[others])


def test_a_round_with_drop_outs_equals_a_round_of_the_others() -> None:
    """What the missing clients would have sent is not in the sums."""
    first, second = world(), world()
    for here in (first, second):
        here.play(3)
    first.play(1, dropout_rate=0.5)

    class Only:
        """The algorithm with a cohort of exactly the clients that stay."""

        def __init__(self, here: World) -> None:
            self.here = here

        def __getattr__(self, name: str) -> Any:
            return getattr(self.here.algorithm, name)

        def plan(self, state: Any, key: Key) -> Any:
            plan = self.here.algorithm.plan(state, key)
            return type(plan)(plan.phase, surviving(plan.cohort, 0.5, round_key(3, state.round)))

    state, _ = play_round(Only(second), second.state, second.population, 3)
    assert unequal(first.state, state) == set()


def test_the_rate_is_the_share_that_drops_out() -> None:
    cohort = torch.arange(20_000)
    for rate in (0.1, 0.7):
        stayed = surviving(cohort, rate, Key(1)).numel()
        assert abs(stayed - (1 - rate) * 20_000) < 4 * (rate * (1 - rate) * 20_000) ** 0.5
    assert torch.equal(surviving(cohort, 0.0, Key(1)), cohort)
    alone = [int(user) for user in range(300) if surviving(torch.tensor([user]), 0.7, Key(1)).numel()]
    assert alone == surviving(torch.arange(300), 0.7, Key(1)).tolist()  # for any cohort


def test_a_secure_sum_of_too_few_clients_is_aborted_and_reported() -> None:
    noise = {"degrees": 0.1, "spectral": 0.1, "join": 0.1, "training": 0.1}
    privacy = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "noise": noise, "dropout_tolerance": 0.05}
    options = {f"privacy__{name}": value for name, value in privacy.items()}
    here = world(pretraining__kind="spectral", clusters__n_clusters=0, **options)
    before = copied(here.state)
    (report,) = here.play(1, dropout_rate=0.5)
    assert 0 < len(surviving(torch.arange(30), 0.5, round_key(SEED, 0))) < 28
    assert report.clients == 0
    assert report.aborted is not None
    assert report.aborted.endswith("clients are too few for a sum; expected at least 29")
    assert unequal(before, here.state) == set()
    assert here.play(1, dropout_rate=0.0)[0].aborted is None
