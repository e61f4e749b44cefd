"""What protects an answer, in words, and epsilon after some answers."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest

from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.privacy.ledger import gaussian_epsilon
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.privacy.statement import accountable, so_far, statement

SECURE = {"aggregation": "secure", "norm": "l2", "clip": 0.5}


def told(phase: str = "train", secure: bool = False, sealed: bool = False, **options: Any) -> str:
    return statement(Protection(PrivacySettings.model_validate(options)), phase, secure, sealed)


def test_what_is_seen_without_protection() -> None:
    text = told()
    assert text.startswith(
        "The coordinator sees the sum over this node's users; with one user, it is this user's part."
    )
    assert "It shows which items they have." in text
    assert text.endswith("nothing is clipped and no noise is added; the coordinator sees which rows a client touched.")
    assert "sealed" not in text
    assert "under tokens in place of ids, are sealed for the neighbourhood service" in told(sealed=True)


def test_the_mechanisms_of_the_paper() -> None:
    text = told(norm="coordinate", clip=0.5, noise_scale=0.1, pseudo_items=0.1, masking=0.1)
    assert "which items they have (decoys are among them, and some are left out)." in text
    assert "Each number is at most 0.5, with Laplace noise of scale 0.1." in text
    assert "It holds per coordinate: epsilon 10." in text
    assert "There is no guarantee of differential privacy: " in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "It is opened in at most 64 columns, so that no number of it belongs to one item."),
        ({"rank": 0}, "It has a row for every item, and such sums can show items of single users."),
        ({"min_clients": 40}, "A sum over fewer than 40 users is not opened."),
        ({}, "One user's part has an L2 norm of at most 0.5. There is no noise."),
        ({"noise": {"training": 2.0}}, "There is Gaussian noise of 2 times that bound on the sum over all nodes."),
        ({"noise": {"training": 2.0}}, "It is the noise of simulations, which is not cryptographic."),
        ({"noise": {"training": 2.0}, "delta": 1e-6}, "for a user, at delta 1e-06."),
    ],
)
def test_secure_sums(options: dict[str, Any], said: str) -> None:
    text = told(secure=True, **SECURE, **options)
    assert text.startswith("The coordinator learns the sum over all nodes that take part, and nothing else")
    assert said in text
    assert ("no guarantee" in text) == ("noise" not in options)
    assert "not cryptographic" not in told(secure=True, **SECURE, noise={"training": 2.0}, noise_source="opendp")


@pytest.mark.parametrize("secure", [True, False])
def test_an_evaluation_has_no_guarantee(secure: bool) -> None:
    text = told("evaluate", secure)
    assert text.startswith("The answer says how well lists rank the items that users hold out")
    assert ("SecAgg+" in text) == secure
    assert "There is no guarantee of differential privacy" in text
    assert "which items they have" not in text


def test_epsilon_counts_each_answer_by_its_noise() -> None:
    noise = {"degrees": 6.0, "spectral": 5.0, "training": 4.0}
    private = {"privacy": {**SECURE, "noise": noise}, "clusters": {"n_clusters": 0}}
    algorithm = PerFedRecPP(PerFedRecPP.Options.model_validate({**private, "pretraining": {"kind": "spectral"}}))
    assert accountable(algorithm)
    for counts, total in (
        ({"degrees": 1}, 1 / 36),
        ({"degrees": 1, "spectral": 2, "train": 3}, 1 / 36 + 2 / 25 + 3 / 16),
    ):
        assert so_far(algorithm, counts).value == pytest.approx(gaussian_epsilon(sqrt(1 / total), 1e-5), rel=1e-9)
    assert so_far(algorithm, {"train": 1, "evaluate": 1}).value is None
    assert not accountable(FedMF(FedMF.Options()))
    assert so_far(FedMF(FedMF.Options()), {"train": 1}).value is None
