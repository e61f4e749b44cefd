"""Scores that are computed where they are needed."""

import pytest
import torch
from torch import Tensor

from perfedrec.core import scoring as core_scoring
from perfedrec.core.scoring import Lists, Product, Scoring
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.mf import MF
from perfedrec.methods.federated.fedgnn import FedGNN


def mixed() -> Scoring:
    """Two models of three users in two groups, for four items; two settings; lists for two users."""
    own = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    tables = [torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]), torch.ones(4, 2)]
    numbers = torch.tensor([[1.0], [2.0], [3.0]])
    weights = torch.tensor([[[1.0, 0.0], [0.5, 2.0]]]).repeat(3, 1, 1)
    items = torch.tensor([[2, -1], [-1, -1], [0, 3]])
    values = torch.tensor([[[10.0, 20.0], [9.0, 9.0]], [[9.0, 9.0], [9.0, 9.0]], [[1.0, 3.0], [2.0, 4.0]]])
    parts = (
        Product(own, lambda group, which: tables[group][which]),
        Product(numbers, lambda group, which: torch.tensor([[1.0], [0.0], [0.0], [1.0]])[which]),
    )
    return Scoring(3, 4, parts, weights, Lists(items, values), torch.tensor([0, 0, 1]))


def test_scores_by_each_setting_computed_by_hand() -> None:
    first, second = (each.clone() for each in mixed().each())
    assert first.tolist() == [[1, 0, 1 + 10, 2], [0, 2, 2, 0], [2 + 1, 2, 2, 2 + 2]]
    assert second.tolist() == [[0.5 + 2, 0, 0.5 + 20, 1 + 2], [4, 1, 1, 4], [1 + 6 + 3, 1, 1, 1 + 6 + 4]]


def test_some_users_have_the_scores_that_they_have_among_all() -> None:
    which = torch.tensor([2, 0])
    for some, all_of_them in zip(mixed().each(which), mixed().each(), strict=True):
        assert torch.equal(some, all_of_them[which])


def test_scores_are_the_same_where_tables_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [each.clone() for each in mixed().each()]
    monkeypatch.setattr(core_scoring, "ITEMS_AT_ONCE", 3)
    for piecewise, all_at_once in zip(mixed().each(), whole, strict=True):
        assert torch.equal(piecewise, all_at_once)


def test_known_scores_and_products_are_one_setting() -> None:
    scores = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(Scoring.of(scores).dense(), scores)
    users, items = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    product = Scoring.product(users, items)
    assert (product.n_users, product.n_items, product.n_settings) == (1, 2, 1)
    assert product.dense().tolist() == [[11.0, 17.0]]


def test_a_method_with_scores_of_its_own_is_ranked_by_them() -> None:
    """Also where it inherits from a method that says how its scores are computed."""

    class Reversed(MF):
        def scores(self, state: object, data: Training, users: Tensor) -> Tensor:
            return torch.arange(3.0, 0.0, -1.0).repeat(users.numel(), 1)

    class Shifted(FedGNN):
        def scores(self, *given: object) -> Tensor:
            return torch.full((1, 3), 7.0)

    assert Reversed().scoring(None, None, torch.arange(2)).dense().tolist() == [[3.0, 2.0, 1.0]] * 2  # type: ignore[arg-type]
    assert Shifted.scoring is not FedGNN.scoring
    assert MF.scoring is not Reversed.scoring


@pytest.mark.parametrize("groups", [[1, 1, 1], [1, 0, 1]])
def test_each_user_has_the_table_of_its_group(groups: list[int]) -> None:
    users, tables = torch.eye(3), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    scoring = Scoring(3, 5, (Product(users, lambda group, which: tables[group][which]),), groups=torch.tensor(groups))
    for place, group in enumerate(groups):
        assert torch.equal(scoring.dense()[place], tables[group][:, place])
    assert {group: where.tolist() for group, where in scoring.by_group()} == {
        group: [place for place, own in enumerate(groups) if own == group] for group in set(groups)
    }
