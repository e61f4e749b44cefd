from math import exp, log

import pytest
import torch

from perfedrec.nn import losses
from perfedrec.nn.losses import bpr, info_nce, sampled_softmax, softplus, supervised_contrast, uniformity


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_bpr_against_plain_python() -> None:
    positive, negative, segments = numbers(7), numbers(9)[2:], torch.tensor([0, 0, 1, 1, 1, 3, 3])
    expected = [0.0] * 4
    for p, n, user in zip(positive.tolist(), negative.tolist(), segments.tolist(), strict=True):
        expected[user] -= log(1 / (1 + exp(-(p - n))))
    assert bpr(positive, negative, segments, 4).tolist() == pytest.approx(expected, abs=1e-12)
    assert bpr(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.int64), 1).tolist() == pytest.approx(
        [3 * log(2)]
    )


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sampled_softmax_against_plain_python(temperature: float) -> None:
    positive, negative, segments = numbers(5), numbers(3, 4), torch.tensor([0, 1, 1, 2, 2])
    negative[2, 1:] = -torch.inf  # this client has one negative
    expected = [0.0] * 3
    for p, user in zip(positive.tolist(), segments.tolist(), strict=True):
        others = sum(exp(each / temperature) for each in negative[user].tolist())
        expected[user] -= log(exp(p / temperature) / (exp(p / temperature) + others))
    assert sampled_softmax(positive, negative, segments, temperature).tolist() == pytest.approx(expected, abs=1e-12)


def test_softmax_with_one_negative_is_bpr() -> None:
    positive, negative, segments = numbers(4), numbers(2), torch.tensor([0, 0, 1, 1])
    softmax = sampled_softmax(positive, negative[:, None], segments, 1.0)
    torch.testing.assert_close(softmax, bpr(positive, negative[segments], segments, 2))


def test_losses_stay_finite_where_scores_are_large() -> None:
    positive, negative = torch.tensor([-500.0]), torch.tensor([[500.0, 500.0]])
    first = torch.tensor([0])
    assert sampled_softmax(positive, negative, first, 0.2).tolist() == pytest.approx([5000 + log(2)], rel=1e-6)
    assert bpr(positive, negative[0, :1], first, 1).tolist() == [1000.0]


def test_info_nce_against_plain_python() -> None:
    first, second, temperature = numbers(6, 3), numbers(7, 3)[1:], 0.2

    def cosine(a: list[float], b: list[float]) -> float:
        norm = (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5
        return sum(x * y for x, y in zip(a, b, strict=True)) / norm

    a, b = first.tolist(), second.tolist()
    expected = 0.0
    for i in range(6):
        similar = [exp(cosine(a[i], b[j]) / temperature) for j in range(6)]
        expected -= log(similar[i] / sum(similar)) / 6
    assert float(info_nce(first, second, temperature)) == pytest.approx(expected, abs=1e-12)
    assert float(info_nce(5 * first, 0.1 * second, temperature)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (130, 70), (64, 128)])
def test_gradients_of_info_nce_are_those_of_cross_entropy(n: int, m: int) -> None:
    positives = torch.arange(n) % min(m, 50)  # some belong to the same node
    found = []
    for own in (True, False):
        first, second = numbers(n, 3).requires_grad_(), numbers(m + 1, 3)[1:].requires_grad_()
        if own:
            loss = info_nce(first, second, 0.2, positives)
        else:
            cosines = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
            loss = torch.nn.functional.cross_entropy(cosines / 0.2, positives)
        (3 * loss).backward()
        found.append((loss.detach(), first.grad, second.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_info_nce_at_a_low_temperature_is_finite() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).requires_grad_()
    loss = info_nce(first, -first.detach(), 0.001)  # each is a thousand times as far from its own as from the other
    assert float(loss.detach()) == pytest.approx(1000)
    loss.backward()
    assert bool(first.grad.isfinite().all())


def test_supervised_contrast_against_plain_python() -> None:
    rows, categories = numbers(8, 3), torch.tensor([0, 1, 0, 0, 1, 2, 2, 0])
    segments, t = torch.tensor([0, 1, 0, 0, 1, 0, 1, 2]), 0.3  # the last client has one row
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = []
    for i in range(8):
        others = [j for j in range(8) if j != i and segments[j] == segments[i]]
        alike = [j for j in others if categories[j] == categories[i]]
        total = sum(exp(float(unit[i] @ unit[a]) / t) for a in others)
        each = [-log(exp(float(unit[i] @ unit[p]) / t) / total) for p in alike]
        expected.append(sum(each) / len(each) if each else 0.0)
    assert expected.count(0.0) == 3  # the last client's row, and two that are alone in their category
    assert supervised_contrast(rows, categories, segments, 3, t).tolist() == pytest.approx(expected, abs=1e-9)


def test_uniformity_against_plain_python_and_without_pairs() -> None:
    vectors = torch.nn.functional.normalize(numbers(5, 3), dim=1)
    points = vectors.tolist()
    terms = [
        exp(-2 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
        for i, a in enumerate(points)
        for j, b in enumerate(points)
        if i != j
    ]
    assert float(uniformity(vectors)) == pytest.approx(log(sum(terms) / len(terms)), abs=1e-12)
    alone = vectors[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(uniformity(alone) + alone.sum(), alone)
    assert (float(uniformity(alone)), gradient.tolist()) == (0.0, [[1.0, 1.0, 1.0]])


@pytest.mark.parametrize("block", [1, 3, 100])
def test_uniformity_has_the_gradient_of_its_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCK", block)
    unit = torch.nn.functional.normalize(numbers(7, 4), dim=1)
    given, plain = unit.clone().requires_grad_(), unit.clone().requires_grad_()
    cosines = (plain @ plain.T)[~torch.eye(7, dtype=torch.bool)]  # ||x - y||^2 = 2 - 2 x.y
    expected = (4 * cosines - 4).exp().mean().log()
    torch.testing.assert_close(uniformity(given), expected)
    (slope,), (wanted,) = torch.autograd.grad(3 * uniformity(given), given), torch.autograd.grad(3 * expected, plain)
    torch.testing.assert_close(slope, wanted)


def test_softplus_and_its_gradient_have_the_same_bits_at_every_place() -> None:
    values = torch.randn(531, generator=torch.Generator().manual_seed(0)) * 4
    values[:4] = torch.tensor([0.0, 200.0, -200.0, 88.0])

    def both(part: torch.Tensor) -> torch.Tensor:
        leaf = part.clone().requires_grad_()
        result = softplus(leaf)
        return torch.stack([result.detach(), torch.autograd.grad(result.sum(), leaf)[0]])

    whole = both(values)
    torch.testing.assert_close(whole[0], torch.logaddexp(values, torch.zeros(())))
    torch.testing.assert_close(whole[1], torch.sigmoid(values))
    assert whole[1, 0] == 0.5
    for place in range(values.numel()):
        assert torch.equal(both(values[place : place + 1])[:, 0], whole[:, place])
