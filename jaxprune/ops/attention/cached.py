"""One new token a row against a cache of keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.ops.attention.definition import LEAST
from jaxprune.ops.axes import AnyArray


def cached_attention(
    q: Float[AnyArray, "B H 1 d"],
    k: Float[AnyArray, "*BJ S d"],
    v: Float[AnyArray, "*BJ S d"],
    valid: Bool[AnyArray, "B S"],
) -> Float[Array, "B H 1 d"]:
    """One query a row against a cache, whose rows and key/value heads may be one axis.

    Args:
        q: queries.
        k: keys, `[B * J, S, d]` or `[B, J, S, d]`.
        v: values, as `k`.
        valid: slots of the cache that are seen.

    Returns:
        In the dtype of `v`; the softmax is float32.
    """
    B, H, _, d = q.shape
    *rows, S, _ = k.shape
    grouped = q.reshape(*rows, -1, d)  # [..., G, d]
    logits = jnp.einsum("...gd,...sd->...gs", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(valid[:, None], logits.reshape(B, H, S) * d**-0.5, LEAST)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)  # [B, H, S]
    out = jnp.einsum("...gs,...sd->...gd", weights.reshape(*rows, -1, S), v)
    return out.reshape(B, H, 1, -1)
