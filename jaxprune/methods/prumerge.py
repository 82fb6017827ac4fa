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

Deviations from the published code, where it fails: without any outlier (division by zero)
m is 1; with more than N / 3 of them (a stride of zero) the stride is 1. Neighbours are
min(32, N - 1). The published training path leaves PruMerge+'s repeats in.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.errors import UserError
from jaxprune.methods.base import VisionMethod, check_keep, check_keep_fits
from jaxprune.ops.merging import neighbour_weights, weighted_sum
from jaxprune.ops.ranking import descending_order, gather_tokens, quartiles, ranks
from jaxprune.ops.visual import Selection, VisionOutput

NEIGHBOURS = 32
_CHOICES = {"merge": ("authors", "weighted_mean"), "order": ("score", "raster")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMerge(VisionMethod):
    """Keep the CLS token's outliers and merge the others into them.

    Args:
        keep: tokens kept of every image; None lets the outliers decide, image by image.
        merge: "authors" or "weighted_mean".
        order: "score" or "raster".
    """

    keep: int | None = None
    merge: str = "authors"
    order: str = "score"

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    summary: ClassVar[str] = "keep what the CLS token looks at, merge the rest into it"
    signals: ClassVar[frozenset[str]] = frozenset({"cls_attention", "keys"})
    extra_tokens: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for option, allowed in _CHOICES.items():
            value = getattr(self, option)
            if value not in allowed:
                raise UserError(f"{option} is {value!r}; expected one of: {', '.join(allowed)}.")

    def check(self, num_tokens: int) -> None:
        check_keep_fits(self.keep, num_tokens)

    def fixed_count(self, num_tokens: int) -> int | None:
        return None if self.keep is None else self.keep + self.extra_tokens

    def counts(self, vision: VisionOutput) -> jax.Array:
        _, kept = self.rank(vision.signals["cls_attention"])
        return kept + 1

    def select(self, vision: VisionOutput, capacity: int) -> Selection:
        x = vision.features.astype(jnp.float32)  # [I, N, C]
        s, keys = vision.signals["cls_attention"], vision.signals["keys"]  # [I, N], [I, N, C]
        order, kept = self.rank(s)  # [I, N], [I]
        slot = jnp.arange(capacity)[None]  # [1, K]
        is_kept = ranks(order) < kept[:, None]  # [I, N]
        if self.order == "raster":
            # Ties keep the lower index: the kept ones, by place.
            order = descending_order(is_kept.astype(jnp.float32))
        # The extra token needs a slot behind the kept ones, hence one more than N may hold.
        indices = jnp.pad(order, ((0, 0), (0, 1)))[:, :capacity]

        weights = neighbour_weights(keys, s, indices, min(NEIGHBOURS, x.shape[1] - 1))
        merged = gather_tokens(x, indices)
        if self.merge == "authors":
            merged = merged + weighted_sum(weights, x)
        else:
            own = jnp.take_along_axis(s, indices, axis=1)[..., None]
            total = own + weights.sum(-1, keepdims=True)
            mean = (own * merged + weighted_sum(weights, x)) / jnp.where(total > 0, total, 1.0)
            merged = jnp.where(total > 0, mean, merged)  # no attention at all: nothing to merge

        extra = weighted_sum(jnp.where(is_kept, 0.0, s)[:, None], x)  # [I, 1, C]
        tokens = jnp.where((slot == kept[:, None])[..., None], extra, merged)
        return Selection(
            tokens=tokens.astype(vision.features.dtype),
            counts=kept + 1,
            indices=jnp.where(slot < kept[:, None], indices, -1),
        )

    def rank(self, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All tokens, kept ones first in their order, `[I, N]`, and how many are kept, `[I]`."""
        order = descending_order(s)
        if self.keep is not None:
            return order, jnp.full(s.shape[:1], self.keep, jnp.int32)
        return order, count_outliers(s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with spatial samples beside the outliers: about four times its tokens."""

    name: ClassVar[str] = "prumerge_plus"
    summary: ClassVar[str] = "PruMerge with evenly spaced patches added"

    def rank(self, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        N = s.shape[-1]
        place = jnp.arange(N, dtype=jnp.int32)
        rank = ranks(descending_order(s))  # [I, N]
        if self.keep is None:
            m = count_outliers(s)
            stride = jnp.maximum(1, (N // m) // 3)[:, None]
            sampled = (place % stride == 0) & (place < N - 1)  # [I, N]
        else:
            m = jnp.full(s.shape[:1], (self.keep + 1) // 2, jnp.int32)
            half = self.keep // 2
            grid = (2 * jnp.arange(half) + 1) * N // max(2 * half, 1)
            sampled = jnp.zeros(N, bool).at[grid].set(True)[None]
        # One sorting key: outliers by rank, then samples by place, then the rest by rank.
        outlier = rank < m[:, None]
        key = jnp.where(outlier, rank, jnp.where(sampled, N + place, 2 * N + rank))
        order = jnp.argsort(key, axis=-1).astype(jnp.int32)
        if self.keep is not None:
            return order, jnp.full(s.shape[:1], self.keep, jnp.int32)
        return order, jnp.sum(outlier | sampled, axis=-1, dtype=jnp.int32)


def count_outliers(s: jax.Array) -> jax.Array:
    """How many scores exceed Q3 + 1.5 (Q3 - Q1), at least 1: `[I, N]` -> int32 `[I]`."""
    q1, q3 = quartiles(s)
    above = s > (q3 + 1.5 * (q3 - q1))[:, None]
    return jnp.maximum(1, above.sum(-1, dtype=jnp.int32))
