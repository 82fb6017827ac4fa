"""Chunks of queries of all rows and heads against all keys: few and large products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxprune.ops.attention import limits, parts
from jaxprune.ops.attention.definition import (
    Options,
    attention_weights,
    causal_mask,
    over_heads,
    sum_received,
    weighted_values,
)
from jaxprune.ops.axes import AnyArray, on_mesh


def attention(
    q: Float[AnyArray, "B H Q d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    mask: Bool[AnyArray, "#B Q S"],
) -> Float[Array, "B H Q d"]:
    """Scaled dot-product attention over an explicit mask, grouped-query heads included.

    Args:
        q: queries.
        k: keys; J = H is plain multi-head attention.
        v: values.
        mask: True where a query may see a key. A query with no key at all (a padded slot)
            gets the mean of the values, not NaN.

    Returns:
        In the dtype of `v`; the softmax is float32.
    """
    chunk = functools.partial(_chunk, k=k, v=v)
    B, H, Q, _ = q.shape
    most = _at_once(B, H, k.shape[2])
    if most >= Q:
        return chunk(q, mask)
    return parts.join(_map_chunks(chunk, most, q, mask), Q)


def attend_by_rows(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    asks: Float[Array, "B S n"] | None,
    options: Options,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """`attend_by_chunks` for as many rows at a time as keep the scores small."""
    B, H, S, _ = q.shape
    fewest = -(-B // limits.rows_at_once(H, S))
    number = next(n for n in range(fewest, B + 1) if B % n == 0)  # parts of equal size
    if number == 1:
        return attend_by_chunks(q, k, v, valid, asks, options)
    some = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), (q, k, v, valid, asks))
    attend: Any = functools.partial(attend_by_chunks, options=options)
    out, received = jax.lax.map(lambda rows: attend(*rows), some)
    received = received.swapaxes(0, 1)  # [n, parts, rows, S]
    return out.reshape(q.shape), received.reshape(len(received), B, S)


def attend_by_chunks(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    asks: Float[Array, "B S n"] | None,
    options: Options,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """Attention among slots, and the sums of received attention that queries ask for.

    Args:
        q: queries.
        k: keys.
        v: values.
        valid: slots that are seen.
        asks: float32, the weight of every query in each of n sums; None is n = 0.
        options: who sees whom, and how sums are made.

    Returns:
        The output in the dtype of `v`, and the float32 sums.
    """
    B, S = valid.shape
    mask = causal_mask(valid) if options.causal else valid[:, None] & jnp.ones((S, 1), bool)
    if asks is None:
        return attention(q, k, v, mask), jnp.zeros((0, B, S))
    slots = jnp.broadcast_to(jnp.arange(S), (B, S))
    chunk = functools.partial(_watched_chunk, k=k, v=v, options=options)
    most = _at_once(B, q.shape[1], S)
    if most >= S:
        return chunk(q, mask, asks, slots)
    out, received = _map_chunks(chunk, most, q, mask, asks, slots)  # [parts, ...] each
    return parts.join(out, S), received.sum(0)


def _at_once(rows: int, heads: int, slots: int) -> int:
    """Queries at once; on a mesh every device has some of the rows or heads alone."""
    return limits.QUERY_CHUNK if on_mesh() else limits.queries_at_once(rows, heads, slots)


def _chunk(
    q: Float[AnyArray, "B H Q d"],
    mask: Bool[AnyArray, "#B Q S"],
    *,
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
) -> Float[Array, "B H Q d"]:
    """Some of the queries against all keys."""
    return weighted_values(attention_weights(q, k, mask), v)


def _watched_chunk(
    q: Float[AnyArray, "B H Q d"],
    mask: Bool[AnyArray, "B Q S"],
    asks: Float[Array, "B Q n"],
    slots: Int[Array, "B Q"],
    *,
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    options: Options,
) -> tuple[Float[Array, "B H Q d"], Float[Array, "n B S"]]:
    """The same, and what the keys receive from these queries, which stand at `slots`."""
    weights = attention_weights(q, k, mask)  # [B, J, G, Q, S]
    out = weighted_values(weights, v)
    itself = slots[..., None] == jnp.arange(k.shape[2])  # [B, Q, S]
    reduced = over_heads(weights, options.heads)  # [B, Q, S]
    return out, sum_received(reduced, asks, itself if options.later else None)


def _map_chunks(
    chunk: Callable[..., Any],
    most: int,
    q: Float[AnyArray, "B H Q d"],
    *others: Shaped[AnyArray, "_ Q ..."],
) -> Any:
    """The results of `chunk` for equal parts of the queries, `[parts, ...]` each."""
    number = -(-q.shape[2] // most)
    split = (parts.split(q, 2, number), *(parts.split(x, 1, number) for x in others))
    return jax.lax.map(lambda part: chunk(*part), split)
