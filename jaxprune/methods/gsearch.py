"""G-Search and P-Sigmoid: a keep rate for every layer (arXiv 2412.00556).

Both rest on one observation: how tokens rank by attention hardly changes from one layer to
the next. So the ranking of the layer before decides, and what is left to choose is how many
stay. Before layer l, of N visual tokens at layer 0, the round(r_l N) with the most attention
in layer l - 1 stay; r_l never increases with l, and 0 is allowed.

    G-Search      each r_l is the smallest one, from the shallowest layer to the deepest, that
                  keeps a calibration score; see `calibrate`.
    P-Sigmoid     r_l = 1 / (1 + exp(k (l - alpha))), 1 before `first_pruned_layer`. Given k,
                  alpha follows from the mean rate that is asked for.

Score: the mean over heads and over the text after the image; `queries="last"` takes the
prompt's last token alone, as FastV does. The paper leaves the queries open. `without_rope` is not
of the paper: it takes queries and keys before their rotation, see `fixed_schedules`.
"""

import dataclasses
import functools
import math
from typing import ClassVar

from jaxprune.errors import UserError, check_choice, check_flag, check_layer, check_share, is_number
from jaxprune.methods import recipes
from jaxprune.methods.base import KeepRates, check_depth, check_rates
from jaxprune.ops.cuts import Depth, Score

STEEPEST = 50.0


def check_queries(queries: str) -> None:
    """Raise `UserError` unless `queries` is "text" or "last"."""
    check_choice("queries", queries, ("text", "last"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSearch(KeepRates):
    """Keep rates found layer by layer.

    Args:
        keep_rates: one a layer, `[L]`, the first one 1, not increasing; None takes the
            published curve for the model's family and depth.
        queries: "text" or "last".
        without_rope: rank by attention without rotary positions.
    """

    keep_rates: tuple[float, ...] | None = None
    queries: str = "text"
    without_rope: bool = False

    name: ClassVar[str] = "gsearch"
    paper: ClassVar[str] = "G-Search, arXiv 2412.00556"
    summary: ClassVar[str] = "the lowest keep rates, layer by layer, that keep the accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_queries(self.queries)
        check_flag("without_rope", self.without_rope)
        if self.keep_rates is None:
            return
        check_rates("keep_rates", self.keep_rates)
        object.__setattr__(self, "keep_rates", tuple(map(float, self.keep_rates)))

    @property
    def score(self) -> Score:
        return Score(queries=(self.queries,), rotated=not self.without_rope)

    def rates(self, depth: Depth) -> tuple[float, ...]:
        rates = self.keep_rates
        if rates is None:
            found = recipes.published("gsearch", depth)
            rates = tuple(found.options["keep_rates"])
        return rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSigmoid(KeepRates):
    """Keep rates that fall along a sigmoid, at a given mean.

    Args:
        keep_rate: mean of the rates over all layers.
        k: how steeply they fall; None takes the published point with the nearest
            keep rate for the model's family and depth.
        first_pruned_layer: the first layer that may get fewer tokens.
        queries: "text" or "last".
        without_rope: rank by attention without rotary positions.
    """

    keep_rate: float
    k: float | None = None
    first_pruned_layer: int = 2
    queries: str = "text"
    without_rope: bool = False

    name: ClassVar[str] = "psigmoid"
    paper: ClassVar[str] = "P-Sigmoid, arXiv 2412.00556"
    summary: ClassVar[str] = "keep rates that fall along a sigmoid, at a given mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("keep_rate", self.keep_rate, one=False)
        check_layer("first_pruned_layer", self.first_pruned_layer)
        check_queries(self.queries)
        check_flag("without_rope", self.without_rope)
        k = self.k
        if k is not None and (not is_number(k) or not 0 < k <= STEEPEST):
            raise UserError(f"k is {k!r}; expected a number above 0, at most {STEEPEST:g}.")

    @property
    def score(self) -> Score:
        return Score(queries=(self.queries,), rotated=not self.without_rope)

    def rates(self, depth: Depth) -> tuple[float, ...]:
        k = self.k
        if k is None:
            k = recipes.nearest_sigmoid(depth, self.keep_rate)
        first, L = self.first_pruned_layer, depth.num_hidden_layers
        check_depth("first_pruned_layer", first, depth)
        alpha = solve_alpha(self.keep_rate, k, first_pruned_layer=first, num_hidden_layers=L)
        return sigmoid_rates(k, alpha, first_pruned_layer=first, num_hidden_layers=L)


def sigmoid_rates(
    k: float, alpha: float, *, first_pruned_layer: int, num_hidden_layers: int
) -> tuple[float, ...]:
    """r_l = 1 / (1 + exp(k (l - alpha))), 1 before the first pruned layer: `[L]`."""

    def rate(l: int) -> float:
        if l < first_pruned_layer:
            return 1.0
        return 1.0 / (1.0 + math.exp(min(k * (l - alpha), 700.0)))

    return tuple(rate(l) for l in range(num_hidden_layers))


@functools.lru_cache(maxsize=256)
def solve_alpha(
    keep_rate: float, k: float, *, first_pruned_layer: int, num_hidden_layers: int
) -> float:
    """The alpha whose mean rate over all layers is `keep_rate`, by bisection.

    Raises:
        UserError: when no alpha gives it: the first layers alone are more, or all are needed.
    """
    first, L = first_pruned_layer, num_hidden_layers
    if not first / L < keep_rate < 1:
        raise UserError(
            f"keep_rate is {keep_rate:g}; the first {first} of {L} layers stay whole, so expected "
            f"more than {first / L:.4g} and less than 1."
        )

    def mean(alpha: float) -> float:
        rates = sigmoid_rates(k, alpha, first_pruned_layer=first, num_hidden_layers=L)
        return sum(rates) / L

    low, high = -1.0, float(L)
    while mean(low) > keep_rate:
        low *= 2
    while mean(high) < keep_rate:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < keep_rate else (low, middle)
    return (low + high) / 2
