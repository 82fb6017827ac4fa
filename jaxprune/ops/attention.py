"""Masked multi-head attention that never holds the whole attention matrix.

`attention` alone, or with what pruning reads from it: how much attention every key received
from some of the queries.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERY_CHUNK = 512
"""Queries handled at once: scratch memory is B * H * QUERY_CHUNK * S, not B * H * S * S."""


class Watch(NamedTuple):
    """Which attention weights are summed up: a key's sum over queries, heads reduced first.

    Attributes:
        queries: float32 `[n, B, T]`, the weight of every query in each of n sums.
        heads: "mean" or "max" over the heads of a weight, before queries are summed.
        later: leave out what a token gives to itself, and divide a key's sum by the
            weight of the queries behind it.
        rows: at most so many queries of a row have any weight, so only these are looked
            at; None looks at all, inside the attention itself.
    """

    queries: jax.Array
    heads: str
    later: bool = False
    rows: int | None = None


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
    chunked = functools.partial(_chunk, k=k, v=v)
    return _over_chunks(chunked, q, mask)


def watched_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, watch: Watch
) -> tuple[jax.Array, jax.Array]:
    """`attention` of as many queries as keys, and the sums that `watch` asks for.

    Returns:
        The output `[B, H, T, d]`, and float32 `[n, B, S]`.
    """
    B, T = watch.queries.shape[1:]
    slots = jnp.broadcast_to(jnp.arange(T), (B, T))
    weights = jnp.moveaxis(watch.queries, 0, -1)  # [B, T, n]
    if watch.rows is None:

        def both(q: jax.Array, mask: jax.Array, weights: jax.Array, slots: jax.Array) -> tuple:
            attended = _weights(q, k, mask)
            out = jnp.einsum("bkgts,bksd->bkgtd", attended.astype(v.dtype), v)
            received = _received(attended, weights, slots, watch)
            return out.reshape(*q.shape[:3], v.shape[-1]), received

        out, received = _over_chunks(both, q, mask, weights, slots, summed=1)
    else:
        out = attention(q, k, v, mask)
        asked = jnp.any(weights > 0, axis=-1)
        # Slots are distinct, so the queries in use come first; the others have no weight.
        chosen = jax.lax.top_k(jnp.where(asked, slots + 1, 0), min(watch.rows, T))[1]  # [B, R]
        rows = jnp.take_along_axis(q, chosen[:, None, :, None], axis=2)
        seen = jnp.broadcast_to(mask, (B, *mask.shape[1:]))
        attended = _weights(rows, k, jnp.take_along_axis(seen, chosen[..., None], axis=1))
        some = jnp.take_along_axis(weights, chosen[..., None], axis=1)
        received = _received(attended, some, chosen, watch)
    if watch.later:
        behind = watch.queries.sum(-1, keepdims=True) - jnp.cumsum(watch.queries, axis=-1)
        received = received / jnp.maximum(behind, 1.0)
    return out, received


def _over_chunks(function, q, mask, *others, summed=None):  # type: ignore[no-untyped-def]
    """`function(q, mask, *others)` over chunks of the queries.

    q is `[B, H, T, ...]`, all others `[B or 1, T, ...]`. The result has `[B, H, T, d]`, or is
    a tuple whose entry number `summed` is added up over the chunks.
    """
    T = q.shape[2]
    if T <= QUERY_CHUNK:
        return function(q, mask, *others)
    chunks = -(-T // QUERY_CHUNK)
    t = -(-T // chunks)

    def split(x: jax.Array, axis: int) -> jax.Array:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, chunks * t - T)  # equal chunks, the last one padded
        x = jnp.pad(x, width)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, t, *x.shape[axis + 1 :]), axis, 0)

    def join(out: jax.Array) -> jax.Array:
        out = jnp.moveaxis(out, 0, 2)  # [B, H, chunks, t, d]
        return out.reshape(*out.shape[:2], chunks * t, out.shape[-1])[:, :, :T]

    parts = (split(q, 2), split(mask, 1), *(split(x, 1) for x in others))
    results = jax.lax.map(lambda part: function(*part), parts)
    if summed is None:
        return join(results)
    return join(results[0]), results[summed].sum(0)


def _chunk(q: jax.Array, mask: jax.Array, *, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = _weights(q, k, mask).astype(v.dtype)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v)
    return out.reshape(*q.shape[:3], v.shape[-1])


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmaxed attention, float32 `[B, H / G, G, T, S]`."""
    B, H, T, d = q.shape
    grouped = q.reshape(B, k.shape[1], H // k.shape[1], T, d)
    logits = jnp.einsum("bkgtd,bksd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * d**-0.5, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def _received(attended: jax.Array, weights: jax.Array, slots: jax.Array, watch: Watch) -> jax.Array:
    """Sums over the queries at `slots` `[B, t]` with `weights` `[B, t, n]`: `[n, B, S]`."""
    # [B, H / G, G, t, S] -> [B, t, S]
    by_query = attended.mean((1, 2)) if watch.heads == "mean" else attended.max((1, 2))
    if watch.later:
        itself = slots[..., None] == jnp.arange(by_query.shape[-1])
        by_query = jnp.where(itself, 0.0, by_query)
    exact = jax.lax.Precision.HIGHEST  # a rounded sum would change who is dropped
    return jnp.einsum("btn,bts->nbs", weights, by_query, precision=exact)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Each slot sees the valid slots up to itself: bool `[B, S]` -> bool `[B, S, S]`."""
    S = valid.shape[-1]
    return jnp.tril(jnp.ones((S, S), bool))[None] & valid[:, None, :]
