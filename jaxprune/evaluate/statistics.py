"""How sure a mean is: bootstrap intervals (Efron, 1979), and paired ones of differences.

What is drawn again are groups, not samples: questions about one image succeed and fail
together, and taken for independent they would make the interval too narrow.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
RESAMPLES = 4000
_DRAWN_AT_ONCE = 1 << 22  # numbers; bounds the memory
_FEWEST = 6
"""Groups that have to differ. Of five that all point one way each sign has a chance of 1 in 2,
so that all agree has one of 1 in 16, above 5 %; the bootstrap would call it certain."""


class Interval(NamedTuple):
    """A mean and the bounds that it lies between, at a level of 95 %."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much better the second of two is: an interval, and whether it can be told from 0."""

    mean: float
    low: float
    high: float
    significant: bool


def mean_interval(
    values: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The mean and its percentile bootstrap interval.

    Args:
        values: one a sample, `[N]`, at least one.
        groups: what each belongs to, `[N]` of anything that can be sorted; None: each stands
            alone.
        seed: of the draws: the same groups are drawn the same way, whatever the values.
        resamples: how often.
    """
    x = np.asarray(values, float)
    own = np.arange(x.size) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(own, weights=x), np.bincount(own)
    G = sums.size
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // G)
    means = np.empty(resamples)
    for first in range(0, resamples, at_once):
        part = means[first : first + at_once]
        drawn = rng.integers(G, size=(part.size, G))
        part[:] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """How much `after` is above `before` on the same samples, with its interval.

    It is significant if the interval leaves out 0 and at least six groups differ.

    Args:
        before, after: `[N]` each, in the same order.
        groups, seed, resamples: as for `mean_interval`.
    """
    change = np.asarray(after, float) - np.asarray(before, float)
    interval = mean_interval(change, groups, seed=seed, resamples=resamples)
    own = np.arange(change.size) if groups is None else np.unique(groups, return_inverse=True)[1]
    differing = np.unique(own[change != 0]).size
    significant = differing >= _FEWEST and not interval.low <= 0 <= interval.high
    return Difference(*interval, significant)
