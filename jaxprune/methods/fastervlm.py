"""FasterVLM: the patches that the CLS token attends to (arXiv 2412.01818v1).

With a the CLS query's attention in the tower's layer that makes the features, softmaxed over CLS
and patches, mean over heads: the `keep` patches with the largest a stay, in raster order;
nothing is merged. The paper keeps 144, 58 and 29 of 576.

`budget="tile"` keeps as many of every tile, as the published code does on LLaVA-NeXT, there
with a grid of 2 x 2 tiles and without newlines. By default all tiles of an image are ranked
together. Towers without a CLS token give the attention that patches receive.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Bool

from jaxprune.methods.counted import Counted, Group
from jaxprune.ops.ranking import best
from jaxprune.ops.visual import FEATURE, Signal

ATTENTION = Signal("cls_attention", layer=FEATURE)
"""Attention of the CLS token where the features are made, mean over heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterVLM(Counted):
    """Keep what the CLS token attends to."""

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818v1"
    summary: ClassVar[str] = "keep what the CLS token attends to, at the features' own layer"
    signals: ClassVar[frozenset[Signal]] = frozenset({ATTENTION})

    def among(self, group: Group) -> Bool[Array, " P"]:
        return best(group.signals[ATTENTION], group.inside, self.keep)
