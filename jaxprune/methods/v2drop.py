"""V2Drop: drop the visual tokens that a layer changes least.

Paper: arXiv 2509.01552; published code: xuyang-liu16/V2Drop at 89eddbb.

A token that a layer hardly changes does little in the decoder. Before each layer l of `cut_layers`,
with x_l the hidden states that enter it and n visual tokens present:

    variation      v_i = || x_l,i - x_(l-1),i ||, what layer l - 1 did to the token
    keep           the max(1, int(r n)) visual tokens with the largest v, at their positions

No attention is looked at. The published shares, for a mean of about `budget` visual tokens over
the 32 layers of a 7B model and 576 at the start, are for cuts before the layers 3, 17 and 22:

    budget      192             128              64
    kept        0.5, 0.3, 0     0.28, 0.25, 0    0.05, 0.05, 0

The last cut says "all", and yet leaves one token. Shares are written as kept rather than as
dropped, since int(0.1 * 10) is 1 and int((1 - 0.9) * 10) is 0.

Deviations from the published code: it ranks the first row of a batch for all of them, and knows
one image of 576 tokens at a fixed place; here every row ranks its own visual tokens.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.errors import UserError
from jaxprune.methods.base import (
    DecoderMethod,
    as_layers,
    as_shares,
    check_budget,
    removed_before,
)
from jaxprune.ops.cuts import Depth, LayerView

BUDGETS = {192: (0.5, 0.3, 0.0), 128: (0.28, 0.25, 0.0), 64: (0.05, 0.05, 0.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class V2Drop(DecoderMethod):
    """Keep the visual tokens that the layer before the cut changed most.

    Args:
        budget: 192, 128 or 64: the published shares of that name.
        keep_rates: instead of `budget`, what each cut keeps of the tokens that come to it.
        cut_layers: the first layers without the dropped tokens, one a cut.
    """

    budget: int | None = None
    keep_rates: tuple[float, ...] | None = None
    cut_layers: tuple[int, ...] = (3, 17, 22)

    name: ClassVar[str] = "v2drop"
    paper: ClassVar[str] = "V2Drop, arXiv 2509.01552"
    summary: ClassVar[str] = "keep the visual tokens that the layer before changed most"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "cut_layers", as_layers(self.cut_layers))
        if (self.budget is None) == (self.keep_rates is None):
            raise UserError("v2drop needs either budget, e.g. budget=128, or keep_rates.")
        if self.budget is None:
            shares = as_shares("keep_rates", self.keep_rates, self.cut_layers)
            object.__setattr__(self, "keep_rates", shares)
        else:
            check_budget(self.budget, BUDGETS)
            as_shares(f"The shares of budget={self.budget}", self.rates, self.cut_layers)

    @property
    def rates(self) -> tuple[float, ...]:
        """What each cut keeps of the tokens that come to it."""
        if self.keep_rates is not None:
            return self.keep_rates
        assert self.budget is not None
        return BUDGETS[self.budget]

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        left = [num_tokens]
        for rate in self.rates:
            left.append(min(left[-1], max(1, int(rate * left[-1]))))
        return removed_before(self.cut_layers, left[1:], num_tokens, depth)

    def rank(self, view: LayerView) -> Float[Array, "B S"]:
        change = view.after.astype(jnp.float32) - view.before.astype(jnp.float32)
        variation: Array = jnp.linalg.norm(change, axis=-1)
        return variation
