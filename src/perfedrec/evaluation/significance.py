"""Whether one method is ahead of another: paired comparison over users.

The test is a paired permutation (sign-flip) test of the mean difference, not Wilcoxon's signed-rank test: it tests the
figure that tables show. Most users have equal values under both methods (nothing found by either), which Wilcoxon's
test drops before it asks about a median; its answer can have another sign than the difference of the means.

Several comparisons with one reference share its values and are not independent, so that p-values are adjusted after
Benjamini and Yekutieli (2001), which holds under any dependence: among the differences that are called significant at
0.05, at most 5 % are expected to be false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

N_RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The mean of paired differences over ``users``, its 95 % interval [``low``, ``high``] (Student's t) and the
    two-sided ``p`` that it is 0; no smaller than 2 / 10,000, what so many permutations can show of both sides."""

    difference: float
    low: float
    high: float
    p: float
    users: int


def compare(values: NDArray[np.float64], reference: NDArray[np.float64], seed: int = 0) -> Comparison:
    """Compare ``values`` [n] with ``reference`` [n], the same users in the same order, 2 or more."""
    differences = values - reference
    mean, users = float(differences.mean()), differences.size
    spread = float(stats.sem(differences))
    low, high = stats.t.interval(CONFIDENCE, users - 1, mean, spread) if spread else (mean, mean)
    unequal = differences[differences != 0]  # a zero is the same under either sign
    if unequal.size < 2:
        return Comparison(mean, float(low), float(high), 1.0, users)
    test = stats.permutation_test(
        (unequal,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=max(1, 2_000_000 // unequal.size),
        rng=np.random.default_rng(seed),
    )
    return Comparison(mean, float(low), float(high), float(test.pvalue), users)


def adjusted(p: Sequence[float]) -> list[float]:
    """p-values after Benjamini and Yekutieli, in the order given."""
    return [float(each) for each in stats.false_discovery_control(p, method="by")] if p else []
