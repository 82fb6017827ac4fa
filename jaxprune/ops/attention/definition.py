"""What attention is: a softmax over a mask, and the sums that pruning reads from its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.ops.axes import AnyArray

LEAST = np.finfo(np.float32).min
"""The logit of a key that a query may not see: finite, so that a query without any gives a mean."""

EXACT = jax.lax.Precision.HIGHEST
"""Of the sums over queries: a rounded sum would change which tokens are dropped."""


class Watch(NamedTuple):
    """Which attention weights are summed up: a key's sum over queries, heads reduced first.

    Attributes:
        queries: float32, the weight of every query in each of n sums.
        heads: "mean" or "max" over the heads of a weight, before queries are summed.
        later: leave out what a token gives to itself, and divide a key's sum by the
            weight of the queries after it.
        rows: at most this many queries of a row have any weight, so only these are looked
            at; None looks at all, inside the attention itself.
        rotated: the weights are those of the attention that is computed; else whoever asks
            computes them apart, of queries and keys that are not rotated.
    """

    queries: Float[AnyArray, "n B S"]
    heads: str
    later: bool = False
    rows: int | None = None
    rotated: bool = True


class Options(NamedTuple):
    """What holds for every part of an attention, known when it is compiled.

    Attributes:
        causal: slots see the slots up to themselves; otherwise all slots.
        heads: as in `Watch`.
        later: as in `Watch`.
        rows: as in `Watch`.
    """

    causal: bool
    heads: str = "mean"
    later: bool = False
    rows: int | None = None


def causal_mask(valid: Bool[AnyArray, "B S"]) -> Bool[Array, "B S S"]:
    """Each slot sees the valid slots up to itself."""
    S = valid.shape[-1]
    return jnp.tril(jnp.ones((S, S), bool))[None] & valid[:, None, :]


def attention_weights(
    q: Float[AnyArray, "B H Q d"], k: Float[AnyArray, "B J S d"], mask: Bool[AnyArray, "#B Q S"]
) -> Float[Array, "B J G Q S"]:
    """Softmaxed attention, float32."""
    B, H, Q, d = q.shape
    grouped = q.reshape(B, k.shape[1], H // k.shape[1], Q, d)  # [B, J, G, Q, d]
    logits = jnp.einsum("bjgqd,bjsd->bjgqs", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * d**-0.5, LEAST)
    return jax.nn.softmax(logits, axis=-1)


def weighted_values(
    weights: Float[Array, "B J G Q S"], v: Float[AnyArray, "B J S d"]
) -> Float[Array, "B H Q d"]:
    """The sums of values that a softmax weights, in the dtype of `v`."""
    B, J, G, Q, _ = weights.shape
    out = jnp.einsum("bjgqs,bjsd->bjgqd", weights.astype(v.dtype), v)
    return out.reshape(B, J * G, Q, v.shape[-1])


def over_heads(weights: Float[Array, "B J G Q S"], heads: str) -> Float[Array, "B Q S"]:
    """The "mean" or "max" over the heads of each weight."""
    return weights.max((1, 2)) if heads == "max" else weights.mean((1, 2))


def sum_received(
    weights: Float[Array, "B Q S"],
    asks: Float[AnyArray, "B Q n"],
    itself: Bool[Array, "B Q S"] | None,
) -> Float[Array, "n B S"]:
    """What every key receives from some queries.

    Args:
        weights: float32, heads reduced.
        asks: float32, the weight of every query in each sum.
        itself: what does not count: the queries' own keys.
    """
    if itself is not None:
        weights = jnp.where(itself, 0.0, weights)
    return jnp.einsum("bqn,bqs->nbs", asks, weights, precision=EXACT)


def asking_slots(
    queries: Float[AnyArray, "n B S"], rows: int
) -> tuple[Int[Array, "B Q"], Float[Array, "B Q n"]]:
    """The slots of at most `rows` queries that have any weight, and their weights in each sum."""
    S = queries.shape[-1]
    asks = jnp.moveaxis(jnp.asarray(queries), 0, -1)  # [B, S, n]
    asking = jnp.any(asks > 0, axis=-1)  # [B, S]
    # Slots are distinct, so the queries in use come first; the others have no weight.
    chosen = jax.lax.top_k(jnp.where(asking, jnp.arange(S) + 1, 0), min(rows, S))[1]  # [B, Q]
    return chosen, jnp.take_along_axis(asks, chosen[..., None], axis=1)


def received_from_few(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    queries: Float[AnyArray, "n B S"],
    options: Options,
) -> Float[Array, "n B S"]:
    """The sums of at most `options.rows` queries of a prompt, whose weights are made anew."""
    assert options.rows is not None
    S = valid.shape[1]
    chosen, some = asking_slots(queries, options.rows)
    few = jnp.take_along_axis(q, chosen[:, None, :, None], axis=2)  # [B, H, Q, d]
    mask = valid[:, None] & (jnp.arange(S) <= chosen[..., None])  # [B, Q, S]
    itself = chosen[..., None] == jnp.arange(S)  # [B, Q, S]
    weights = over_heads(attention_weights(few, k, mask), options.heads)
    return sum_received(weights, some, itself if options.later else None)


def watched(
    attend: Callable[..., Any],
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    queries: Float[AnyArray, "n B S"] | None,
    *,
    options: Options,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """Attention, and what is received: noted on the way, or anew where few queries are asked."""
    found: tuple[Array, Array]
    if queries is None or options.rows is None:
        asks = None if queries is None else jnp.moveaxis(jnp.asarray(queries), 0, -1)
        found = attend(q, k, v, valid, asks, options)
        return found
    out, _ = attend(q, k, v, valid, None, options)
    return out, received_from_few(q, k, valid, queries, options)
