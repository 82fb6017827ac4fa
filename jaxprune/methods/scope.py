"""SCOPE: the patches that cover the image best, salient ones before others (arXiv 2510.24214).

With x the tower's features, G_vu = cos(x_v, x_u), and a the CLS query's attention in the layer
that makes them, mean over heads. What a set S covers is f(S) = sum_v max(0, max_{s in S} G_vs).
`keep` times the patch u outside S joins it with the largest

    (f(S + u) - f(S)) * a_u^alpha

They stay in raster order; nothing is merged. alpha = 1 is the published value; 0 is coverage
alone, which is facility location. The published code sums a over heads, which multiplies every
gain by the same number.

`combine="sum"` is what that code does where its environment says "add", with a the sum over heads:

    (f(S + u) - f(S)) + a_u^alpha

Deviations: gains are float32. The published code adds hundreds of cosines in float16, to which
near ties are equal. By default a number is kept of all tiles together; the published code divides
it among the tiles, which is `budget="tile"`. Towers without a CLS token give the attention that
patches receive; a sum with coverage needs the CLS token's own, and such towers refuse it.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.errors import UserError, check_choice, is_number
from jaxprune.methods.counted import Counted, Group
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.ops.greedy import cosines, greedy
from jaxprune.ops.visual import FEATURE, FEATURES, Signal

SUMMED = Signal("cls_attention", layer=FEATURE, heads="sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope(Counted):
    """Keep the patches that cover the image best, salient ones first.

    Args:
        alpha: how much attention counts beside coverage; 0: not at all.
        combine: "product" of what a patch covers and its attention, or their "sum".
    """

    alpha: float = 1.0
    combine: str = "product"

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "SCOPE, arXiv 2510.24214"
    summary: ClassVar[str] = "keep the patches that cover the image best, salient ones first"
    signals: ClassVar[frozenset[Signal]] = frozenset({FEATURES, ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha) or self.alpha < 0:
            raise UserError(f"alpha is {self.alpha!r}; expected a number, 0 or more.")
        check_choice("combine", self.combine, ("product", "sum"))
        # The class says what its defaults ask for.
        object.__setattr__(self, "signals", frozenset({FEATURES, self.attention}))

    @property
    def attention(self) -> Signal:
        """The signal that coverage is combined with."""
        return SUMMED if self.combine == "sum" else ATTENTION

    def among(self, group: Group) -> Bool[Array, " P"]:
        similar = cosines(group.signals[FEATURES])  # [P, P]
        salience = group.signals[self.attention] ** self.alpha

        def gain(covered: Float[Array, " P"]) -> Float[Array, " P"]:
            new = jnp.maximum(similar - covered, 0).sum(axis=1)
            return new + salience if self.combine == "sum" else new * salience

        return greedy(
            self.keep,
            group.inside,
            jnp.where(group.inside, 0.0, jnp.inf),  # nobody has to cover what is no picture
            gain,
            update=lambda covered, j: jnp.maximum(covered, similar[j]),
        )
