"""Weighted sums of similar tokens."""

import jax
import jax.numpy as jnp

from jaxprune.ops.ranking import gather_tokens

_EXACT = jax.lax.Precision.HIGHEST  # a rounded similarity would change who is a neighbour


def neighbour_weights(
    keys: jax.Array, scores: jax.Array, kept: jax.Array, neighbours: int
) -> jax.Array:
    """For each kept token, the scores of its nearest tokens, all others zero.

    Nearest means the largest cosine similarity of keys; the token itself does not count,
    other kept ones do.

    Args:
        keys: `[I, N, C]`.
        scores: float32 `[I, N]`.
        kept: int32 `[I, K]`.
        neighbours: how many, fewer than N.

    Returns:
        float32 `[I, K, N]`.
    """
    keys = keys.astype(jnp.float32)
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    similarity = jnp.einsum("ikc,inc->ikn", gather_tokens(unit, kept), unit, precision=_EXACT)
    itself = jnp.arange(keys.shape[1]) == kept[..., None]
    similarity = jnp.where(itself, -jnp.inf, similarity)
    nearest = jax.lax.top_k(similarity, neighbours)[1]  # [I, K, neighbours]
    weights = jnp.take_along_axis(scores[:, None], nearest, axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(similarity), nearest, weights, axis=-1, inplace=False)


def weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """`[I, K, N]` times `[I, N, C]` -> float32 `[I, K, C]`."""
    return jnp.einsum("ikn,inc->ikc", weights, x.astype(jnp.float32), precision=_EXACT)
