"""Orders, quartiles and gathers over tokens; ties always keep the lower index."""

import math

import jax
import jax.numpy as jnp


def descending_order(scores: jax.Array) -> jax.Array:
    """Indices from the largest score to the smallest: `[..., N]` -> int32 `[..., N]`."""
    return jax.lax.top_k(scores, scores.shape[-1])[1]


def ranks(order: jax.Array) -> jax.Array:
    """The place of every index in an order: the inverse permutation, int32 `[..., N]`."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def nonzero_first(mask: jax.Array, size: int) -> jax.Array:
    """Where a mask is True, ascending, then where it is not: bool `[..., N]` -> `[..., size]`."""
    return descending_order(mask.astype(jnp.float32))[..., :size]  # ties keep their order


def quartiles(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and third quartile by linear interpolation, float32 `[..., N]` -> two `[...]`."""
    ordered = jnp.sort(scores.astype(jnp.float32), axis=-1)

    def at(share: float) -> jax.Array:
        place = share * (scores.shape[-1] - 1)
        low, high = math.floor(place), math.ceil(place)
        a, b = ordered[..., low], ordered[..., high]
        t = place - low
        # Interpolated from the nearer end, as NumPy does.
        return a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)

    return at(0.25), at(0.75)


def gather_tokens(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of `x` `[I, N, C]` at `indices` `[I, K]` -> `[I, K, C]`; out of range gives NaN."""
    return jnp.take_along_axis(x, indices[..., None], axis=1)
