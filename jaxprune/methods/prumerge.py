"""PruMerge and PruMerge+: adaptive token reduction by the CLS token's attention.

Paper: LLaVA-PruMerge, arXiv 2403.15388. Per image, with x the N features, k the keys and
s the CLS attention of the tower's last layer read as one head over its full width:

    1.  outliers      s_i > Q3 + 1.5 (Q3 - Q1);  m of them; keep the m largest s
    1+. PruMerge+     keep also the patches 0, stride, 2 stride, ... < N - 1,
                      stride = (N // m) // 3
    2.  merge         x'_i = x_i + sum_j s_j x_j over the 32 tokens whose keys are the most
                      similar to k_i by cosine, kept ones included, i itself excluded
    3.  the rest      one extra token: the sum of s_j x_j over all tokens not kept
    4.  order         outliers by falling s, spatial samples by place, the extra token

Options and what they reproduce:
    keep            a fixed number instead of step 1, as for training; the extra token comes
                    on top. PruMerge+ then takes the ceil(K/2) largest s and a regular grid
                    of floor(K/2) patches, repeats refilled by the next largest s.
    merge           "authors": step 2 as the published code has it (sums, not normalised).
                    "weighted_mean": the paper's text, the mean of x_i and its neighbours
                    weighted by s.
    order           "score": the published code. "raster": kept tokens by their place.

Of an image of several tiles, which the published code does not reduce, every tile is treated
so for itself, and what is kept stands by its place in the picture, followed by the extra
tokens tile by tile. A fixed `keep` ranks the patches of all tiles together; the grid then runs
over the whole picture. Of what a tile keeps, patches in the padding fall away.

Deviations from the published code, where it fails: without any outlier (division by zero)
m is 1; with more than N / 3 of them (a stride of zero) the stride is 1. Neighbours are
min(32, N - 1). The published training path leaves PruMerge+'s repeats in.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import check_choice
from jaxprune.methods.base import Merged, VisionMethod, check_keep, check_keep_fits
from jaxprune.ops.merging import neighbour_weights, weighted_sum
from jaxprune.ops.ranking import descending_order, gather_tokens, quartiles, ranks
from jaxprune.ops.tiles import Chosen, ExtraTokens, Patches
from jaxprune.ops.visual import CLS_ATTENTION, Signal, VisionOutput

KEYS = Signal("keys", heads="joined")
NEIGHBOURS = 32
_CHOICES = {"merge": ("authors", "weighted_mean"), "order": ("score", "raster")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMerge(VisionMethod):
    """Keep the CLS token's outliers and merge the others into them.

    Args:
        keep: patches kept of every image; None lets the outliers decide, tile by tile.
        merge: "authors" or "weighted_mean".
        order: "score" or "raster".
    """

    keep: int | None = None
    merge: str = "authors"
    order: str = "score"

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    summary: ClassVar[str] = "keep what the CLS token looks at, merge the rest into it"
    signals: ClassVar[frozenset[Signal]] = frozenset({CLS_ATTENTION, KEYS})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        for option, allowed in _CHOICES.items():
            check_choice(option, getattr(self, option), allowed)

    @property
    def extra_tokens(self) -> ExtraTokens:
        return ExtraTokens(after=1)

    def check(self, num_patches: int) -> None:
        check_keep_fits(self.keep, num_patches)

    def fixed_count(self, num_patches: int) -> int | None:
        return self.keep

    def choose(self, patches: Patches) -> Chosen:
        s = patches.signals[CLS_ATTENTION]  # [I, T, N]
        if self.keep is None:
            places = jnp.broadcast_to(jnp.arange(s.shape[-1]), s.shape)
            rank, number = self.rank(s, count_outliers(s), places)
        else:  # all tiles as one
            place = patches.place.reshape(len(s), -1)  # [I, T * N]
            inside = jnp.where(place >= 0, s.reshape(place.shape), -jnp.inf)
            rank, number = self.rank(inside, None, place)
            rank = rank.reshape(s.shape)
            number = number[:, None]
        return Chosen(rank < number[..., None], rank if self.order == "score" else None)

    def rank(
        self,
        s: Float[Array, "*tiles N"],
        outliers: Int[Array, "*tiles"] | None,
        place: Int[Array, "*tiles N"],
    ) -> tuple[Int[Array, "*tiles N"], Int[Array, "*tiles"]]:
        """The order in which patches are kept, and how many are.

        Args:
            s: float32.
            outliers: how many there are; None keeps `keep` patches.
            place: 0 1 2 ... over the patches, -1 for what is none.
        """
        if outliers is None:
            assert self.keep is not None
            outliers = jnp.full(s.shape[:-1], self.keep, jnp.int32)
        return ranks(descending_order(s)), outliers

    def merge_tokens(
        self, tiles: VisionOutput, kept: Bool[Array, "F N"], indices: Int[Array, "F K"]
    ) -> Merged:
        x = tiles.features.astype(jnp.float32)  # [F, N, C]
        s, keys = tiles.signals[CLS_ATTENTION], tiles.signals[KEYS]  # [F, N], [F, N, C]
        weights = neighbour_weights(keys, s, indices, min(NEIGHBOURS, x.shape[1] - 1))
        merged = gather_tokens(x, indices)  # [F, K, C]
        if self.merge == "authors":
            merged = merged + weighted_sum(weights, x)
        else:
            own = jnp.take_along_axis(s, indices, axis=1)[..., None]
            total = own + weights.sum(-1, keepdims=True)
            mean = (own * merged + weighted_sum(weights, x)) / jnp.where(total > 0, total, 1.0)
            merged = jnp.where(total > 0, mean, merged)  # no attention at all: nothing to merge
        return Merged(merged, weighted_sum(jnp.where(kept, 0.0, s)[:, None], x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with spatial samples beside the outliers: about four times its tokens."""

    name: ClassVar[str] = "prumerge_plus"
    summary: ClassVar[str] = "PruMerge with evenly spaced patches added"

    def rank(
        self,
        s: Float[Array, "*tiles N"],
        outliers: Int[Array, "*tiles"] | None,
        place: Int[Array, "*tiles N"],
    ) -> tuple[Int[Array, "*tiles N"], Int[Array, "*tiles"]]:
        N = s.shape[-1]
        rank = ranks(descending_order(s))
        if outliers is None:
            assert self.keep is not None
            m = jnp.full(s.shape[:-1], (self.keep + 1) // 2, jnp.int32)
            sampled = self.on_grid(place)
        else:
            m = outliers
            stride = jnp.maximum(1, (N // m) // 3)[..., None]
            sampled = (place % stride == 0) & (place < N - 1)
        # One sorting key: outliers by rank, then samples by place, then the rest by rank.
        outlier = rank < m[..., None]
        key = jnp.where(outlier, rank, jnp.where(sampled, N + place, 2 * N + rank))
        number = jnp.sum(outlier | sampled, axis=-1, dtype=jnp.int32)
        if self.keep is not None:
            number = jnp.full(s.shape[:-1], self.keep, jnp.int32)
        return ranks(jnp.argsort(key, axis=-1)), number

    def on_grid(self, place: Int[Array, "I P"]) -> Bool[Array, "I P"]:
        """The floor(keep / 2) patches of a regular grid."""
        assert self.keep is not None
        half = self.keep // 2
        patches = jnp.sum(place >= 0, axis=-1, keepdims=True)  # [I, 1]
        grid = (2 * jnp.arange(half) + 1) * patches // max(2 * half, 1)  # [I, half]
        rows = jnp.arange(len(place))[:, None]
        at_place = jnp.zeros(place.shape, bool).at[rows, grid].set(True)
        return jnp.take_along_axis(at_place, jnp.maximum(place, 0), axis=-1) & (place >= 0)


def count_outliers(s: Float[Array, "*tiles N"]) -> Int[Array, "*tiles"]:
    """How many scores exceed Q3 + 1.5 (Q3 - Q1), at least 1."""
    q1, q3 = quartiles(s)
    above = s > (q3 + 1.5 * (q3 - q1))[..., None]
    return jnp.maximum(1, above.sum(-1, dtype=jnp.int32))
