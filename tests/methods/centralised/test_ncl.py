"""NCL against its two contrasts, written out node by node."""

from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.ncl import NCL, NCLSettings
from perfedrec.methods.centralised.vectors import Batch, batches
from perfedrec.nn.propagation import lightgcn


def loss(settings: NCLSettings, data: Training, vectors: tuple[Tensor, Tensor]) -> float:
    method = NCL(settings)
    method.begin(*vectors, data, Key(1))
    return float(method.loss(*vectors, batch(data), data))


def batch(data: Training) -> Batch:
    return batches(data, 3, Key(3))[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def negative_log_share(similarities: list[float], own: int, temperature: float) -> float:
    parts = [exp(each / temperature) for each in similarities]
    return -log(parts[own] / sum(parts))


def layers(data: Training, vectors: tuple[Tensor, Tensor], n: int) -> list[list[np.ndarray]]:
    """Layers 0 to n of users and of items, with the dense adjacency."""
    matrix = data.matrix.toarray()
    degrees = np.sqrt(np.outer(matrix.sum(1).clip(min=1), matrix.sum(0).clip(min=1)))
    users, items = (each.numpy().astype(np.float64) for each in vectors)
    found = [[users, items]]
    for _ in range(n):
        users, items = matrix / degrees @ items, (matrix / degrees).T @ users
        found.append([users, items])
    return found


def test_without_contrasts_it_is_lightgcn(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    users, items = lightgcn(toy.graph, *toy_vectors, 3)
    here = batch(toy)
    margins = ((users[here.users] * (items[here.positives] - items[here.negatives])).sum(1)).tolist()
    expected = np.mean([log(1 + exp(-each)) for each in margins])
    settings = NCLSettings(l2=0, structure_weight=0, prototype_weight=0)
    assert loss(settings, toy, toy_vectors) == pytest.approx(float(expected), rel=1e-5)


def test_structure_contrast(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    """A node's layer 2 belongs to its own layer 0, among the layers 0 of the nodes of its kind in the batch."""
    found, expected = layers(toy, toy_vectors, 2), 0.0
    for side, drawn, weight in ((0, batch(toy).users, 1.0), (1, batch(toy).positives, 0.5)):
        nodes = sorted(set(drawn.tolist()))
        assert len(nodes) < len(toy_vectors[side])
        terms = [
            negative_log_share([cosine(found[2][side][node], found[0][side][each]) for each in nodes], place, 0.3)
            for place, node in enumerate(nodes)
        ]
        expected += weight * float(np.mean(terms))
    base = {"l2": 0.0, "prototype_weight": 0.0, "item_weight": 0.5, "temperature": 0.3}
    with_it, without = (loss(NCLSettings(**base, structure_weight=each), toy, toy_vectors) for each in (2.0, 0.0))
    assert with_it - without == pytest.approx(2 * expected, rel=1e-4)


def test_prototype_contrast(toy: Training) -> None:
    """Two directions of users, two of items: the prototypes are the means of the directions of their members."""
    users = torch.tensor([[1.0, 0.0, 0.0], [4.0, 0.4, 0.0], [0.0, 1.0, 0.1], [0.0, 3.0, 0.0]])
    items = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.1, 1.0], [1.0, 0.0, 0.0], [3.0, 0.3, 0.0], [0.0, 0.0, 1.0]])
    groups = ([0, 0, 1, 1], [0, 0, 1, 1, 0])
    expected = 0.0
    for vectors, labels, nodes, weight in (
        (users.numpy(), groups[0], batch(toy).users, 1.0),
        (items.numpy(), groups[1], batch(toy).positives, 0.5),
    ):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        centroids = [unit[[label == each for label in labels]].mean(0) for each in (0, 1)]
        terms = [
            negative_log_share([cosine(vectors[node], each) for each in centroids], labels[node], 0.3)
            for node in set(nodes.tolist())
        ]
        expected += weight * float(np.mean(terms))
    base = {"l2": 0.0, "structure_weight": 0.0, "item_weight": 0.5, "temperature": 0.3, "n_prototypes": 2}
    with_it, without = (loss(NCLSettings(**base, prototype_weight=each), toy, (users, items)) for each in (2.0, 0.0))
    assert with_it - without == pytest.approx(2 * expected, rel=1e-4)


def test_more_prototypes_than_nodes(toy: Training, toy_vectors: tuple[Tensor, Tensor]) -> None:
    method = NCL(NCLSettings(n_prototypes=100))
    method.begin(*toy_vectors, toy, Key(1))
    assert [centroids.shape[0] for _, centroids in method.prototypes] == [4, 5]


def test_the_contrasted_layer_is_an_even_one_of_its_layers() -> None:
    with pytest.raises(ValueError, match="expected at most n_layers = 3"):
        NCLSettings(contrasted_layer=4)
    with pytest.raises(ValueError, match="multiple of 2"):
        NCLSettings(contrasted_layer=3)
