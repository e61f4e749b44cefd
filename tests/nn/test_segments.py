import pytest
import torch

from perfedrec.nn.segments import by_length, dot, expand, segment_sum

SEGMENTS = torch.tensor([0, 0, 0, 2, 3, 3])  # 1 and 4 are empty


def test_sums_by_hand() -> None:
    values = torch.tensor([[1.0, 10], [2, 20], [4, 40], [8, 80], [16, 160], [32, 320]])
    expected = [[7.0, 70], [0, 0], [8, 80], [48, 480], [0, 0]]
    assert segment_sum(values, SEGMENTS, 5).tolist() == expected
    assert segment_sum(values[:, 0], SEGMENTS, 5).tolist() == [row[0] for row in expected]
    nothing = torch.empty(0, dtype=torch.int64)
    assert segment_sum(torch.empty(0, 2), nothing, 3).tolist() == [[0.0, 0.0]] * 3
    assert segment_sum(torch.empty(0), nothing, 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_gradients(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: segment_sum(each, SEGMENTS, 5), values)
    nodes = torch.randn(5, *shape[1:], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: expand(each, SEGMENTS), nodes)
    assert torch.equal(expand(nodes, SEGMENTS), nodes[SEGMENTS])


@pytest.mark.parametrize("dim", [1, 7, 16, 64])
def test_a_sum_has_the_same_bits_in_any_block(dim: int) -> None:
    counts = torch.randint(0, 40, (50,), generator=torch.Generator().manual_seed(0))
    segments = torch.repeat_interleave(torch.arange(50), counts)
    values = torch.randn(segments.numel(), dim, generator=torch.Generator().manual_seed(1))
    whole, twice = segment_sum(values, segments, 50), dot(values, values)
    for user in range(50):
        mine = segments == user
        assert torch.equal(segment_sum(values[mine], segments[mine] * 0, 1)[0], whole[user])
        assert torch.equal(dot(values[mine], values[mine]), twice[mine])


def test_groups_by_length_hold_every_row_once_at_its_place() -> None:
    segments = torch.tensor([4, 0, 2, 4, 4, 2, 0, 4, 6])
    groups = list(by_length(segments, 8, size=2))
    assert [members.tolist() for members, *_ in groups] == [[4, 0], [2, 6]]
    _, rows, owner, slot = groups[0]
    assert rows.tolist() == [0, 3, 4, 7, 1, 6]
    assert owner.tolist() == [0, 0, 0, 0, 1, 1]
    assert slot.tolist() == [0, 1, 2, 3, 0, 1]
    every = torch.cat([where for _, where, _, _ in groups])
    assert sorted(every.tolist()) == list(range(9))
    assert not list(by_length(segments[:0], 8))
