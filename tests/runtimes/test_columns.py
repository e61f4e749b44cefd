"""Columns of client states: what was written is read, in whatever order users came."""

from __future__ import annotations

import pytest
import torch

from perfedrec.core import mapped
from perfedrec.runtimes.columns import Columns

OFFSETS = torch.tensor([0, 2, 2, 5, 6])  # of four users with 2, 0, 3 and 1 interactions


@pytest.mark.parametrize("limit", [0, 1 << 27])
def test_values_stand_in_the_order_of_writing_and_are_stored_by_user(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "IN_MEMORY", limit)
    like = {"loss": torch.zeros(1), "rows": torch.zeros(2, 1, dtype=torch.int64)}
    columns = Columns(like, {"loss": False, "rows": True}, OFFSETS)
    rows, loss = columns.fields["rows"], columns.fields["loss"]
    users = torch.tensor([2, 0])
    places = columns.take("rows", users, columns.places(users)["rows"])
    rows.put(places, torch.tensor([[20], [21], [22], [0], [1]]))
    assert rows.values[:5, 0].tolist() == [20, 21, 22, 0, 1]  # one after the other, whatever the numbers of the users
    assert columns.places(torch.tensor([0, 1, 2, 3]))["rows"].tolist() == [1, -1, 0, -1]
    assert columns.places(users)["loss"].tolist() == [-1, -1]
    values, found = rows.stored()
    assert found is not None
    assert (found.tolist(), values[:, 0].tolist()) == ([0, 2], [0, 1, 20, 21, 22])
    assert rows.get(torch.tensor([1, 0]))[:, 0].tolist() == [0, 1, 20, 21, 22]

    again = torch.tensor([3, 2, 1])
    places = columns.take("rows", again, columns.places(again)["rows"])
    rows.put(places, torch.tensor([[30], [40], [41], [42]]))
    values, found = rows.stored()
    assert (found, values[:, 0].tolist()) == (None, [0, 1, 40, 41, 42, 30])
    assert loss.taken == 0


def test_columns_of_all_users_are_what_they_were_given() -> None:
    given = {"loss": torch.arange(4.0), "rows": torch.arange(6.0)}
    columns = Columns(given, {"loss": False, "rows": True}, OFFSETS, whole=True)
    assert columns.fields["rows"].stored() == (given["rows"], None)
    places = columns.places(torch.tensor([2, 0]))["rows"]
    assert columns.fields["rows"].get(places).tolist() == [2, 3, 4, 0, 1]


def test_users_whose_first_states_share_memory_have_their_own_afterwards() -> None:
    columns = Columns({"bias": torch.zeros(1, 2).expand(4, 2)}, {"bias": False}, OFFSETS, whole=True)
    columns.fields["bias"].put(torch.tensor([2]), torch.ones(1, 2))
    assert columns.fields["bias"].values.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
