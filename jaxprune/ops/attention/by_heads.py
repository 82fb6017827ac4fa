"""Blocks of queries of a few heads of one row: what a core works on fits into its cache.

From the outside in: `attend_by_heads` goes through the rows, `_row` through the stairs of a
row, `_stair` through its blocks of queries, `_block` through the heads, `_few_heads` at a time.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.ops.attention import limits, parts
from jaxprune.ops.attention.definition import LEAST, Options, sum_received
from jaxprune.ops.axes import AnyArray


def heads_at_once(number: int) -> int:
    """As many key/value heads as there are cores, if they divide; a divisor of `number`."""
    cores = min(number, os.cpu_count() or 1)
    return next(n for n in range(cores, 0, -1) if number % n == 0)


def attend_by_heads(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    asks: Float[Array, "B S n"] | None,
    options: Options,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """The same as `attend_by_chunks`, whose arguments these are."""
    B, H, S, d = q.shape
    J = k.shape[1]
    rows = (q.reshape(B, J, H // J, S, d), k, v, valid, asks)
    out, received = jax.lax.map(lambda row: _row(*row, options=options), rows)
    return out.reshape(B, H, S, -1), jnp.moveaxis(received, 0, 1)


def _row(
    q: Float[Array, "J G S d"],
    k: Float[Array, "J S d"],
    v: Float[Array, "J S d"],
    valid: Bool[Array, " S"],
    asks: Float[Array, "S n"] | None,
    *,
    options: Options,
) -> tuple[Float[Array, "J G S d"], Float[Array, "n S"]]:
    """One row, by stairs: equal parts of the queries, each against the keys that it may see."""
    S = valid.shape[0]
    size = -(-S // (limits.BLOCK * limits.STAIRS)) * limits.BLOCK if options.causal else S
    outs, received = [], jnp.zeros((0 if asks is None else asks.shape[-1], S))
    for begin in range(0, S, size):
        end = min(S, begin + size)
        keys = end if options.causal else S
        out, found = _stair(
            q[:, :, begin:end],
            k[:, :keys],
            v[:, :keys],
            valid[:keys],
            None if asks is None else asks[begin:end],
            begin,
            options,
        )
        outs.append(out)
        received = received.at[:, :keys].add(found)
    return jnp.concatenate(outs, axis=2), received


def _stair(
    q: Float[Array, "J G Q d"],
    k: Float[Array, "J S d"],
    v: Float[Array, "J S d"],
    valid: Bool[Array, " S"],
    asks: Float[Array, "Q n"] | None,
    begin: int,
    options: Options,
) -> tuple[Float[Array, "J G Q d"], Float[Array, "n S"]]:
    """The queries of one stair, by blocks; the first of them stands at slot `begin`."""
    J, _, Q, _ = q.shape
    number = -(-Q // (limits.BLOCK if options.causal else limits.FULL_BLOCK))
    queries = parts.split(q, 2, number)  # [parts, J, G, Q / parts, d]
    few = heads_at_once(J)
    k, v = (x.reshape(J // few, few, *x.shape[1:]) for x in (k, v))  # [J / few, few, S, d]
    # A gradient computes the weights anew instead of keeping them.
    block = jax.checkpoint(
        functools.partial(_block, k=k, v=v, valid=valid, begin=begin, options=options)
    )
    asking = None if asks is None else parts.split(asks, 0, number)  # [parts, Q / parts, n]
    blocks = (jnp.arange(number), queries, asking)
    out, received = jax.lax.map(lambda part: block(*part), blocks)
    return parts.join(out, Q), received.sum(0)


def _block(
    index: Int[Array, ""],
    q: Float[Array, "J G Q d"],
    asks: Float[Array, "Q n"] | None,
    *,
    k: Float[Array, "groups few S d"],
    v: Float[Array, "groups few S d"],
    valid: Bool[Array, " S"],
    begin: int,
    options: Options,
) -> tuple[Float[Array, "J G Q d"], Float[Array, "n S"]]:
    """Block number `index` of a stair, by groups of a few heads."""
    J, G, Q, _ = q.shape
    S = valid.shape[0]
    slot = begin + index * Q + jnp.arange(Q)[:, None]  # [Q, 1]
    seen = valid & (slot >= jnp.arange(S)) if options.causal else valid[None]  # [Q or 1, S]
    groups = (q.reshape(*k.shape[:2], *q.shape[1:]), k, v)  # q: [J / few, few, G, Q, d]
    few_heads = functools.partial(_few_heads, seen=seen, heads=options.heads)
    start = None if asks is None else jnp.zeros((Q, S))
    reduced, out = jax.lax.scan(few_heads, start, groups)
    out = out.reshape(J, G, Q, -1)
    if asks is None or reduced is None:
        return out, jnp.zeros((0, S))
    reduced = reduced / (J * G) if options.heads == "mean" else reduced  # [Q, S]
    itself = (slot == jnp.arange(S))[None] if options.later else None  # [1, Q, S]
    return out, sum_received(reduced[None], asks[None], itself)[:, 0]


def _few_heads(
    reduced: Float[Array, "Q S"] | None,
    group: tuple[
        Float[Array, "few G Q d"],
        Float[Array, "few S d"],
        Float[Array, "few S d"],
    ],
    *,
    seen: Bool[Array, "#Q S"],
    heads: str,
) -> tuple[Float[Array, "Q S"] | None, Float[Array, "few G Q d"]]:
    """Attention of a few heads; their weights go into `reduced`, the sum or maximum so far."""
    q, k, v = group
    logits = jnp.einsum("jgqd,jsd->jgqs", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(seen, logits * q.shape[-1] ** -0.5, LEAST)  # [few, G, Q, S]
    # A softmax whose division comes after the product with the values, where there is less.
    most = jax.lax.stop_gradient(logits.max(-1, keepdims=True))  # [few, G, Q, 1]
    grown = jnp.exp(logits - most)  # [few, G, Q, S]
    share = 1 / grown.sum(-1, keepdims=True)  # [few, G, Q, 1]
    out = jnp.einsum("jgqs,jsd->jgqd", grown.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if reduced is not None:  # one head after the other: the weights are read once
        for weights in (grown * share).reshape(-1, *reduced.shape):
            reduced = jnp.maximum(reduced, weights) if heads == "max" else reduced + weights
    return reduced, (out * share).astype(v.dtype)
