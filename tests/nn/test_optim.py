import pytest
import torch

from perfedrec.nn.optim import ServerOptimizer, adam, server_step


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8), (0.1, 0.9)])
def test_adam_equals_that_of_torch(betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 4, generator=generator)
    twin = torch.nn.Parameter(vectors.clone())
    optimizer = torch.optim.Adam([twin], lr=0.05, betas=betas, eps=1e-8)
    first, second, steps = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for _ in range(6):
        gradient = torch.randn(3, 4, generator=generator) * 10.0 ** torch.randint(-4, 3, (3, 1), generator=generator)
        change, first, second, steps = adam(gradient, first, second, steps, 0.05, betas, 1e-8)
        vectors = vectors + change
        twin.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(vectors, twin.detach(), rtol=1e-5, atol=1e-6)
    assert steps.tolist() == [6, 6, 6]


def test_adam_of_users_with_different_numbers_of_steps() -> None:
    """A user who joins late takes the corrected first step, whatever steps the others in the block have taken."""
    gradient = torch.tensor([[2.0], [2.0]])
    first, second = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [4.0]])
    change, *_, steps = adam(gradient, first, second, torch.tensor([0, 1]), 0.1, (0.5, 0.75), 0.0)
    # user 0: m = 1, v = 1, corrected 2 and 4; user 1: m = 1.5, v = 4, corrected 1.5 / 0.75 and 4 / 0.4375
    expected = torch.tensor([[-0.1 * 2 / 2], [-0.1 * 2 / (4 / 0.4375) ** 0.5]])
    torch.testing.assert_close(change, expected)
    assert steps.tolist() == [1, 2]


def reddi(rule: str, changes: list[float], rate: float, beta1: float, beta2: float, tau: float) -> list[float]:
    """Algorithm 2 of Reddi et al. (ICLR 2021) for one coordinate: its position after each round."""
    x = m = v = 0.0
    positions = []
    for change in changes:
        m = beta1 * m + (1 - beta1) * change
        if rule == "fedadagrad":
            v = v + change**2
        elif rule == "fedyogi":
            sign = (v > change**2) - (v < change**2)
            v = v - (1 - beta2) * change**2 * sign
        elif rule == "fedadam":
            v = beta2 * v + (1 - beta2) * change**2
        x += rate * (change if rule == "fedavg" else m / (v**0.5 + tau))
        positions.append(x)
    return positions


@pytest.mark.parametrize("rule", ["fedavg", "fedadam", "fedadagrad", "fedyogi"])
def test_server_rules_equal_those_of_the_paper(rule: ServerOptimizer) -> None:
    changes = [0.5, -0.25, 0.01, 2.0, -0.001, 0.3]
    expected = reddi(rule, changes, 0.1, 0.9, 0.99, 1e-3)
    x, first, second = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)
    for change, position in zip(changes, expected, strict=True):
        step, first, second = server_step(rule, torch.full((1, 1), change), first, second, 0.1, (0.9, 0.99), 1e-3)
        x = x + step
        assert float(x) == pytest.approx(position, rel=1e-5)


def test_first_steps_of_the_server_by_hand() -> None:
    change = torch.tensor([[2.0]])
    steps = {
        rule: float(server_step(rule, change, torch.zeros(1, 1), torch.zeros(1, 1), 1.0, (0.5, 0.75), 1.0)[0])
        for rule in ("fedadam", "fedadagrad", "fedyogi")
    }
    # m = 1; v = 1 (Adam), 4 (Adagrad), 1 (Yogi)
    assert steps == pytest.approx({"fedadam": 1 / 2, "fedadagrad": 1 / 3, "fedyogi": 1 / 2})


def test_a_step_of_adam_has_the_same_bits_in_any_block() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient, first = torch.randn(67, 5, generator=generator), torch.randn(67, 5, generator=generator)
    second, steps = torch.rand(67, 5, generator=generator), torch.arange(67)
    whole = adam(gradient, first, second, steps, 0.01, (0.9, 0.999), 1e-8)
    for user in range(67):
        mine = slice(user, user + 1)
        alone = adam(gradient[mine], first[mine], second[mine], steps[mine], 0.01, (0.9, 0.999), 1e-8)
        assert all(torch.equal(found, expected[mine]) for found, expected in zip(alone, whole, strict=True))
