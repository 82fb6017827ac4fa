"""VisPruner: half what the CLS token attends to, half what is left without near-duplicates.

Paper: VisPruner, arXiv 2412.01818. With x the tower's features, a the CLS query's attention in
the layer that makes them (mean over heads), T = `keep` and rho = `important`:

    1.  important   the floor(rho T) patches with the largest a stay
    2.  the rest    a list, by falling a; until T - floor(rho T) are left of it, again and again:
          split     A, the places 0 2 4 ... of the list, and B, the places 1 3 5 ...
          compare   s_i = max_{j in B} cos(x_i, x_j) for i in A
          drop      the r members of A with the largest s, r = min(8, how many are too many, |A|)
          list      what is left of A by falling s, then B as it was

Both parts stay in raster order; nothing is merged. rho is 0.5 for 128 of 576 in the paper, 0.75
in the authors' example for 64; 1 is FasterVLM, 0 is removing duplicates alone.

Deviations: where the list is odd the published code stops with an error or leaves one token too
few; here A has the one more, and r is at most |A|. By default a number is kept of all tiles
together; the published code keeps one of every tile, which is `budget="tile"`. Towers without a
CLS token give the attention that patches receive.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import check_share
from jaxprune.methods.counted import Counted, Group
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.ops.greedy import cosines
from jaxprune.ops.ranking import best, descending_order
from jaxprune.ops.visual import FEATURES, Signal

DROPPED_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisPruner(Counted):
    """Keep what the CLS token attends to, and of the rest what has no near-duplicate.

    Args:
        important: the share of the kept patches that attention chooses.
    """

    important: float = 0.5

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "VisPruner, arXiv 2412.01818"
    summary: ClassVar[str] = "keep what the CLS token attends to, no near-duplicates of the rest"
    signals: ClassVar[frozenset[Signal]] = frozenset({FEATURES, ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("important", self.important, zero=True)

    def among(self, group: Group) -> Bool[Array, " P"]:
        a, inside = group.signals[ATTENTION], group.inside
        important = int(self.keep * self.important)
        kept = best(a, inside, important)
        if important == self.keep:
            return kept
        order = descending_order(jnp.where(inside, a, -jnp.inf))
        rest, length = without_duplicates(
            jnp.roll(order, -important),
            jnp.maximum(group.number - important, 0),
            self.keep - important,
            cosines(group.signals[FEATURES]),
        )
        return kept.at[rest].max(jnp.arange(len(rest)) < length)


def without_duplicates(
    order: Int[Array, " P"], length: Int[Array, ""], keep: int, similar: Float[Array, "P P"]
) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """A list of patches with what is most like others dropped, until `keep` are left.

    Args:
        order: the list, and after it whatever is not on it.
        length: of the list.
        keep: 1 or more.
        similar: cosines of all patches.

    Returns:
        The same of the shorter list.
    """
    place = jnp.arange(len(order))

    def too_long(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return state[1] > keep

    def shorter(state: tuple[Array, Array]) -> tuple[Array, Array]:
        order, length = state
        on_list, even = place < length, place % 2 == 0
        in_b = jnp.zeros(len(order), bool).at[order].set(on_list & ~even)
        s = jnp.max(jnp.where(in_b, similar, -jnp.inf), axis=1)[order]
        # A by falling s, B as it was, the others; the sort is stable.
        part = jnp.where(on_list, place % 2, 2)
        order = order[jnp.lexsort((jnp.where(even, -s, place), part))]
        dropped = jnp.minimum(DROPPED_AT_ONCE, jnp.minimum(length - keep, (length + 1) // 2))
        return jnp.roll(order, -dropped), length - dropped

    shortened: tuple[Array, Array] = jax.lax.while_loop(too_long, shorter, (order, length))
    return shortened
