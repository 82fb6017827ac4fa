"""DART: keep a few pivots and what resembles them least.

Paper: arXiv 2502.11494; the authors' LLaVA file, and its port in LightCompress at 9701d03.

Once, before layer `layer`, of n visual tokens; with k the rotated keys of the layer before, all
heads side by side, and z the hidden states that enter the layer, under the decoder's last norm:

    1. pivots      the 4 visual tokens and the 4 tokens of text after the image with the largest
                   |k|_1; of fewer than 4, all
    2. quota       q = floor(min(T, n - 4) / 8)
    3. each pivot  in turn takes the q visual tokens, of those that are neither pivots nor taken,
                   whose z has the smallest cosine with the pivot's
    4. keep        the visual pivots and all that is taken: 4 + 8 q tokens, at their positions

So `tokens` of 192, 128 and 64 keep 196, 132 and 68. It is a number of tokens, whatever the
image has.

Deviations from the published code: the pivots come in a fixed order, visual ones by falling
norm and then those of the text, where there it is the order of Python's sets; who comes first
takes first. The quota is the one above for every model. With fewer than 8 pivots they share the
8 q tokens, and the last ones take what cannot be shared equally. Up to 4 visual tokens all stay.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import check_layer, check_whole
from jaxprune.methods.base import DecoderMethod, check_depth, removed_before
from jaxprune.ops.attention.definition import EXACT
from jaxprune.ops.cuts import LAST, QUESTION, Depth, LayerView, keep_best
from jaxprune.ops.ranking import descending_order, gather_tokens

PIVOTS = 4
"""Of each sort: visual tokens, and text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dart(DecoderMethod):
    """Keep pivots and the visual tokens that resemble them least.

    Args:
        tokens: T, about how many visual tokens to keep.
        layer: the first layer that gets only these.
    """

    tokens: int = 128
    layer: int = 2

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "DART, arXiv 2502.11494"
    summary: ClassVar[str] = "keep a few pivots and the visual tokens least like them"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("tokens", self.tokens, what="a number of visual tokens")
        check_layer("layer", self.layer)

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        check_depth("layer", self.layer, depth)
        quota = max(0, min(self.tokens, num_tokens - PIVOTS)) // (2 * PIVOTS)
        left = min(num_tokens, PIVOTS + 2 * PIVOTS * quota)
        return removed_before((self.layer,), (left,), num_tokens, depth)

    def keep(
        self, view: LayerView, candidates: Bool[Array, "B S"], count: Int[Array, " B"]
    ) -> Bool[Array, "B S"]:
        if view.layer != self.layer - 1:
            return candidates
        tokens, norms = view.tokens, jnp.sum(jnp.abs(view.k.astype(jnp.float32)), axis=(1, 3))
        text = ((tokens.kind == QUESTION) | (tokens.kind == LAST)) & tokens.valid
        visual, of_text = largest(norms, candidates), largest(norms, text)
        rows = jnp.arange(len(norms))[:, None]
        kept = jnp.zeros(norms.shape, bool).at[rows, visual.slots].max(visual.used)
        pivots = Pivots(*(jnp.concatenate(x, axis=1) for x in zip(visual, of_text, strict=True)))
        similar = cosines(view.normed, pivots.slots)
        left = count - kept.sum(axis=1)
        return kept | taken(similar, pivots.used, candidates & ~kept, left)


class Pivots(NamedTuple):
    """Tokens to compare with: their slots, and whether there is one at all."""

    slots: Int[Array, "B K"]
    used: Bool[Array, "B K"]


def largest(norms: Float[Array, "B S"], among: Bool[Array, "B S"]) -> Pivots:
    """The tokens with the largest norms, by falling norm."""
    slots = descending_order(jnp.where(among, norms, -jnp.inf))[:, :PIVOTS]
    return Pivots(slots, jnp.take_along_axis(among, slots, axis=1))


def cosines(z: Float[Array, "B S D"], slots: Int[Array, "B K"]) -> Float[Array, "B K S"]:
    """How much each token is like those of some slots, float32."""
    z = z.astype(jnp.float32)
    unit = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    return jnp.einsum("bkd,bsd->bks", gather_tokens(unit, slots), unit, precision=EXACT)


def taken(
    similar: Float[Array, "B K S"],
    used: Bool[Array, "B K"],
    free: Bool[Array, "B S"],
    number: Int[Array, " B"],
) -> Bool[Array, "B S"]:
    """What the pivots take in turn, each an equal share and the least similar to itself.

    Args:
        similar: to each pivot.
        used: pivots that there are.
        free: what can be taken.
        number: what is taken in all.
    """

    def take(left: tuple[Array, Array], pivot: tuple[Array, ...]) -> tuple[Any, None]:
        (free, number), (similar, used, waiting) = left, pivot
        quota = jnp.where(used, number // jnp.maximum(waiting, 1), 0)
        own = keep_best(-similar, free, quota) & free
        return (free & ~own, number - quota), None

    waiting = jnp.cumsum(used[:, ::-1], axis=1)[:, ::-1]  # pivots from this one on
    turns = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (similar, used, waiting))
    (rest, _), _ = jax.lax.scan(take, (free, number), turns)
    return free & ~rest
