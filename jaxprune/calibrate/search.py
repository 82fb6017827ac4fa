"""The searches of G-Search, P-Sigmoid (arXiv 2412.00556) and iti's constant.

They know nothing of models: a score is a function of keep rates.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxprune.errors import UserError

GRID = 64  # keep rates are multiples of 1 / 64
Rates = tuple[float, ...]


def greedy_search(
    score: Callable[[Rates], float],
    *,
    num_hidden_layers: int,
    first_pruned_layer: int,
    tolerance: float,
    grid: Sequence[float] = tuple(np.arange(GRID + 1) / GRID),
) -> Rates:
    """G-Search by bisection: the smallest rate, layer by layer, that keeps the score.

    Layer l's rate is tried on l and every deeper layer. For a score that is monotone in
    every rate the result is the lexicographically smallest feasible schedule.

    Args:
        score: of a schedule `[L]`; feasible is whatever is at least that of 1, 1, ... less
            `tolerance`.
        grid: the rates to choose from, ascending, the last one 1.
    """
    rates = [1.0] * num_hidden_layers
    least = score(tuple(rates)) - tolerance - 1e-9  # shares of samples, in floating point
    high = len(grid) - 1
    for l in range(first_pruned_layer, num_hidden_layers):
        # The rate of the layer before is feasible, or it would not have been chosen.
        low = -1
        while high - low > 1:
            middle = (low + high) // 2
            feasible = score(_with_tail(rates, l, grid[middle])) >= least
            low, high = (low, middle) if feasible else (middle, high)
        rates[l:] = [grid[high]] * (num_hidden_layers - l)
    return tuple(rates)


def _with_tail(rates: Sequence[float], layer: int, rate: float) -> Rates:
    return (*rates[:layer], *[rate] * (len(rates) - layer))


def bayesian_greedy_search(
    score: Callable[[Rates], float],
    *,
    num_hidden_layers: int,
    first_pruned_layer: int,
    weight: float,
    evaluations: int,
    seed: int,
) -> Rates:
    """G-Search as the paper has it: each rate maximises score - weight * rate, by a GP.

    Args:
        weight: the paper's lambda.
        evaluations: of the score, for each layer.
        seed: of the proposals.
    """
    rates = [1.0] * num_hidden_layers
    for l in range(first_pruned_layer, num_hidden_layers):
        if rates[l - 1] == 0.0:
            rates[l:] = [0.0] * (num_hidden_layers - l)
            break

        def value(rate: float, l: int = l) -> float:
            return score(_with_tail(rates, l, rate)) - weight * rate

        best = maximise(value, 0.0, rates[l - 1], evaluations=evaluations, seed=seed + l)
        rates[l:] = [best] * (num_hidden_layers - l)
    return tuple(rates)


def maximise(
    value: Callable[[float], float], low: float, high: float, *, evaluations: int, seed: int
) -> float:
    """Where a noisy function of one number is largest, by Bayesian optimisation.

    Both ends are tried first; of equal values the smallest argument wins.

    Raises:
        UserError: without the package that does it.
    """
    try:
        from bayes_opt import BayesianOptimization
    except ImportError:
        raise UserError(
            "Bayesian optimisation needs the package bayesian-optimization; install "
            "jaxprune[calibrate]."
        ) from None
    optimizer = BayesianOptimization(
        f=lambda x: value(x),
        pbounds={"x": (low, high)},
        random_state=seed,
        verbose=0,
        allow_duplicate_points=True,
    )
    ends = [low, high] if high > low else [high]
    for x in ends:
        optimizer.probe({"x": x}, lazy=True)
    start = min(3, max(evaluations - len(ends), 0))
    with contextlib.redirect_stdout(None):  # where it tells of points that are tried again
        optimizer.maximize(init_points=start, n_iter=max(evaluations - len(ends) - start, 0))
    tried = [(result["target"], -float(result["params"]["x"])) for result in optimizer.res]
    return -max(tried)[1]


def tail_exponent(
    share: Callable[[float], float], target: float, *, low: float = 0.01, high: float = 1e5
) -> tuple[float, float]:
    """iti's c: the smallest whose mean share of kept tokens is at least `target`.

    Args:
        share: the mean share at a c, not falling.
        target: wanted share.

    Returns:
        c and the share that it reaches.

    Raises:
        UserError: when not even the largest c keeps so many.
    """
    most = share(high)
    if most < target:
        raise UserError(
            f"No c keeps {target:g} of the visual tokens on average; the most is "
            f"{math.floor(1e4 * most) / 1e4:.4f}. Ask "
            "for less, or for a smaller stage2."
        )
    if share(low) >= target:
        return low, share(low)
    a, b = math.log(low), math.log(high)
    for _ in range(60):
        middle = (a + b) / 2
        a, b = (a, middle) if share(math.exp(middle)) >= target else (middle, b)
    return math.exp(b), share(math.exp(b))


def mean_rate(rates: Rates) -> float:
    """Mean keep rate over layers, the "memory" of the paper's tables."""
    return float(np.mean(rates))
