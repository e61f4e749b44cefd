"""Declared sensitivities and guarantees, and what mechanisms guarantee together."""

from math import exp, log, sqrt
from typing import Any

import pytest
from pydantic import ValidationError

from perfedrec.core.algorithm import Phase
from perfedrec.privacy.mechanisms import (
    CoordinateLaplace,
    DenseUpload,
    Guarantee,
    ItemResponse,
    JointNoise,
    Masking,
    Mechanism,
    PseudoItems,
    RowClip,
    SecureAggregation,
    Sensitivity,
    SparseUpload,
    Unprotected,
    compose,
)
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings

PHASES = (Phase("degrees", noise="degrees"), Phase("spectral", noise="spectral"))

SECURE: dict[str, Any] = {
    "aggregation": "secure",
    "norm": "l2",
    "clip": 2.0,
    "noise": {"training": 1.5, "degrees": 3.0},
}


def test_the_papers_mechanism_guarantees_only_a_coordinate() -> None:
    mechanism = CoordinateLaplace(0.5, 0.1)
    assert mechanism.sensitivity == Sensitivity("coordinate", 1.0)
    assert mechanism.guarantee.law is None
    assert mechanism.guarantee.narrower == ("per coordinate: epsilon 10",)
    assert "one coordinate" in mechanism.guarantee.reason


@pytest.mark.parametrize(("norm", "law"), [("l1", "laplace"), ("l2", "gaussian")])
def test_joint_noise_counts_a_replaced_upload_twice(norm: Any, law: str) -> None:
    shared, local = (JointNoise(norm, 2.0, 1.5, local) for local in (False, True))
    assert shared.sensitivity == Sensitivity(norm, 2.0)
    assert local.sensitivity == Sensitivity(norm, 4.0)
    assert shared.guarantee == Guarantee(law, 1.5)
    assert local.guarantee == Guarantee(law, 0.75)
    assert JointNoise(norm, 2.0, 0.0, False).guarantee.law is None


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_randomised_response_declares_its_epsilon_per_item(epsilon: float) -> None:
    mechanism = ItemResponse(epsilon, sticky=True)
    assert mechanism.keeps == pytest.approx(exp(epsilon) / (1 + exp(epsilon)))
    assert log(mechanism.keeps / (1 - mechanism.keeps)) == pytest.approx(epsilon)
    assert mechanism.guarantee.narrower == (f"per item: epsilon {epsilon:.3g}",)
    assert ItemResponse(epsilon, sticky=False).guarantee.narrower[0].startswith("per item and participation")


NONE: list[Mechanism] = [
    PseudoItems(0.1, sticky=False),
    PseudoItems(5.0, sticky=True),
    Masking(0.1, sticky=False),
    SparseUpload(),
    DenseUpload(),
    SecureAggregation(),
    Unprotected(),
    RowClip(0.3),
    CoordinateLaplace(0.5, 0.0),
]


@pytest.mark.parametrize("mechanism", NONE, ids=lambda each: each.name)
def test_mechanisms_without_a_guarantee_give_a_reason(mechanism: Mechanism) -> None:
    assert mechanism.guarantee.law is None
    assert len(mechanism.guarantee.reason) > 10


def test_composition() -> None:
    noise, weaker = JointNoise("l2", 1.0, 2.0, False), JointNoise("l2", 1.0, 0.5, False)
    assert compose([noise, SecureAggregation()]) == Guarantee("gaussian", 2.0)
    assert compose([PseudoItems(0.1, False), noise, DenseUpload()]) == Guarantee("gaussian", 2.0)
    assert compose([weaker, noise, SecureAggregation()]) == Guarantee("gaussian", 2.0)
    exposed = compose([noise, SparseUpload()])
    assert exposed.law is None
    assert "touched" in exposed.reason
    both = compose([PseudoItems(0.1, False), CoordinateLaplace(0.5, 0.1), SparseUpload()])
    assert both.law is None
    assert both.narrower == ("per coordinate: epsilon 10",)
    assert both.reason.count(";") == 2
    assert compose([]).reason


def test_settings_become_mechanisms_phase_by_phase() -> None:
    settings = PrivacySettings(**SECURE)
    assert Protection(settings, PHASES).guarantee("train") == Guarantee("gaussian", 1.5)
    assert Protection(settings, PHASES).guarantee("degrees") == Guarantee("gaussian", 3.0)
    assert Protection(settings, PHASES).guarantee("spectral").law is None
    assert Protection(PrivacySettings(), PHASES).guarantee("train").reason.startswith("nothing is clipped")
    bounded = Protection(PrivacySettings(), PHASES, row_clip=0.3)  # a defence bounds rows, in training alone
    assert bounded.guarantee("train").reason.startswith("clipping alone hides nothing")
    assert bounded.guarantee("spectral").reason.startswith("nothing is clipped")
    paper = PrivacySettings(clip=0.5, noise_scale=0.1, pseudo_items=0.1, masking=0.1)
    kinds = [type(each) for each in Protection(paper).mechanisms("train")]
    assert kinds == [PseudoItems, Masking, CoordinateLaplace, SparseUpload]


def test_shares_of_noise_add_up_to_the_noise_of_the_sum() -> None:
    settings = PrivacySettings(**SECURE, dropout_tolerance=0.2)
    law, share = Protection(settings).share_scale("train", 100)
    assert law == "gaussian"
    assert Protection(settings).fewest(100) == 80
    assert share * sqrt(80) == pytest.approx(1.5 * 2.0)
    for asked in range(5, 400):  # if all answer, the size of the noise does not depend on their number
        assert Protection(settings).share_scale("train", asked)[1] * sqrt(asked) == pytest.approx(
            3.0 / sqrt(0.8), rel=1e-12
        )
    local = PrivacySettings(**{**SECURE, "aggregation": "dense"})
    assert Protection(local).share_scale("train", 100) == ("gaussian", 3.0)  # each upload has the full noise


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": {"training": 1.0}}, "noise.training needs clip"),
        ({"noise": {"degrees": 1.0}}, "noise and epsilon need aggregation"),
        ({"noise": {"degrees": 1.0}, "norm": "l2"}, "a sparse upload shows"),
        ({"epsilon": 8.0, "aggregation": "dense", "norm": "l2"}, "epsilon needs aggregation"),
        ({"aggregation": "secure", "norm": "l1", "clip": 1.0, "noise": {"training": 1.0}}, "single uploads"),
        ({"randomised_response": 1.0, "masking": 0.1}, "one or the other"),
        ({"noise_scale": 0.1, "clip": 1.0, "norm": "l2"}, "norm = coordinate"),
    ],
)
def test_options_that_protect_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PrivacySettings(**options)
