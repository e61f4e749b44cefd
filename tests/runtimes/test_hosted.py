"""Users of one node or worker."""

import pytest
import torch

from perfedrec.core.errors import PerfedrecError
from perfedrec.runtimes.hosted import Hosted


@pytest.mark.parametrize("hosted", [[], [3, 5]])
def test_a_user_of_another_node_is_refused(hosted: list[int]) -> None:
    users, items = torch.tensor(hosted, dtype=torch.int64), torch.zeros(len(hosted), dtype=torch.int64)
    node = Hosted[object](users, torch.arange(len(hosted) + 1), items, n_items=4)
    for user in (2, 4, 9):
        with pytest.raises(PerfedrecError, match="does not host"):
            node.rows(torch.tensor([user]))
    assert node.rows(users)[1].tolist() == list(range(len(hosted)))
