"""HoloV: attention shared out over the crops of an image (arXiv 2510.02912).

With x the visual tokens as the projector gives them and a the CLS query's attention in the layer
that makes them, mean over heads, a' = 1000 a. The picture is cut into `num_crops`. In each of them,
with n tokens, S_ij = cos(x_i, x_j) and S_ii = 0:

    1.  variance    mu_i = sum_j S_ij / (n - 1),   v_i = sum_j (S_ij - mu_i)^2 / (n - 1),
                    j = i included
    2.  scores      t_i = a'_i + alpha g v_i,   g = mean a' / (mean v + 1e-6);
                    the crop's is the mean of t
    3.  quotas      with w a crop's part of all scores, floor(w keep), and what is left over one
                    each to the crops with the largest w
    4.  in a crop   the tokens with the largest a, as many as its quota says

Nothing is merged. alpha = 0.09, 16 crops, and 64 tokens are in the published code.

In step 2 alpha has no effect. g v has the mean of a', so that a crop's score is (1 + alpha) times
its mean a', and 1 + alpha cancels in w: what is kept are the crops' parts of the attention, and in
a crop the largest a. Only a crop of one token, whose score the code leaves at a, differs.

Options and what they reproduce:
    crops       "runs": the published code, which cuts the sequence of tokens into runs of equal
                length, of 576 one and a half rows each; the first ones are longer by one where
                that does not come out even. "windows": the paper's text, squares of every tile.
    tokens      "attention": step 4 as published. "score": by t, the only place where alpha counts.

Deviations from the published code: a quota larger than its crop is cut to it, and what that leaves
goes one each to the crops that have room, by falling w, as often as it takes. There the surplus is
lost, and vectors of zeros stand at the end for what is missing; accuracy falls at large `keep`.
What is kept stands in raster order; there it does by falling a within a crop that is not kept
whole. `budget="tile"` cuts and counts every tile for itself; the published code has one set of
all tiles, without padding and newlines, as is the default here.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import UserError, check_choice, check_whole, is_number
from jaxprune.methods.counted import Counted, Group
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.ops.greedy import cosines
from jaxprune.ops.ranking import best, hand_out
from jaxprune.ops.visual import PROJECTED, Signal

_CHOICES = {"crops": ("runs", "windows"), "tokens": ("attention", "score")}
_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoloV(Counted):
    """Keep what CLS attends to, crop by crop.

    Args:
        crops: "runs" or "windows".
        num_crops: how many there are, of windows in every tile and a square number.
        tokens: what ranks the tokens of a crop, "attention" or "score".
        alpha: how much variance counts in the score.
    """

    crops: str = "runs"
    num_crops: int = 16
    tokens: str = "attention"
    alpha: float = 0.09

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, arXiv 2510.02912"
    summary: ClassVar[str] = "keep what CLS attends to, shared out over the crops of an image"
    signals: ClassVar[frozenset[Signal]] = frozenset({ATTENTION, PROJECTED})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in _CHOICES.items():
            check_choice(option, getattr(self, option), allowed)
        check_whole("num_crops", self.num_crops)
        if self.crops == "windows" and math.isqrt(self.num_crops) ** 2 != self.num_crops:
            raise UserError(f"num_crops is {self.num_crops}; expected a square number of windows.")
        if not is_number(self.alpha) or self.alpha < 0:
            raise UserError(f"alpha is {self.alpha!r}; expected a number, 0 or more.")

    def among(self, group: Group) -> Bool[Array, " P"]:
        a, crop = group.signals[ATTENTION], self.crop(group)
        crops = self.num_crops * (len(a) // group.tile_patches if self.crops == "windows" else 1)
        members = (crop == jnp.arange(crops)[:, None]) & group.inside  # [crops, P]
        sizes = jnp.sum(members, axis=1, dtype=jnp.int32)
        same = (crop == crop[:, None]) & group.inside & group.inside[:, None]
        t = self.scores(a, cosines(group.signals[PROJECTED]), same, sizes[crop])
        means = jnp.sum(jnp.where(members, t, 0), axis=1) / jnp.maximum(sizes, 1)
        quotas = share_out(self.keep, means, sizes)
        ranked = a if self.tokens == "attention" else t
        earlier = jnp.tri(len(a), k=-1, dtype=bool)  # [P, P]: j stands before i
        before = (ranked > ranked[:, None]) | ((ranked == ranked[:, None]) & earlier)
        return group.inside & (jnp.sum(same & before, axis=1) < quotas[crop])

    def crop(self, group: Group) -> Int[Array, " P"]:
        """The number of the crop that a patch is in."""
        if self.crops == "runs":
            short, longer = jnp.divmod(group.number, self.num_crops)
            place, border = jnp.maximum(group.place, 0), longer * (short + 1)
            after = longer + (place - border) // jnp.maximum(short, 1)
            return jnp.where(place < border, place // (short + 1), after)
        side, along = math.isqrt(group.tile_patches), math.isqrt(self.num_crops)
        if side**2 != group.tile_patches:
            raise UserError(
                f"Windows need square tiles, but those of the model have {group.tile_patches} "
                "patches; take crops='runs'."
            )
        tile, patch = np.divmod(np.arange(len(group.place)), group.tile_patches)
        row, column = (at * along // side for at in np.divmod(patch, side))
        return jnp.asarray(tile * self.num_crops + row * along + column)

    def scores(
        self,
        a: Float[Array, " P"],
        cosine: Float[Array, "P P"],
        same: Bool[Array, "P P"],
        size: Int[Array, " P"],
    ) -> Float[Array, " P"]:
        """Of every token t; `same` says who is in its crop, and `size` how many."""
        others = jnp.maximum(size - 1, 1)
        S = jnp.where(same & ~jnp.eye(len(a), dtype=bool), cosine, 0)
        mu = jnp.sum(S, axis=1) / others
        v = jnp.sum(jnp.where(same, (S - mu[:, None]) ** 2, 0), axis=1) / others

        def mean(x: Float[Array, " P"]) -> Float[Array, " P"]:
            return jnp.sum(jnp.where(same, x, 0), axis=1) / jnp.maximum(size, 1)

        scaled = 1000 * a
        t = scaled + self.alpha * mean(scaled) / (mean(v) + _EPS) * v
        return jnp.where(size > 1, t, a)


def share_out(
    keep: int, scores: Float[Array, " crops"], sizes: Int[Array, " crops"]
) -> Int[Array, " crops"]:
    """How many tokens each crop keeps: `keep` together, or all where there are fewer."""
    w = scores / (jnp.sum(scores) + _EPS)
    quotas = jnp.floor(w * keep).astype(jnp.int32)
    quotas += best(w, sizes > 0, keep - jnp.sum(quotas))
    quotas = jnp.minimum(quotas, sizes)
    surplus = jnp.minimum(keep, jnp.sum(sizes)) - jnp.sum(quotas)
    return quotas + hand_out(surplus, sizes - quotas, w)
