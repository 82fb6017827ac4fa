"""The searches, against brute force and definitions."""

import itertools

import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import search

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
LAYERS, FIRST = 5, 1
SCHEDULES = [
    (1.0, *tail)
    for tail in itertools.product(GRID, repeat=LAYERS - 1)
    if all(a >= b for a, b in itertools.pairwise((1.0, *tail)))
]


def greedy(score, tolerance):
    return search.greedy_search(
        score, num_hidden_layers=LAYERS, first_pruned_layer=FIRST, tolerance=tolerance, grid=GRID
    )


def random_monotone(rng):
    """A score that never falls when a rate rises: a sum of random steps, some joint."""
    terms = []
    for _ in range(rng.integers(1, 6)):
        layers = rng.choice(range(1, LAYERS), size=rng.integers(1, 4), replace=False)
        terms.append((layers, rng.choice(GRID, size=len(layers)), rng.random()))

    def score(rates):
        return sum(
            gain
            for layers, needed, gain in terms
            if all(rates[l] >= n for l, n in zip(layers, needed, strict=True))
        )

    return score


def test_greedy_search_is_lexicographically_smallest():
    rng = np.random.default_rng(0)
    cheapest = 0
    for _ in range(3000):
        score = random_monotone(rng)
        tolerance = float(rng.choice([0.0, 0.3, 1.0]))
        least = score((1.0,) * LAYERS) - tolerance
        feasible = [rates for rates in SCHEDULES if score(rates) >= least]
        found = greedy(score, tolerance)
        assert found == min(feasible)
        cheapest += sum(found) == min(map(sum, feasible))
    # Greedy misses the cheapest for some scores; it must not miss it for most.
    assert 0.6 < cheapest / 3000 < 1


def test_greedy_search_is_the_cheapest_where_each_layer_needs_its_own_rate():
    rng = np.random.default_rng(1)
    for _ in range(1000):
        needed = sorted(rng.choice(GRID, size=LAYERS - 1), reverse=True)

        def score(rates, needed=needed):
            return float(all(r >= n for r, n in zip(rates[1:], needed, strict=True)))

        feasible = [rates for rates in SCHEDULES if score(rates) == 1]
        assert sum(greedy(score, 0.5)) == min(map(sum, feasible))


def test_bayesian_search_finds_a_knee(capsys):
    pytest.importorskip("bayes_opt")

    def score(rates):
        return -sum(max(0.0, 0.5 - rate) for rate in rates[1:])

    rates = search.bayesian_greedy_search(
        score, num_hidden_layers=3, first_pruned_layer=1, weight=0.1, evaluations=15, seed=0
    )
    assert rates[0] == 1 and abs(rates[1] - 0.5) < 0.05
    best = search.maximise(lambda x: -((x - 0.7) ** 2), 0.05, 2.0, evaluations=20, seed=0)
    assert abs(best - 0.7) < 0.05
    assert capsys.readouterr().out == ""  # stdout is the caller's


def test_tail_exponent_is_the_smallest_that_reaches_the_target():
    def share(c):
        return 1 - 1 / (1 + c)

    c, reached = search.tail_exponent(share, 0.6)
    assert reached >= 0.6 and abs(c - 1.5) < 1e-6
    assert search.tail_exponent(share, 0.001) == (0.01, share(0.01))
    with pytest.raises(jaxprune.UserError, match=r"No c keeps 0.9 .*the most is 0.5000"):
        search.tail_exponent(lambda c: 0.5, 0.9)


def test_a_tolerance_is_not_missed_by_rounding():
    """One wrong answer more of 200 is a tolerance of .005, whatever the floats say."""
    for right in range(1, 201):

        def share(rates, right=right):
            return (right if rates[-1] == 1 else right - 1) / 200

        rates = search.greedy_search(
            share,
            num_hidden_layers=3,
            first_pruned_layer=2,
            tolerance=0.005,
        )
        assert rates[-1] < 1, right
