"""Masked multi-head attention that never holds the whole attention matrix."""

import jax
import jax.numpy as jnp

QUERY_CHUNK = 512
"""Queries handled at once: scratch memory is B * H * QUERY_CHUNK * S, not B * H * S * S."""


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention over an explicit mask, grouped-query heads included.

    Args:
        q: queries `[B, H, T, d]`.
        k: keys `[B, H / G, S, d]`; G = 1 is plain multi-head attention.
        v: values, as `k`.
        mask: bool `[B or 1, T, S]`, True where query t may look at key s. A query with
            no key at all (a padded slot) gets the mean of the values, not NaN.

    Returns:
        `[B, H, T, d]` in the dtype of `v`; the softmax is float32.
    """
    T = q.shape[2]
    if T <= QUERY_CHUNK:
        return _attend(q, k, v, mask)

    # Queries in equal chunks, the last one padded: [chunks, B, H, t, d] and [chunks, B, t, S].
    chunks = -(-T // QUERY_CHUNK)
    t = -(-T // chunks)
    pad = chunks * t - T
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, pad), (0, 0)))
    q = jnp.moveaxis(q.reshape(*q.shape[:2], chunks, t, q.shape[-1]), 2, 0)
    mask = jnp.moveaxis(mask.reshape(mask.shape[0], chunks, t, mask.shape[-1]), 1, 0)
    out = jax.lax.map(lambda qm: _attend(qm[0], k, v, qm[1]), (q, mask))
    out = jnp.moveaxis(out, 0, 2)  # [B, H, chunks, t, d]
    return out.reshape(*out.shape[:2], chunks * t, out.shape[-1])[:, :, :T]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    B, H, T, d = q.shape
    grouped = q.reshape(B, k.shape[1], H // k.shape[1], T, d)  # [B, H/G, G, T, d]
    logits = jnp.einsum("bkgtd,bksd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * d**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksd->bkgtd", weights, v).reshape(B, H, T, v.shape[-1])


def causal_mask(valid: jax.Array) -> jax.Array:
    """Each slot sees the valid slots up to itself: bool `[B, S]` -> bool `[B, S, S]`."""
    S = valid.shape[-1]
    return jnp.tril(jnp.ones((S, S), bool))[None] & valid[:, None, :]
