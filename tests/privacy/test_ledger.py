"""Reference values of the accountant, the two views, and what the ledger refuses."""

from math import exp, inf, log1p, sqrt

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from perfedrec.privacy import ledger as accounting
from perfedrec.privacy.ledger import (
    AccountingError,
    Ledger,
    Release,
    account,
    accountant_version,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_multiplier,
    poisson_multiplier,
    split_budget,
)
from perfedrec.privacy.mechanisms import Guarantee, JointNoise, SecureAggregation, Unprotected, compose
from perfedrec.privacy.plan import plan_training

GAUSSIAN = Guarantee("gaussian", 1.0)
TRAINING = Release("training", 200, GAUSSIAN, 10, "poisson", 256 / 5224)
DELTAS = st.floats(-300, -12.5).map(lambda power: 10**power)
"""Deltas that are too small for PLD."""


def sampled(multiplier: float, rate: float, times: int) -> dp.DpEvent:
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(multiplier)), times)


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


def test_a_reason_that_holds_for_some_releases_names_them() -> None:
    """Under secure aggregation what clients send before training is not clipped, and what they send in training is."""
    bare, clipped = Unprotected(), JointNoise("l2", 1.0, 0.0, local=False)
    found = [
        Release(name, 1, compose([mechanism, SecureAggregation()]), 1)
        for name, mechanism in (("spectral", bare), ("join", bare), ("training", clipped))
    ]
    hidden = SecureAggregation().guarantee.reason
    assert Ledger(found, 1e-5).epsilon("coordinator").reason == (
        f"in spectral and join: {bare.guarantee.reason}; {hidden}; in training: {clipped.guarantee.reason}"
    )
    # one that all have stands alone, and one that names its release needs no other name
    public = Release("degrees", 1, Guarantee(reason="item degrees are public"), 1)
    assert Ledger([public, *found[:2]], 1e-5).epsilon("coordinator").reason == (
        f"item degrees are public; {bare.guarantee.reason}; {hidden}"
    )


def test_orders_that_the_accountant_leaves_out_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """At order 1.1 the series does not converge: its divergence counts as infinite, and another order gives the
    bound."""
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.13617, dp.GaussianDpEvent(1.168644)), 50)
    found = [accounting._rdp_of(event, 1e-5, orders) for orders in ((1.1, 8.0), (8.0,))]
    assert found[0] == found[1]
    assert not caplog.records


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


@settings(max_examples=15)
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


@given(epsilon=st.floats(1e-3, 1e4), delta=st.floats(1e-12, 0.1) | DELTAS)
def test_noise_is_computed_quickly_for_any_epsilon_and_delta(epsilon: float, delta: float) -> None:
    multiplier = gaussian_multiplier(epsilon, delta)
    assert account(dp.GaussianDpEvent(multiplier), delta) == pytest.approx(epsilon, rel=1e-4, abs=1e-6)
    assert account(dp.GaussianDpEvent(multiplier), delta) <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize(
    ("multiplier", "delta", "epsilon"),
    [
        (1.0, 1e-5, 4.37717809568),
        (0.1, 1e-5, 91.8172896247),
        (1.0, 1e-15, 8.1655796955),
        (1.0, 1e-30, 11.7438830252),
        (0.5, 1e-100, 44.3161677084),
        (1.0, 1e-300, 37.4488479121),
        (20.0, 1e-300, 1.8446742447),
        (1e6, 1e-20, 7.38465965609e-6),
    ],
)
def test_the_closed_form_at_small_deltas(multiplier: float, delta: float, epsilon: float) -> None:
    """Against the same formula with 400 digits."""
    assert gaussian_epsilon(multiplier, delta) == pytest.approx(epsilon, rel=1e-9)
    assert gaussian_multiplier(epsilon, delta) == pytest.approx(multiplier, rel=1e-8)
    assert gaussian_delta(multiplier, epsilon) == pytest.approx(delta, rel=1e-7)


def test_no_noise_and_the_smallest_delta_there_is() -> None:
    assert account(dp.GaussianDpEvent(0.0), 1e-5) == account(dp.LaplaceDpEvent(0.0), 1e-5) == inf
    least = 5e-324
    assert gaussian_epsilon(gaussian_multiplier(8.0, least), least) == pytest.approx(8.0)
    assert 1 < poisson_multiplier(8.0, least, 0.005, 10) < gaussian_multiplier(8.0, least) * sqrt(10)


@pytest.mark.parametrize(
    ("event", "epsilons"),
    [
        (sampled(0.66, 256 / 50_000, 200), {1e-12: 6.604, 1e-13: 7.213, 1e-14: 7.83, 1e-15: 8.449, 1e-30: 17.433}),
        (sampled(1.0, 256 / 5224, 200), {1e-12: 9.149, 1e-13: 9.732, 1e-14: 10.308, 1e-15: 10.876, 1e-30: 18.871}),
        (sampled(1.0, 0.05, 500), {1e-11: 12.648, 1e-13: 14.131, 1e-14: 14.848, 1e-15: 15.551, 1e-30: 25.099}),
    ],
)
def test_small_deltas_have_a_finite_epsilon_that_is_not_too_small(
    event: dp.DpEvent, epsilons: dict[float, float]
) -> None:
    """Against the losses of one release on PLD's grid, tilted before they are composed, so that no tail is cut off and
    rounding errors are relative to the tail. PLD says 7.76 instead of 7.83, and infinity at 1e-15."""
    found = [account(event, delta) for delta in epsilons]
    assert found == sorted(found)
    for (delta, reference), epsilon in zip(epsilons.items(), found, strict=True):
        assert reference * (1 - 3e-4) <= epsilon <= reference * (1.001 if delta > 1e-12 else 1.13)


def test_rdp_gives_the_figure_where_pld_gives_none() -> None:
    event = sampled(1.0, 0.05, 500)
    pld = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event)
    assert pld.get_epsilon(1e-15) == inf
    assert account(event, 1e-15) == pytest.approx(16.3, abs=0.05)
    assert account(event, 1e-15, adjacency="replace") == inf  # RDP does not double the sensitivity, as PLD does
    laplace = dp.SelfComposedDpEvent(dp.LaplaceDpEvent(2.0), 3)
    assert 1.5 <= account(laplace, 1e-20) < 1.52  # pure DP of 1.5, with RDP of finite order
    assert account(dp.PoissonSampledDpEvent(0.1, laplace.event), 1e-20) == inf
    assert account(sampled(100, 0.001, 100_000), 1e-5) < 0.01  # PLD's grid is too coarse for losses this small: 0.024


@settings(max_examples=15)
@given(multiplier=st.floats(0.3, 30), rate=st.floats(1e-4, 0.9), delta=DELTAS)
def test_one_sampled_release_at_small_deltas_is_bounded_by_the_exact_figure(
    multiplier: float, rate: float, delta: float
) -> None:
    """Exactly: delta is the rate times that of the Gaussian part at ``log(1 + (e^epsilon - 1) / rate)``."""
    if delta >= rate:
        return
    exact = log1p(rate * (exp(gaussian_epsilon(multiplier, delta / rate)) - 1))
    assert exact <= account(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(multiplier)), delta)


def test_epsilon_grows_as_delta_falls() -> None:
    event = sampled(3.0, 0.01, 2000)
    found = [account(event, 10**-power) for power in range(5, 31)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.6, abs=0.05)
    assert found[-1] < 2


@settings(max_examples=15)
@given(
    multiplier=st.floats(0.3, 20),
    times=st.integers(1, 500),
    cap=st.integers(1, 500),
    rate=st.floats(1e-3, 1),
    delta=DELTAS,
)
def test_recipients_never_stand_worse_than_the_coordinator(
    multiplier: float, times: int, cap: int, rate: float, delta: float
) -> None:
    training = Release("training", times, Guarantee("gaussian", multiplier), min(cap, times), "poisson", rate)
    ledger = Ledger([training, Release("degrees", 1, Guarantee("gaussian", 2.0), 1)], delta)
    coordinator, recipients = ledger.epsilon("coordinator"), ledger.epsilon("recipients")
    assert 0 < recipients.value <= coordinator.value < inf


def test_a_limit_on_participations_counts_for_recipients_too() -> None:
    """At most one participation in 200 rounds with half of the users: sampling does not help, the limit does."""
    ledger = Ledger([Release("training", 200, GAUSSIAN, 1, "poisson", 0.5)], 1e-5)
    assert ledger.epsilon("recipients") == ledger.epsilon("coordinator")
    assert ledger.epsilon("recipients").value == pytest.approx(4.377, abs=1e-3)


def test_an_epsilon_names_its_accountant() -> None:
    amplified = Release("training", 200, GAUSSIAN, 100, "poisson", 256 / 5224)
    for delta, accountant in ((1e-5, "PLD"), (1e-15, "RDP")):
        assert Ledger([amplified], delta).epsilon("recipients").accountant == accountant
        assert Ledger([amplified], delta).epsilon("coordinator").accountant == "closed form"
    laplace = Release("training", 200, Guarantee("laplace", 50.0), 10, "poisson", 0.1)
    recipients = Ledger([laplace], 1e-15).epsilon("recipients")  # no accountant knows it: the coordinator's holds
    assert recipients == Ledger([laplace], 1e-15).epsilon("coordinator")
    assert recipients.accountant == "RDP"
    assert recipients.value == pytest.approx(0.2, abs=0.02)
    assert Ledger([], 1e-15).epsilon("recipients").accountant is None


def test_noise_for_small_deltas() -> None:
    """50,000 users, 256 in each of 200 rounds, epsilon 8."""
    rate, found = 256 / 50_000, [0.0]
    for delta, expected in ((1e-14, 0.684), (1e-15, 0.702), (1e-20, 0.792), (1e-30, 0.947), (1e-300, 2.92)):
        multiplier = poisson_multiplier(8.0, delta, rate, 200)
        assert multiplier == pytest.approx(expected, rel=4e-3)
        assert found[-1] < multiplier < gaussian_multiplier(8.0, delta) * sqrt(2)
        assert (
            account(sampled(multiplier, rate, 200), delta) <= 8 < account(sampled(multiplier / 1.003, rate, 200), delta)
        )
        found.append(multiplier)


@given(
    falls=st.lists(st.sampled_from([0.0, 1e-9, 0.002, 0.01, 0.5, 7.0]), min_size=1, max_size=80),
    unknown=st.integers(0, 90),
    limit=st.floats(0.01, 50),
)
def test_the_first_power_that_is_enough_is_found(falls: list[float], unknown: int, limit: float) -> None:
    """Whatever epsilon does between two powers, as long as it falls; and where it is infinite for little noise."""
    values = [exp(each) for each in np.cumsum(falls[::-1])[::-1] - 5]
    values[:unknown] = [inf] * min(unknown, len(values))
    low, asked = 1000, list[int]()

    def epsilon(power: int) -> float:
        asked.append(power)
        return values[power - low]

    last = low + len(values) - 1
    assert accounting._first(low, last, epsilon, limit) == next(
        (power for power in range(low, last) if values[power - low] <= limit), last
    )
    assert len(asked) == len(set(asked))


def test_few_powers_are_asked_for_where_epsilon_falls_smoothly() -> None:
    """Near 2 / noise + 1 / noise**2 it is 3 at noise 1; of 4,000 powers a bisection asks for 12."""
    asked = list[float]()

    def epsilon(power: int) -> float:
        asked.append(noise := 1.002**power)
        return 2 / noise + noise**-2

    assert accounting._first(-2000, 2000, epsilon, 3.0) == 0
    assert len(asked) <= 9


@pytest.mark.parametrize(
    ("epsilon", "deltas"),
    [
        (0.05, [1e-5, 1e-30]),
        (1.0, [1e-5, 1.01e-12, 0.99e-12, 1e-15, 1e-30]),
    ],
)
def test_a_smaller_delta_never_needs_less_noise(epsilon: float, deltas: list[float]) -> None:
    for solved in (
        [poisson_multiplier(epsilon, delta, 0.05, 20) for delta in deltas],
        [gaussian_multiplier(epsilon, delta) for delta in deltas],
    ):
        assert solved == sorted(solved)
        assert solved[-1] < 5 * solved[0]


def test_recipients_need_no_more_noise_than_the_coordinator() -> None:
    """All users in every round, but at most one participation: without a limit they would need sqrt(30) times that."""
    plan = plan_training(8.0, 1e-5, users=100, items=50, dim=4, rounds=30, cohort=100, cap=1)
    assert plan.recipients == plan.coordinator == gaussian_multiplier(8.0, 1e-5)
    assert poisson_multiplier(8.0, 1e-5, 1.0, 30) == pytest.approx(plan.coordinator * sqrt(30))


def test_accountants_that_contradict_each_other_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    rdp = accounting._rdp_epsilon
    monkeypatch.setattr(accounting, "_rdp_epsilon", lambda event, delta: rdp(event, delta) / 4)
    with pytest.raises(AccountingError, match=r"contradict each other for noise .* by PLD, .* by RDP; expected"):
        poisson_multiplier(1.0, 1.5e-5, 0.05, 20)


def test_the_accountant_states_its_version() -> None:
    assert accountant_version() == "dp-accounting 0.6.0, PLD or RDP"


def test_very_little_noise_is_accounted_for_without_a_grid() -> None:
    """PLD would take minutes and more than ten gigabytes."""
    guarantee = Guarantee("gaussian", multiplier=1e-4)
    release = Release("training", 50, guarantee, 50, "poisson", 0.4)
    found = Ledger([release], 1e-5).epsilon("recipients")
    assert found.value is not None
    assert 1e7 < found.value < inf
    assert found.accountant in ("RDP", "closed form")
