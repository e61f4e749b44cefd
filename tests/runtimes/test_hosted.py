"""Users of one node or worker."""

from typing import Any

import pytest
import torch
from tests.runtimes.test_population import played

from perfedrec.core.errors import PerfedrecError
from perfedrec.runtimes import population
from perfedrec.runtimes.hosted import Hosted


@pytest.mark.parametrize("hosted", [[], [3, 5]])
def test_a_user_of_another_node_is_refused(hosted: list[int]) -> None:
    users, items = torch.tensor(hosted, dtype=torch.int64), torch.zeros(len(hosted), dtype=torch.int64)
    node = Hosted[object](users, torch.arange(len(hosted) + 1), items, n_items=4)
    for user in (2, 4, 9):
        with pytest.raises(PerfedrecError, match="does not host"):
            node.rows(torch.tensor([user]))
    assert node.rows(users)[1].tolist() == list(range(len(hosted)))


@pytest.mark.parametrize("lazy_from", [0, 1 << 40])
def test_written_states_go_from_a_population_to_a_part_of_its_users_and_back(
    lazy_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "LAZY_FROM", lazy_from)
    simulator = played("fedmf", 3)
    people, users = simulator.population, torch.arange(30, 70)
    here: Hosted[Any] = Hosted.part(people, users)
    here.init_clients(simulator.algorithm, 3)
    written = people.written(users)
    here.write(written)
    for name, value in here.written(users).items():
        assert torch.equal(value, written[name])
    assert ("secret" in written) == (lazy_from > 0)  # it follows from the user's key
    asked = torch.tensor([69, 30, 41])
    found = here.load_client_states(asked, here.rows(asked)[1])
    wanted = people.load_client_states(asked, people.rows(asked)[1])
    assert all(torch.equal(value, getattr(wanted, name)) for name, value in vars(found).items())

    again = played("fedmf", 0).population
    for some in (users, torch.arange(30), torch.arange(70, 90)):
        again.write(here.written(some) if some is users else people.written(some))
    assert again.stored().keys() == people.stored().keys()
    assert all(torch.equal(again.stored()[name], value) for name, value in people.stored().items())
