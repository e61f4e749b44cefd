"""CoFedRec: the elbow, the groups, a client's contrastive term and report, and the tables of groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.federated.test_family import simulator
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER
from perfedrec.methods.federated.cofedrec import CoFedRec, CoFedRecSettings, elbow, regroup, spread
from perfedrec.runtimes.simulator import Simulator

SMALL = ("model.embedding_dim=6", "cocluster.n_categories=3", "client.local_steps=1", "client.learning_rate=0.5")
ALL = "cocluster.n_contrasted=1000"


def test_the_elbow_is_farthest_from_the_line_between_the_ends() -> None:
    assert elbow(torch.tensor([1.0, 0.98, 0.95, 0.3, 0.2, 0.1])) == 2  # .95 is .31 above the line, .98 is .16
    assert elbow(torch.tensor([1.0, 0.4, 0.3, 0.2, 0.1])) == 1  # and below it
    assert elbow(torch.tensor([1.0])) == 0
    assert elbow(torch.tensor([0.5, 0.5, 0.5])) == 0


def test_users_who_are_alike_in_the_drawn_category_become_its_group() -> None:
    """Six users in one category: three of one direction, two of another, one without items in it."""
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    reports = torch.stack([near, 2 * near, far, near + 0.01 * far, 3 * far, torch.zeros(2)])[:, None]
    before, found = torch.ones(6, dtype=torch.int64), set()
    for draw in range(20):
        found.add(tuple(regroup(reports, before, Key(draw)).tolist()))
    # Seen from the two others, the elbow is the first user who is unlike them: it lies farthest below the line.
    assert found == {(0, 0, 1, 0, 1, 1), (1, 1, 0, 0, 0, 1)}
    assert torch.equal(regroup(torch.zeros(6, 1, 2), before, Key(0)), before)  # nobody has reported


def test_every_category_and_every_user_is_drawn() -> None:
    reports, before = torch.eye(2)[:, None].expand(2, 3, 2), torch.full((2,), 3)
    drawn = {tuple(regroup(reports, before, Key(number)).tolist()) for number in range(100)}
    assert drawn == {(0, 3), (3, 0), (1, 3), (3, 1), (2, 3), (3, 2)}  # two users are on the line: a group of one


def test_rows_are_spread_over_a_client() -> None:
    segments = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 1, 2])  # six, three and one
    places, clients, share = spread(segments, 4)
    assert places.tolist() == [0, 2, 5, 7, 3, 4, 8, 9]
    assert clients.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    torch.testing.assert_close(share, torch.tensor([4 / 6] * 4 + [1.0] * 4))


def one_client(here: Simulator) -> tuple[Tensor, ...]:
    users = here.population.offsets.diff().argmax()[None]
    rows, positions = here.population.rows(users)
    return users, rows, here.population.load_client_states(users, positions)  # type: ignore[return-value]


def test_a_step_of_one_client_against_autograd() -> None:
    """Cross-entropy and the contrastive term over its items and negatives, on its group's table."""
    here = simulator("cofedrec", 0, *SMALL, "cocluster.contrast=0.3", "cocluster.temperature=0.5", ALL)
    users, rows, client_state = one_client(here)
    generator, m = torch.Generator().manual_seed(1), here.state.items.shape[0]
    categories = torch.randint(0, 3, (m,), generator=generator)
    offsets = torch.randn(4 * m, 6, generator=generator)
    items = torch.randn(m, 6, generator=generator)
    group = here.state.group.index_fill(0, users, 2)
    state = replace(here.state, items=items, offsets=offsets, categories=categories, group=group)
    broadcast = here.algorithm.broadcast(state, users)
    sent, _ = here.algorithm.client("train", broadcast, rows, client_state, Key(1))
    assert sent.groups.tolist() == [2]

    n_own, own = rows.items.numel(), (items + offsets[2 * m : 3 * m])[sent.items].requires_grad_()
    scores = own @ client_state.private[0, :-1] + client_state.private[0, -1]
    signs = torch.tensor([-1.0] * n_own + [1.0] * (sent.items.numel() - n_own))
    loss = torch.nn.functional.softplus(signs * scores).sum()
    unit, kinds = torch.nn.functional.normalize(own, dim=1), categories[sent.items].tolist()
    for i, kind in enumerate(kinds):
        others = [j for j in range(len(kinds)) if j != i]
        alike = [j for j in others if kinds[j] == kind]
        total = torch.logsumexp(torch.stack([unit[i] @ unit[j] / 0.5 for j in others]), 0)
        loss = loss + 0.3 * sum(total - unit[i] @ unit[j] / 0.5 for j in alike) / len(alike)
    (gradient,) = torch.autograd.grad(loss, own)
    torch.testing.assert_close(sent.deltas, -0.5 * gradient, rtol=1e-4, atol=1e-5)


def test_a_report_has_the_mean_row_of_the_clients_table_in_each_category() -> None:
    here = simulator("cofedrec", 3, *SMALL)
    users, rows, client_state = one_client(here)
    here.state.offsets.normal_(generator=torch.Generator().manual_seed(1))
    broadcast = here.algorithm.broadcast(here.state, users)
    report = here.algorithm.report(broadcast, rows, client_state, Key(0))
    every = torch.arange(here.state.items.shape[0])
    table = here.algorithm.table_rows(broadcast, every, torch.zeros_like(every))
    assert client_state.rows.any()
    table[rows.items] += client_state.rows
    for category in range(3):
        torch.testing.assert_close(report[0, category], table[broadcast.categories == category].mean(0))
    assert not here.algorithm.report(replace(broadcast, categories=None), rows, client_state, Key(0)).any()


def test_a_group_has_its_own_scores() -> None:
    """A user's scores are those of the shared table plus its group's offsets; a newcomer's are those of nobody's
    group."""
    here = simulator("cofedrec", 2, *SMALL)
    here.state.group.copy_(torch.arange(80) % 4)
    here.state.offsets.normal_(generator=torch.Generator().manual_seed(1))
    users, tables = torch.arange(80), here.state.offsets.view(4, -1, 6)
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    for asked, groups in ((users, here.state.group), (torch.full_like(users, NEWCOMER), torch.full_like(users, 3))):
        scores = here.algorithm.scores(here.algorithm.broadcast(here.state, asked), rows, client_state)
        own, bias = client_state.private[:, :-1], client_state.private[:, -1:]
        expected = torch.einsum("ud,umd->um", own, here.state.items + tables[groups]) + bias
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_what_is_downloaded() -> None:
    here = simulator("cofedrec", 2, *SMALL)
    broadcast = here.algorithm.broadcast(here.state, torch.arange(5))
    m = broadcast.items.shape[0]
    assert broadcast.download_bytes() == 8 * m * 6 + 4 * m  # two tables, and the items' categories
    assert broadcast.download_bytes(True) == 4 * (m * 6 + 4 * m * 6 + 5 * 4) + 4 * m


@pytest.mark.parametrize("privacy", [{"aggregation": "secure"}, {"randomised_response": 1.0}])
def test_what_hides_users_from_each_other_is_refused(privacy: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"cofedrec .*; expected"):
        CoFedRecSettings(privacy=privacy)
    assert CoFedRec().reports_vectors
