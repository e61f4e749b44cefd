"""Mult-VAE against a network written out for one user at a time."""

from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.core.keys import Key, normal, uniform
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mult_vae import Autoencoder, MultVAE, MultVAESettings

SMALL = {"embedding_dim": 2, "hidden_dim": 3}


def weights(method: MultVAE, data: Training) -> Tensor:
    """Random weights, biases included."""
    return torch.randn(method.network(data.n_items)[0].size, generator=torch.Generator().manual_seed(1))


def encoded(parts: list[np.ndarray], inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.tanh(inputs @ parts[0] + parts[1]) @ parts[2] + parts[3]
    return both[:2], both[2:]


def decoded(parts: list[np.ndarray], latent: np.ndarray) -> np.ndarray:
    logits: np.ndarray = np.tanh(latent @ parts[4] + parts[5]) @ parts[6] + parts[7]
    return logits


def test_scores_come_from_the_mean(toy: Training) -> None:
    method = MultVAE(MultVAESettings(**SMALL))
    flat = weights(method, toy)
    parts = [each.numpy().astype(np.float64) for each in method.network(toy.n_items)[0].unpack(flat)]
    rows = toy.matrix.toarray()
    users = torch.tensor([2, 0, 3])
    expected = [decoded(parts, encoded(parts, rows[u] / np.linalg.norm(rows[u]))[0]) for u in users.tolist()]
    given = method.scores(Autoencoder(flat), toy, users)
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("steps", "share"), [(0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)])
def test_loss(steps: int, share: float, toy: Training) -> None:
    """With the same keyed draws, for dropout, z and the growth of the divergence's weight."""
    method = MultVAE(MultVAESettings(**SMALL, dropout=0.4, beta=0.3, annealing_steps=10))
    flat, key, users = weights(method, toy), Key(5), torch.tensor([2, 0, 1])
    parts = [each.numpy().astype(np.float64) for each in method.network(toy.n_items)[0].unpack(flat)]
    rows, terms = toy.matrix.toarray(), []
    for user in users.tolist():
        own = np.arange(*toy.rows.offsets[user : user + 2].tolist())
        draws = uniform(key.fold("dropout").spread(torch.from_numpy(own)), 1).squeeze(1).numpy()
        inputs = rows[user] / np.linalg.norm(rows[user])
        inputs[toy.rows.items[own].numpy()] *= (draws >= 0.4) / 0.6
        mean, log_variance = encoded(parts, inputs)
        noise = normal(key.fold("latent").spread(torch.tensor(user)), 2).numpy()
        logits = decoded(parts, mean + noise * np.exp(log_variance / 2))
        log_share = logits - log(np.exp(logits).sum())
        divergence = 0.5 * (mean**2 + np.exp(log_variance) - log_variance - 1).sum()
        terms.append(share * 0.3 * divergence - log_share[rows[user] > 0].sum())
    assert float(method.loss(flat, users, steps, toy, key)) == pytest.approx(float(np.mean(terms)), rel=1e-5)


def test_without_annealing_the_weight_is_whole_from_the_first_step(toy: Training) -> None:
    losses = []
    for annealing_steps in (0, 1):
        method = MultVAE(MultVAESettings(**SMALL, annealing_steps=annealing_steps))
        losses.append(float(method.loss(weights(method, toy), torch.arange(4), 0 + annealing_steps, toy, Key(0))))
    assert losses[0] == losses[1]


def test_an_epoch_takes_every_user_once(toy: Training) -> None:
    method = MultVAE(MultVAESettings(**SMALL, batch_size=3, annealing_steps=2, beta=1.0))
    before = method.init(toy, Key(0))
    after, loss = method.epoch(before, toy, Key(1))
    assert after.steps == 2
    assert loss > 0
    assert bool((after.weights != before.weights).any())
    seen: list[tuple[list[int], int]] = []
    whole = method.loss

    def watched(weights: Tensor, users: Tensor, steps: int, data: Training, key: Key) -> Tensor:
        seen.append((users.tolist(), steps))
        return whole(weights, users, steps, data, key)

    method.loss = watched  # type: ignore[method-assign]
    method.epoch(after, toy, Key(2))
    assert sorted(user for users, _ in seen for user in users) == [0, 1, 2, 3]
    assert [steps for _, steps in seen] == [2, 3]


def test_a_new_user_with_the_items_of_a_known_one_has_its_scores(toy: Training) -> None:
    method = MultVAE(MultVAESettings(**SMALL))
    state = Autoencoder(weights(method, toy))
    given = method.scores_of_new_users(state, toy, toy.rows)
    assert torch.equal(given, method.scores(state, toy, torch.arange(4)))
