"""FedCA: the weights against the quadratic programme, a user's own table, and what a client reports and starts from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.optimize import minimize
from tests.methods.federated.test_family import DATA, simulator

from perfedrec import load
from perfedrec.core.keys import Key
from perfedrec.core.types import NEWCOMER
from perfedrec.methods.federated.fedca import FedCASettings

SMALL = ("model.embedding_dim=6", "composite.n_landmarks=3", "composite.n_directions=2", "composite.every=2")


def test_weights_solve_the_quadratic_programme() -> None:
    """``sum (w - p)^2 - 2 alpha s w - 2 beta c w`` over the simplex, with s and c from numpy and scipy."""
    alpha, beta = 0.7, 0.4
    here = simulator("fedca", 6, *SMALL, f"composite.similarity={alpha}", f"composite.complementarity={beta}")
    state, users = here.state, torch.tensor([4, 17, 33])
    found = here.algorithm.mixing_weights(state, users).numpy()
    assert float(state.shares.sum()) == pytest.approx(1)
    for place, user in enumerate(users.tolist()):
        gain = np.zeros(3)
        for k in range(3):
            mine, theirs = state.reports[user].double().numpy(), state.landmarks[k].double().numpy()
            unit = [each[0] / np.linalg.norm(each[0]) for each in (mine, theirs)]
            angles = subspace_angles(mine[1:].T, theirs[1:].T)
            gain[k] = alpha / (1 + np.linalg.norm(unit[0] - unit[1])) + beta * (1 - np.cos(angles.mean()))
        shares = state.shares.double().numpy()
        solved = minimize(
            lambda w, p=shares, g=gain: ((w - p) ** 2).sum() - 2 * (g * w).sum(),
            np.full(3, 1 / 3),
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            tol=1e-12,
        )
        np.testing.assert_allclose(found[place], solved.x, atol=1e-4)
    assert np.ptp(found, axis=0).max() > 0.01  # users differ


def test_without_both_terms_and_for_newcomers_the_weights_are_the_shares() -> None:
    here = simulator("fedca", 6, *SMALL, "composite.similarity=0", "composite.complementarity=0")
    weights = here.algorithm.mixing_weights(here.state, torch.tensor([4, 17]))
    torch.testing.assert_close(weights, here.state.shares.expand(2, 3))
    there = simulator("fedca", 6, *SMALL, "composite.similarity=1")
    weights = there.algorithm.mixing_weights(there.state, torch.tensor([NEWCOMER, 17]))
    torch.testing.assert_close(weights[0], there.state.shares)
    assert not torch.allclose(weights[1], there.state.shares, atol=1e-3)


def test_similar_landmarks_are_preferred_and_so_are_complementary_ones() -> None:
    """A landmark itself prefers its own table for similarity, and those of others for complementarity."""
    for term, other, preferred in (("similarity", "complementarity", True), ("complementarity", "similarity", False)):
        here = simulator("fedca", 6, *SMALL, f"composite.{term}=1", f"composite.{other}=0")
        for place, landmark in enumerate(here.state.landmarks):
            user = here.state.reports.eq(landmark).all(2).all(1).nonzero()[0]
            gain = here.algorithm.mixing_weights(here.state, user)[0] - here.state.shares
            assert (gain[place] == gain.max()) == preferred
            assert (gain[place] == gain.min()) != preferred


def test_a_client_starts_from_its_share_of_its_own_vectors_and_sends_its_change() -> None:
    given = ("composite.own=0.25", "client.local_steps=1", "client.learning_rate=0.5")
    here = simulator("fedca", 0, *SMALL, *given)
    users = here.population.offsets.diff().argmax()[None]
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    generator = torch.Generator().manual_seed(1)
    client_state = replace(client_state, rows=torch.randn(client_state.rows.shape, generator=generator))
    broadcast = here.algorithm.broadcast(here.state, users)
    sent, after = here.algorithm.client("train", broadcast, rows, client_state, Key(1))
    n_own = rows.items.numel()
    begun = torch.cat([0.25 * client_state.rows, torch.zeros(sent.items.numel() - n_own, 6)])
    own = (here.state.items[sent.items] + begun).requires_grad_()
    signs = torch.tensor([-1.0] * n_own + [1.0] * (sent.items.numel() - n_own))
    loss = torch.nn.functional.softplus(signs * (own @ client_state.private[0])).sum()
    (gradient,) = torch.autograd.grad(loss, own)
    torch.testing.assert_close(sent.deltas, -0.5 * gradient, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.rows, (begun - 0.5 * gradient)[:n_own], rtol=0, atol=1e-5)

    table = here.state.items[rows.items] + after.rows
    torch.testing.assert_close(sent.reports[0, 0], table.mean(0))
    right = torch.linalg.svd(table)[2][:2]
    torch.testing.assert_close((sent.reports[0, 1:] * right).sum(1).abs(), torch.ones(2))


def test_landmarks_are_users_who_reported_and_follow_planted_tastes() -> None:
    here = simulator("fedca", 60, "selection.n_clients_per_round=80", "composite.n_landmarks=2")
    before = here.state.landmarks
    assert all(bool(here.state.reports.eq(each).all(2).all(1).any()) for each in before)
    groups, taste = here.algorithm.groups(here.state, torch.arange(80)), torch.tensor(load(DATA).truth.user_clusters)
    agreement = (groups == taste).float().mean()
    assert max(agreement, 1 - agreement) > 0.8
    assert float(here.state.offsets.abs().max()) > 0


@pytest.mark.parametrize("privacy", [{"aggregation": "secure"}, {"randomised_response": 1.0}])
def test_what_hides_users_from_each_other_is_refused(privacy: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"fedca .*; expected"):
        FedCASettings(privacy=privacy)
