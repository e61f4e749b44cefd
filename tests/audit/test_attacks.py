"""Attacks on a few users whose result is known."""

import pytest
import torch

from perfedrec.audit.attacks import infer_membership


def test_users_without_held_out_items_are_no_cases_of_an_attack(recwarn: pytest.WarningsRecorder) -> None:
    """The first user's item scores above the held-out one. The second and the third user hold out nothing."""
    scores, degrees = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]]), torch.ones(2)
    own, nothing = [torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 1])], torch.zeros(0, dtype=torch.int64)
    found = infer_membership(scores, own, [torch.tensor([1]), nothing, nothing], degrees)
    assert (found.value, found.popularity, found.cases) == (1.0, 0.5, 1)
    alone = infer_membership(scores, own, [nothing] * 3, degrees)
    assert (alone.value, alone.guessing, alone.popularity, alone.cases) == (0.5, 0.5, None, 0)
    assert not recwarn.list
