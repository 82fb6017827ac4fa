"""DivPrune: the subset whose members are the farthest apart (arXiv 2503.02175).

With x the visual tokens as the projector gives them and d_ij = 1 - cos(x_i, x_j):

    1.  the first is the one whose nearest other is the farthest:  argmax_i min_{j != i} d_ij
    2.  then, `keep` in all, the one farthest from those chosen:   argmax_i min_{s in S} d_is

They stay in raster order; nothing is merged, and neither attention nor text is looked at. The
paper keeps 9.8 % (56 of 576) of an image and 10 % of a video.

On images of several tiles all of an image's patches are one set, as in the published code;
newlines are no candidates here, but leave with their rows. Deviation: whoever is chosen is not
again. The published code leaves it a candidate at distance 0, so that among exact duplicates a
token may come twice.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxprune.methods.counted import Counted, Group
from jaxprune.ops.greedy import cosines, greedy
from jaxprune.ops.visual import PROJECTED, Signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivPrune(Counted):
    """Keep the patches that are the farthest apart."""

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    summary: ClassVar[str] = "keep the patches that differ the most from each other"
    signals: ClassVar[frozenset[Signal]] = frozenset({PROJECTED})

    def among(self, group: Group) -> Bool[Array, " P"]:
        distance = 1 - cosines(group.signals[PROJECTED])  # [P, P]
        others = group.inside & ~jnp.eye(len(distance), dtype=bool)
        nearest = jnp.min(jnp.where(others, distance, jnp.inf), axis=1)  # [P]
        first = jnp.argmax(jnp.where(group.inside, nearest, -jnp.inf))
        chosen = (jnp.arange(len(nearest)) == first) & group.inside
        return chosen | greedy(
            self.keep - 1,
            group.inside & ~chosen,
            distance[first],
            gain=lambda to_chosen: to_chosen,
            update=lambda to_chosen, j: jnp.minimum(to_chosen, distance[j]),
        )
