"""What certificates state: only what a method has, and alerts where figures ask for one."""

from __future__ import annotations

from typing import Any

import pytest

from perfedrec.forgetting import statements
from perfedrec.forgetting.measures import Change, Membership
from perfedrec.methods.centralised.method import Method
from perfedrec.runs.config import resolve


def built(**options: Any) -> Any:
    return resolve(data__path="synthetic:users=60,items=150,interactions_per_user=8", **options).build()


def test_a_method_without_phases_claims_none() -> None:
    fedmf = built(algorithm="fedmf")
    assert statements.phases_again(fedmf) == []
    assert statements.at_service(fedmf) == []
    assert statements.summed(fedmf) == [statements.TRAINED]


def test_a_method_claims_what_its_service_makes() -> None:
    (step,) = statements.phases_again(built(algorithm="fedgnn"))
    assert step == "the phases before training (join) were played again without the users"
    assert statements.at_service(built(algorithm="fedgnn")) == [
        "what was made of edges before training: edges at the neighbourhood service"
    ]
    whole = built(preset="recommended", clusters__n_clusters=2)
    assert "(join, clusters)" in statements.phases_again(whole)[0]
    assert "the cost leaves out what clients send in clusters" in statements.phases_again(whole)[0]
    assert statements.at_service(whole)[0].endswith("lists and factor of the neighbourhood model, pre-trained tables")
    assert statements.BY_CLIENTS in statements.summed(whole)


def test_exact_retraining_speaks_of_cohorts_attributes_and_mixes_where_there_are_some() -> None:
    central = built(algorithm="popularity")
    assert isinstance(central, Method)
    assert statements.trained_again(central, 3, False) == [
        "the users' interactions were taken out of all parts of the data",
        "the model was trained again from seed 3, without them",
    ]
    data, how = statements.trained_again(built(algorithm="fedmf"), 3, True)
    assert "interactions and attributes" in data
    assert "struck out of every cohort" in how
    assert "mix" not in " ".join([statements.whole(False), *statements.not_exact(False)])
    assert "mix" in statements.whole(True)


@pytest.mark.parametrize(
    ("after", "other", "alert"),
    [
        ((1.0,), (0.82,), "; for one user the AUC is about few items"),
        ((0.82,), (1.0,), None),
        ((0.84,), (0.82,), None),  # within the margin
        ((0.9, 0.92, 0.88), (0.7, 0.72, 0.69), "the membership AUC is 0.9000 after forgetting, above the 0.7033 of x"),
        ((1.0, 0.4), (0.5, 0.5), None),  # the interval reaches below 0
        ((), (), None),
    ],
)
def test_a_model_that_still_tells_has_an_alert(
    after: tuple[float, ...], other: tuple[float, ...], alert: str | None
) -> None:
    found = statements.told(Membership(after), Membership(other), "x")
    assert len(found) == (alert is not None)
    assert alert is None or alert in found[0]


@pytest.mark.parametrize(
    ("before", "after", "half", "alert", "open_"),
    [
        (0.1, 0.0995, 0.0, False, False),  # less than 1 %
        (0.1, 0.098, 0.001, True, False),
        (0.1, 0.098, 0.003, False, True),  # the interval of the change reaches above 0
        (0.1, 0.12, 0.001, False, False),
        (0.0, 0.0, 0.0, False, False),
    ],
)
def test_a_loss_of_the_others_has_an_alert_where_it_is_more_than_chance(
    before: float, after: float, half: float, alert: bool, open_: bool
) -> None:
    alerts, unmeasured = statements.fallen(Change(before, after, half, 39))
    assert (len(alerts), len(unmeasured)) == (alert, open_)
    if alert:
        assert "fell from 0.1000 to 0.0980" in alerts[0]
        assert "(the change is -0.0020 ± 0.0010 over 39 tested users)" in alerts[0]
    if open_:
        assert unmeasured[0].startswith("whether the forgetting harmed the others: NDCG@20 of the others fell from")


def test_one_tested_user_gives_no_alert() -> None:
    alerts, unmeasured = statements.fallen(Change(1.0, 0.5, float("nan"), 1))
    assert not alerts
    assert unmeasured[0].endswith("but this can be chance (there is 1 tested user)")
