"""MixGCF against its synthetic negatives, written out interaction by interaction."""

from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.core.keys import Key, uniform
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mixgcf import MixGCF, MixGCFSettings, hardness
from perfedrec.methods.centralised.vectors import batches, candidates


def layers(data: Training, vectors: tuple[Tensor, Tensor], n: int, dropout: float, key: Key) -> list[list[np.ndarray]]:
    """Layers 0 to n of users and of items, with the dense adjacency, each after dropout."""
    matrix = data.matrix.toarray()
    normalised = matrix / np.sqrt(np.outer(matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)))
    found = [[each.numpy().astype(np.float64) for each in vectors]]
    for number in range(n):
        both = normalised @ found[-1][1], normalised.T @ found[-1][0]
        found.append(
            [
                each * (draws(key.fold(f"dropout of {side}", number), *each.shape) >= dropout) / (1 - dropout)
                for side, each in zip(("users", "items"), both, strict=True)
            ]
        )
    return found


def draws(key: Key, n: int, d: int) -> np.ndarray:
    return uniform(key.spread(torch.arange(n)), d).numpy()


@pytest.mark.parametrize(
    ("mixing", "each", "dropout"),
    [(True, False, 0.0), (False, False, 0.0), (True, False, 0.4), (True, True, 0.4), (False, True, 0.0)],
)
def test_loss(mixing: bool, each: bool, dropout: float, toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    settings = {"mixing": mixing, "each_number": each, "dropout": dropout, "l2": 0}
    method = MixGCF(MixGCFSettings(n_layers=2, n_candidates=4, **settings))
    batch = batches(toy, 5, Key(3))[0]
    found = layers(toy, toy_vectors, 2, dropout, batch.key)
    users, items = (np.mean([layer[side] for layer in found], axis=0) for side in (0, 1))
    drawn, terms = candidates(batch, toy, 4).tolist(), []
    key, d = batch.key.fold("mixing"), toy_vectors[0].shape[1]
    if each:
        shares = np.stack([draws(key.fold(k), 20, d).reshape(5, 4, d) for k in range(3)], axis=1)
    else:
        shares = np.broadcast_to(draws(key, 5, 3)[:, :, None, None], (5, 3, 4, d))
    shares = shares.astype(np.float64) * mixing
    for place, (u, i) in enumerate(zip(batch.users.tolist(), batch.positives.tolist(), strict=True)):
        made = []
        for k in range(3):  # the mixed candidate that the user scores highest, as the paper has it
            own = zip(shares[place, k], drawn[place], strict=True)
            mixed = [share * found[k][1][i] + (1 - share) * found[k][1][j] for share, j in own]
            made.append(max(mixed, key=lambda each: float(users[u] @ each)))
        terms.append(log(1 + exp(users[u] @ np.mean(made, axis=0) - users[u] @ items[i])))
    assert float(method.loss(*toy_vectors, batch, toy)) == pytest.approx(float(np.mean(terms)), rel=1e-5)


def test_no_candidate_is_an_item_of_the_user(toy: Training) -> None:
    """And all others are drawn: of the user with three of five items two, of the user with one item four."""
    seen: dict[int, set[int]] = {}
    matrix = toy.matrix.toarray()
    for number in range(30):
        batch = batches(toy, 8, Key(number))[0]
        drawn = candidates(batch, toy, 3)
        assert torch.equal(drawn[:, 0], batch.negatives)
        for user, own in zip(batch.users.tolist(), drawn.tolist(), strict=True):
            assert not matrix[user, own].any()
            seen.setdefault(user, set()).update(own)
    assert {user: len(items) for user, items in seen.items()} == {0: 3, 1: 3, 2: 2, 3: 4}


def test_hardness_is_the_same_by_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(6, 3, generator=generator), torch.randn(500, 3, generator=generator)
    drawn = torch.randint(0, 500, (6, 9), generator=generator)
    few, many = hardness(users, items, drawn), hardness(users, items, drawn[:, :2])
    torch.testing.assert_close(few, (users[:, None, :] * items[drawn]).sum(2))
    torch.testing.assert_close(many, few[:, :2])
