import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from perfedrec.core.keys import Key, bits
from perfedrec.methods.federated.cohort import cluster, select_proportional
from perfedrec.methods.federated.settings import ServerSettings
from perfedrec.methods.federated.tables import Average, Moments, sparse_step


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """200 vectors around 4 directions, of lengths from 0.1 to 10, and their clusters."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(200) % 4
    centres = torch.linalg.qr(torch.randn(8, 4, generator=generator))[0].T
    vectors = centres[truth] + 0.1 * torch.randn(200, 8, generator=generator)
    return vectors * 10.0 ** (2 * torch.rand(200, 1, generator=generator) - 1), truth


def test_k_means_finds_planted_directions_for_any_lengths() -> None:
    vectors, truth = planted()
    labels, centroids = cluster(vectors, 4, None, Key(0))
    assert adjusted_rand_score(truth, labels) == 1.0
    unit = torch.nn.functional.normalize(vectors, dim=1)
    for group in range(4):
        torch.testing.assert_close(centroids[group], unit[labels == group].mean(0), rtol=1e-5, atol=1e-6)


def test_a_cluster_keeps_its_number_from_one_clustering_to_the_next() -> None:
    vectors, _ = planted()
    labels, centroids = cluster(vectors, 4, None, Key(0))
    moved = vectors + 0.02 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    for number in range(1, 6):
        assert torch.equal(cluster(moved, 4, centroids, Key(number))[0], labels)
    permutation = torch.tensor([2, 0, 3, 1])
    assert torch.equal(cluster(moved, 4, centroids[permutation], Key(1))[0], permutation.argsort()[labels])


def test_clustering_is_determined_by_its_key() -> None:
    vectors = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    first, again = (cluster(vectors, 5, None, Key(7))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert len({tuple(cluster(vectors, 5, None, Key(number))[0].tolist()) for number in range(6)}) > 1


def quotas(sizes: list[int], n: int, seed: int = 0) -> list[int]:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(1))]
    chosen = select_proportional(labels, n, Key(seed))
    assert chosen.unique().numel() == chosen.numel()
    return torch.bincount(labels[chosen], minlength=len(sizes)).tolist()


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [
        ([50, 30, 20], 10, [5, 3, 2]),
        ([55, 25, 20], 10, [6, 2, 2]),  # shares 5.5, 2.5, 2: the first of equal remainders
        ([33, 33, 34], 10, [3, 3, 4]),
        ([90, 9, 1], 10, [9, 1, 0]),
        ([5, 0, 5], 4, [2, 0, 2]),
        ([3, 4], 100, [3, 4]),
        ([7], 3, [3]),
    ],
)
def test_quotas_by_hand(sizes: list[int], n: int, expected: list[int]) -> None:
    assert quotas(sizes, n) == expected


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), n=st.integers(1, 120))
def test_quotas_are_shares_rounded_up_or_down(sizes: list[int], n: int) -> None:
    got, total = quotas(sizes, n), sum(sizes)
    assert sum(got) == min(n, total)
    for size, quota in zip(sizes, got, strict=True):
        share = size * min(n, total) / total
        assert quota <= size
        assert abs(quota - share) < 1


def test_members_of_a_cluster_are_equally_likely() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20)
    seen = np.zeros(30)
    for number in range(800):
        seen[select_proportional(labels, 6, Key(3).fold(number)).numpy()] += 1
    assert (seen[:10].sum(), seen[10:].sum()) == (1600, 3200)
    assert stats.chisquare(seen).pvalue > 1e-3


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), n=st.integers(0, 60), seed=st.integers(0, 99))
def test_members_are_those_with_the_smallest_draws(sizes: list[int], n: int, seed: int) -> None:
    labels = torch.repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    if not labels.numel():
        return
    chosen = select_proportional(labels, n, Key(seed))
    draws = bits(Key(seed).spread(torch.arange(labels.numel())), 1).squeeze(1) & ((1 << 48) - 1)
    expected = []
    for number in range(int(labels.max()) + 1):
        members = sorted((labels == number).nonzero().squeeze(1).tolist(), key=lambda user: int(draws[user]))
        expected += members[: int((labels[chosen] == number).sum())]
    assert chosen.tolist() == expected


@pytest.mark.parametrize("rule", ["fedavg", "fedadam", "fedyogi", "fedadagrad"])
def test_a_sparse_step_changes_only_touched_rows(rule: str) -> None:
    options = ServerSettings(optimizer=rule, learning_rate=0.5, beta1=0.5, beta2=0.75, epsilon=1.0)
    table = torch.zeros(4, 1)
    moments = None if rule == "fedavg" else Moments.zeros(table)
    rows, change = torch.tensor([1, 3]), torch.tensor([[2.0], [-2.0]])
    sparse_step(options, table, moments, rows, change, share=0.1)
    # m = 1, v = 1 (Adam, Yogi) or 4 (Adagrad); the step is 0.05 m / (sqrt(v) + 1)
    size = {"fedavg": 0.1, "fedadam": 0.025, "fedyogi": 0.025, "fedadagrad": 0.05 / 3}[rule]
    torch.testing.assert_close(table, torch.tensor([[0.0], [size], [0.0], [-size]]))
    if moments is not None:
        assert moments.first.squeeze().tolist() == [0.0, 1.0, 0.0, -1.0]
        assert moments.second.squeeze().tolist() == [
            0.0,
            *([4.0, 0.0, 4.0] if rule == "fedadagrad" else [1.0, 0.0, 1.0]),
        ]


def test_the_running_average_equals_the_average_over_all_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=generator)
    average, naive, decay = Average.start(table), table.clone().double(), 0.8
    for number in range(1, 12):
        rows = torch.randperm(6, generator=generator)[: number % 4]
        average.advance(table, rows, number - 1, decay)
        table[rows] += torch.randn(rows.numel(), 3, generator=generator)
        average.advance(table, rows, number, decay)
        naive = decay * naive + (1 - decay) * table
    average.advance(table, torch.arange(6), 11, decay)
    torch.testing.assert_close(average.values.double(), naive, rtol=1e-5, atol=1e-6)
    assert average.rounds.tolist() == [11] * 6
