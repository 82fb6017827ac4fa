"""Weighted sums of similar tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.ops.axes import AnyArray
from jaxprune.ops.ranking import gather_tokens

_EXACT = jax.lax.Precision.HIGHEST  # a rounded similarity would change who is a neighbour


def neighbour_weights(
    keys: Float[AnyArray, "F N C"],
    scores: Float[AnyArray, "F N"],
    kept: Int[AnyArray, "F K"],
    neighbours: int,
) -> Float[Array, "F K N"]:
    """For each kept token, the scores of its nearest tokens, all others zero.

    Nearest means the largest cosine similarity of keys; the token itself does not count,
    other kept ones do.

    Args:
        keys: what similarity is measured on.
        scores: float32, one a patch.
        kept: indices of the kept patches.
        neighbours: how many, fewer than N.

    Returns:
        float32.
    """
    keys = keys.astype(jnp.float32)
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    similarity = jnp.einsum("fkc,fnc->fkn", gather_tokens(unit, kept), unit, precision=_EXACT)
    itself = jnp.arange(keys.shape[1]) == kept[..., None]
    similarity = jnp.where(itself, -jnp.inf, similarity)
    nearest = jax.lax.top_k(similarity, neighbours)[1]  # [F, K, neighbours]
    weights = jnp.take_along_axis(scores[:, None], nearest, axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(similarity), nearest, weights, axis=-1, inplace=False)


def weighted_sum(
    weights: Float[AnyArray, "F K N"], x: Float[AnyArray, "F N C"]
) -> Float[Array, "F K C"]:
    """For each of K rows of weights, the weighted sum of a tile's tokens, float32."""
    return jnp.einsum("fkn,fnc->fkc", weights, x.astype(jnp.float32), precision=_EXACT)
