"""HiPrune: objects by a middle layer's attention, the whole by a deep one's (arXiv 2508.00553).

With g^l the attention that a patch receives in layer l of the tower, the mean over heads and
over all queries, CLS's included, and K = `keep`:

    1.  anchors     the A patches with the largest g^layer,  A = round(alpha K / 5)
    2.  buffers     the four beside each anchor
    3.  registers   of the others those with the largest g^deep, until K are kept; deep is the
                    layer that makes the features

They stay in raster order; nothing is merged. As published, halves are rounded to even, and
patches are beside each other that follow each other in the tile, read row by row, or are a row
apart: beside the last patch of a row is the first of the next, and where a tile ends the patch
nearest to the end stands in for the one that there is not.

alpha = 0.1 is published, and layer 8, from 0, for LLaVA's tower of 24 layers; for towers of 32 the
authors take 15. It is not scaled to other depths: a tower without such a layer is refused.

Deviations: a tile has its own grid, where the published code has 24 x 24 alone. A is at most
floor(K / 5), since more anchors and their buffers would be more than K. By default a number is
kept of all tiles together; the published code divides it among the tiles, which is
`budget="tile"`. What is outside the picture is no buffer.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune.errors import UserError, check_layer, check_share
from jaxprune.methods.counted import Counted, Group
from jaxprune.ops.ranking import best
from jaxprune.ops.visual import FEATURE, Signal


def received(layer: int | Literal["feature"]) -> Signal:
    """The attention that patches receive in a layer."""
    return Signal("received_attention", layer=layer)


DEEP = received(FEATURE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiPrune(Counted):
    """Keep what a middle layer attends to, what is beside it, and what a deep one attends to.

    Args:
        alpha: about the share of the kept patches that are anchors or beside one.
        layer: the tower's layer that chooses the anchors, from 0.
    """

    alpha: float = 0.1
    layer: int = 8

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune, arXiv 2508.00553"
    summary: ClassVar[str] = "keep what middle and deep layers of the tower attend to"
    signals: ClassVar[frozenset[Signal]] = frozenset({received(8), DEEP})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha, zero=True)
        check_layer("layer", self.layer, first=0)
        # The class says what its defaults ask for.
        object.__setattr__(self, "signals", frozenset({received(self.layer), DEEP}))

    def among(self, group: Group) -> Bool[Array, " P"]:
        number = min(round(self.keep * self.alpha / 5), self.keep // 5)
        anchors = best(group.signals[received(self.layer)], group.inside, number)
        objects = (anchors | beside(anchors, group.tile_patches)) & group.inside
        registers = best(group.signals[DEEP], group.inside & ~objects, self.keep - jnp.sum(objects))
        return objects | registers


def beside(chosen: Bool[Array, " P"], tile_patches: int) -> Bool[Array, " P"]:
    """What is beside those that are chosen, in tiles that follow each other."""
    side = math.isqrt(tile_patches)
    if side**2 != tile_patches:
        raise UserError(f"hiprune needs square tiles; the model's have {tile_patches} patches.")
    patch = np.arange(len(chosen))[:, None]
    first = patch - patch % tile_patches
    steps = np.array([-1, 1, -side, side])
    near = np.clip(patch + steps, first, first + tile_patches - 1)  # [P, 4]
    return jnp.zeros_like(chosen).at[near].max(chosen[:, None])
