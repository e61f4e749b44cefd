"""Reference values of the accountant, the two views, and what the ledger refuses."""

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from perfedrec.privacy.ledger import (
    AccountingError,
    Ledger,
    Release,
    account,
    accountant_version,
    gaussian_multiplier,
    poisson_multiplier,
    split_budget,
)
from perfedrec.privacy.mechanisms import Guarantee

GAUSSIAN = Guarantee("gaussian", 1.0)
TRAINING = Release("training", 200, GAUSSIAN, 10, "poisson", 256 / 5224)


def test_the_reference_setting() -> None:
    """5,224 users, 256 a round, 200 rounds, delta 1e-5, noise multiplier 1, at most 10 participations."""
    ledger = Ledger([TRAINING], 1e-5)
    assert ledger.epsilon("recipients").value == pytest.approx(4.67, abs=0.01)
    assert ledger.epsilon("coordinator").value == pytest.approx(17.9, abs=0.05)


@pytest.mark.parametrize(("multiplier", "epsilon"), [(0.5, 20.1), (1.0, 8.4), (2.0, 3.7), (4.0, 1.7)])
def test_three_sums_over_everybody(multiplier: float, epsilon: float) -> None:
    ledger = Ledger([Release("spectral", 3, Guarantee("gaussian", multiplier), 3)], 1e-5)
    for party in ("coordinator", "recipients"):
        assert ledger.epsilon(party).value == pytest.approx(epsilon, abs=0.06)  # type: ignore[arg-type]


def test_the_papers_upload_by_the_accountant() -> None:
    """30 rows of 64 coordinates with clip 0.5 and Laplace noise 0.1: epsilon 19,200 at delta 0, and 17,590 at delta
    1e-5."""
    event = dp.SelfComposedDpEvent(dp.LaplaceDpEvent(0.1), 30 * 64)
    assert account(event, 1e-5) == pytest.approx(17_590, rel=0.01)


def test_all_releases_are_composed() -> None:
    alone = Ledger([TRAINING], 1e-5).epsilon("coordinator").value
    both = Ledger([TRAINING, Release("degrees", 1, Guarantee("gaussian", 2.0), 1)], 1e-5).epsilon("coordinator").value
    mixed = Ledger([TRAINING, Release("degrees", 1, Guarantee("laplace", 2.0), 1)], 1e-5).epsilon("coordinator").value
    assert both > alone + 0.1
    assert mixed > alone + 0.1
    # Gaussian releases compose to one
    assert both == pytest.approx(account(dp.GaussianDpEvent((10 + 0.25) ** -0.5), 1e-5))
    composed = dp.ComposedDpEvent([dp.SelfComposedDpEvent(dp.GaussianDpEvent(1.0), 10), dp.GaussianDpEvent(2.0)])
    assert both == pytest.approx(account(composed, 1e-5), rel=1e-3)


def test_one_release_without_a_guarantee_means_no_epsilon() -> None:
    ledger = Ledger([TRAINING, Release("degrees", 1, Guarantee(reason="taken as public"), 1)], 1e-5)
    for party in ("coordinator", "recipients"):
        epsilon = ledger.epsilon(party)  # type: ignore[arg-type]
        assert epsilon.value is None
        assert str(epsilon) == "none (taken as public)"


def test_no_release_means_epsilon_zero() -> None:
    ledger = Ledger([Release("training", 0, Guarantee(reason="never"), 0)], 1e-5)
    assert ledger.epsilon("coordinator").value == 0.0
    assert ledger.releases == []


def test_a_fixed_cohort_is_not_amplified() -> None:
    fixed = Ledger([Release("training", 200, GAUSSIAN, 10, "fixed", 256 / 5224)], 1e-5)
    assert fixed.epsilon("recipients").value == fixed.epsilon("coordinator").value


@pytest.mark.parametrize(
    "event",
    [
        dp.SampledWithoutReplacementDpEvent(5224, 256, dp.GaussianDpEvent(1.0)),
        dp.SelfComposedDpEvent(dp.SampledWithReplacementDpEvent(5224, 256, dp.GaussianDpEvent(1.0)), 3),
    ],
)
def test_fixed_cohorts_as_poisson_samples_are_refused(event: dp.DpEvent) -> None:
    with pytest.raises(AccountingError, match="no Poisson sample"):
        account(event, 1e-5)


def test_sensitivity_is_doubled_once_and_not_twice() -> None:
    """Under the replace adjacency the accountant expects a multiplier for add-or-remove, and doubles the sensitivity
    itself."""
    with pytest.raises(AccountingError, match="doubles the sensitivity"):
        account(dp.GaussianDpEvent(1.0), 1e-5, adjacency="replace", sensitivity="replace")
    halved = account(dp.GaussianDpEvent(2.0), 1e-5, adjacency="replace")
    assert halved == pytest.approx(account(dp.GaussianDpEvent(1.0), 1e-5), rel=1e-3)


def test_events_that_the_accountant_does_not_know_are_refused() -> None:
    with pytest.raises(AccountingError, match="does not know"):
        account(dp.UnsupportedDpEvent(), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"participations": 201},
        {"participations": -1},
        {"participations": 5, "sampling": "everyone", "rate": 0.5},
    ],
)
def test_contradictory_releases_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(AccountingError, match=r"training: .*expected"):
        Release("training", 200, GAUSSIAN, **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=15)
@given(
    epsilon=st.sampled_from([0.5, 1.0, 4.0, 8.0]),
    passes=st.integers(1, 4),
    cap=st.integers(0, 12),
    join=st.booleans(),
)
def test_a_budget_that_is_split_is_spent_and_not_exceeded(epsilon: float, passes: int, cap: int, join: bool) -> None:
    counts = {"degrees": 1, "spectral": passes, "join": int(join), "training": cap}
    multipliers = split_budget(epsilon, 1e-5, counts)
    assert multipliers.keys() == {name for name, count in counts.items() if count}
    releases = [Release(name, counts[name], Guarantee("gaussian", z), counts[name]) for name, z in multipliers.items()]
    spent = Ledger(releases, 1e-5).epsilon("coordinator").value
    assert 0.999 * epsilon < spent <= epsilon


def test_solved_multipliers() -> None:
    assert gaussian_multiplier(8.0, 1e-5) == pytest.approx(0.6, abs=0.001)
    multiplier = poisson_multiplier(4.67, 1e-5, 256 / 5224, 200)
    assert multiplier == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("multiplier", [0.2, 0.6, 1.0, 3.0, 20.0])
def test_one_gaussian_release_in_closed_form_agrees_with_the_accountant(multiplier: float) -> None:
    found = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(dp.GaussianDpEvent(multiplier))
    assert account(dp.GaussianDpEvent(multiplier), 1e-5) == pytest.approx(found.get_epsilon(1e-5), rel=1e-3, abs=1e-4)


@given(epsilon=st.floats(1e-3, 1e4), delta=st.floats(1e-12, 0.1))
def test_noise_is_computed_quickly_for_any_epsilon(epsilon: float, delta: float) -> None:
    multiplier = gaussian_multiplier(epsilon, delta)
    assert account(dp.GaussianDpEvent(multiplier), delta) == pytest.approx(epsilon, rel=1e-4, abs=1e-6)
    assert account(dp.GaussianDpEvent(multiplier), delta) <= epsilon * (1 + 1e-9)


def test_the_accountant_states_its_version() -> None:
    assert accountant_version() == "dp-accounting 0.6.0, PLD"
