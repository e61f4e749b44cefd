"""What all methods share that learn vectors: the step of the optimiser from epoch to epoch."""

import pytest
import torch

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.buir import BUIR
from perfedrec.methods.centralised.lightgcn import LightGCN
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mf import MF
from perfedrec.methods.centralised.simplex import SimpleX
from perfedrec.methods.centralised.vectors import VectorMethod, Vectors


def two_epochs(methods: list[VectorMethod], data: Training) -> list[Vectors]:
    states = [methods[0].init(data, Key(0))]
    for number, method in enumerate(methods):
        states.append(method.epoch(states[-1], data, Key(1).fold(number))[0])
    return states[1:]


@pytest.mark.parametrize(
    ("kind", "more"),
    [(LightGCN, {}), (SimpleX, {}), (BUIR, {}), (MF, {"optimizer": "adam"}), (MF, {"optimizer": "sgd"})],
)
def test_the_step_shrinks_from_epoch_to_epoch(toy: Training, kind: type[VectorMethod], more: dict[str, str]) -> None:
    def method(**options: object) -> VectorMethod:
        return kind(kind.Options(embedding_dim=3, batch_size=3, **more, **options))

    shrinking = two_epochs([method(learning_rate=0.2, learning_rate_decay=0.25)] * 2, toy)
    by_hand = two_epochs([method(learning_rate=0.2), method(learning_rate=0.05)], toy)
    steady = two_epochs([method(learning_rate=0.2)] * 2, toy)
    for given, expected in zip(shrinking, by_hand, strict=True):
        torch.testing.assert_close(given.users, expected.users, rtol=0, atol=0)
        torch.testing.assert_close(given.items, expected.items, rtol=0, atol=0)
    assert not torch.equal(shrinking[1].items, steady[1].items)
