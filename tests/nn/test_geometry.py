"""Principal directions and angles against other libraries; the simplex against a solver and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.optimize import minimize

from perfedrec.nn.geometry import mean_angles, principal_directions, to_simplex


def test_principal_directions_are_the_right_singular_vectors_of_each_client() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 9, 1]  # fewer and more rows than the 5 columns, one, and none
    segments = torch.repeat_interleave(torch.tensor(counts))[torch.randperm(13, generator=generator)]
    vectors = torch.randn(13, 5, generator=generator)
    found = principal_directions(vectors, segments, 4, 2)
    for client, count in enumerate(counts):
        right = torch.linalg.svd(vectors[segments == client])[2][: min(count, 2)]
        signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
        torch.testing.assert_close(found[client, : right.shape[0]], right * signs)
        assert not found[client, right.shape[0] :].any()  # one item has one direction


def test_equal_vectors_have_one_direction() -> None:
    found = principal_directions(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([0, 0]), 1, 2)[0]
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_angles_equal_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.linalg.qr(torch.randn(6, 5, 3, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    found = mean_angles(first.mT, second.mT)
    for mine, a, b in zip(found, first, second, strict=True):
        assert float(mine) == pytest.approx(float(subspace_angles(a.numpy(), b.numpy()).mean()), abs=1e-6)
    plane = torch.eye(3)[None, :2]
    assert float(mean_angles(plane, torch.eye(3)[None, 1:])) == pytest.approx(math.pi / 4)  # 0 and 90 degrees
    assert float(mean_angles(plane, torch.zeros(1, 2, 3))) == pytest.approx(math.pi / 2)


def test_the_nearest_point_of_the_simplex_by_hand() -> None:
    points = torch.tensor([[0.2, 0.3, 0.5], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.6, 0.8, -1.0]])
    nearest = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.4, 0.6, 0.0]])
    torch.testing.assert_close(to_simplex(points), nearest)


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=6))
def test_no_point_of_the_simplex_is_nearer(values: list[float]) -> None:
    point = torch.tensor([values])
    found = to_simplex(point)[0]
    assert float(found.min()) >= 0
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    corners = torch.eye(len(values)) - found  # the simplex lies on the far side of the plane through the nearest point
    assert float((corners @ (point[0] - found)).max()) <= 1e-4


def test_the_simplex_against_a_solver() -> None:
    point = np.array([0.9, 0.35, 0.3, -0.2])
    solved = minimize(
        lambda w: ((w - point) ** 2).sum(),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-12,
    )
    np.testing.assert_allclose(to_simplex(torch.tensor(point[None])).numpy()[0], solved.x, atol=1e-5)
