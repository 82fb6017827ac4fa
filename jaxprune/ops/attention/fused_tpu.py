"""Attention on a TPU without a score in its memory, and what keys receive, in a second pass.

Two kernels (Pallas). The first is FlashAttention (arXiv 2205.14135): blocks of queries against
blocks of keys, up to the diagonal, with a softmax that goes along. It also gives each query's
log-sum-exp, with which the second makes the weights anew wherever pruning reads them, reduces
them over the heads and sums them over the queries.

Inside, keys run down and queries run to the right: sums over keys are then sums of rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jaxprune.ops.attention.definition import EXACT, LEAST
from jaxprune.ops.axes import AnyArray

MOST_BLOCK = 512
"""Queries, and keys, at once."""
_ROWS = 16  # of a tile, in 16 bits
_SUMS = 8  # rows of a tile, of which a few are in use


class Fused(NamedTuple):
    """What the first pass gives.

    Attributes:
        out: `[B, H, S, d]`, in the dtype of the values.
        sums: float32 `[B, H, S]`, the logarithm of every query's sum of exponentials.
    """

    out: Float[Array, "B H S d"]
    sums: Float[Array, "B H S"]


def fused_attention(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Fused:
    """Attention of slots to the valid ones, up to themselves if `causal`.

    Queries that see no key at all get some mean of the values.

    Args:
        q, k, v, valid: as for `causal_attention`.
        causal: slots see the slots up to themselves; otherwise all.
        interpret: run it anywhere, step by step, to be tested.
    """
    B, H, S, d = q.shape
    shared = H // k.shape[1]
    block, number = _blocks(S)

    def of_keys(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, ...]:
        # Blocks above the diagonal are not looked at, nor fetched: the last one stays.
        return b, jax.lax.div(h, shared), jnp.minimum(i, j) if causal else j, 0

    keys = pl.BlockSpec((1, 1, block, d), of_keys)
    queries = pl.BlockSpec((1, 1, block, d), lambda b, h, i, j: (b, h, i, 0))
    out, sums = pl.pallas_call(
        functools.partial(_flash, slots=S, causal=causal),
        grid=(B, H, number, number),
        in_specs=[
            queries,
            keys,
            keys,
            pl.BlockSpec((1, block, 1), lambda b, h, i, j: (b, *of_keys(b, h, i, j)[2:])),
        ],
        out_specs=[
            queries,
            pl.BlockSpec((1, 1, 1, 1, block), lambda b, h, i, j: (b, h, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, S, d), v.dtype),
            jax.ShapeDtypeStruct((B, H, number, 1, block), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((d, block), jnp.float32),
            pltpu.VMEM((1, block), jnp.float32),
            pltpu.VMEM((1, block), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="fused_attention",
    )(q, k, v, jnp.asarray(valid, jnp.float32)[..., None])
    return Fused(out, sums.reshape(B, H, -1)[..., :S])


def _flash(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    seen_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    out: Any,
    most: Any,
    total: Any,
    *,
    slots: int,
    causal: bool,
) -> None:
    """A block of queries against one of keys; what is past the last slot is anything.

    Args:
        q_ref, k_ref, v_ref, seen_ref: queries `[Q, d]`, keys and values `[K, d]`, seen `[K, 1]`.
        out_ref, sums_ref: written once the last block of keys was there.
        out, most, total: so far: `[d, Q]`, and `[1, Q]` of the logits and their exponentials.
        slots: S.
        causal: as in `fused_attention`.
    """
    i, j = pl.program_id(2), pl.program_id(3)
    block = q_ref.shape[2]

    @pl.when(j == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)
        most[...] = jnp.full_like(most, LEAST)
        total[...] = jnp.zeros_like(total)

    @pl.when(j <= i if causal else j >= 0)
    def _() -> None:
        logits = _logits(k_ref[0, 0], q_ref[0, 0])  # [K, Q]
        keys = j * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        allowed = (seen_ref[0] > 0) & (keys < slots)
        if causal:
            allowed &= keys <= i * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where(allowed, logits, LEAST)
        new_most = jnp.maximum(most[...], logits.max(0, keepdims=True))
        grown, shrink = jnp.exp(logits - new_most), jnp.exp(most[...] - new_most)
        v = jnp.where(keys[:, :1] < slots, v_ref[0, 0], 0)
        more = jax.lax.dot_general(
            v, grown.astype(v.dtype), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        out[...] = shrink * out[...] + more
        total[...] = shrink * total[...] + grown.sum(0, keepdims=True)
        most[...] = new_most

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        out_ref[0, 0] = (out[...] / total[...]).T.astype(out_ref.dtype)
        sums_ref[0, 0, 0] = most[...] + jnp.log(total[...])


def _logits(k: Float[Array, "K d"], q: Float[Array, "Q d"]) -> Float[Array, "K Q"]:
    product = jax.lax.dot_general(
        k, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    logits: Array = product * q.shape[-1] ** -0.5
    return logits


def fused_received(
    q: Float[AnyArray, "B H Q d"],
    k: Float[AnyArray, "B J S d"],
    sums: Float[AnyArray, "B H Q"],
    valid: Bool[AnyArray, "B S"],
    slots: Int[AnyArray, "B Q"],
    asks: Float[AnyArray, "B Q n"],
    *,
    heads: str,
    later: bool,
    interpret: bool = False,
) -> Float[Array, "n B S"]:
    """What keys receive from some queries: weights over the heads, then summed over queries.

    Args:
        q: queries, all of a prompt's or some.
        k: keys.
        sums: of the queries, as the first pass gives them.
        valid: keys that are seen.
        slots: int32, where the queries stand; they see the keys up to there.
        asks: float32, the weight of every query in each of n sums, up to 8.
        heads: "mean" or "max".
        later: leave out what a token gives to itself.
        interpret: as for `fused_attention`.
    """
    B, H, Q, d = q.shape
    S, shared, n = k.shape[2], H // k.shape[1], asks.shape[-1]
    block, number = _blocks(S)
    rows, parts = _blocks(Q)
    sums = _padded(jnp.asarray(sums), 2, rows * parts).reshape(B, H, parts, 1, rows)
    where = _padded(jnp.asarray(slots, jnp.int32), 1, rows * parts, -1)  # these see nothing
    where = where.reshape(B, parts, 1, rows)
    weights = _padded(_padded(jnp.asarray(asks), 1, rows * parts), 2, _SUMS)
    weights = weights.reshape(B, parts, rows, _SUMS).swapaxes(2, 3)  # [B, parts, sums, Q]
    found = pl.pallas_call(
        functools.partial(_received, heads=heads, later=later),
        grid=(B, number, parts, H),
        in_specs=[
            pl.BlockSpec((1, 1, rows, d), lambda b, s, i, h: (b, h, i, 0)),
            pl.BlockSpec((1, 1, block, d), lambda b, s, i, h: (b, jax.lax.div(h, shared), s, 0)),
            pl.BlockSpec((1, 1, 1, 1, rows), lambda b, s, i, h: (b, h, i, 0, 0)),
            pl.BlockSpec((1, block, 1), lambda b, s, i, h: (b, s, 0)),
            pl.BlockSpec((1, 1, 1, rows), lambda b, s, i, h: (b, i, 0, 0)),
            pl.BlockSpec((1, 1, _SUMS, rows), lambda b, s, i, h: (b, i, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, 1, _SUMS, block), lambda b, s, i, h: (b, s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B, number, _SUMS, block), jnp.float32),
        scratch_shapes=[pltpu.VMEM((block, rows), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="fused_received",
    )(q, k, sums, jnp.asarray(valid, jnp.float32)[..., None], where, weights)
    received: Array = found.swapaxes(1, 2).reshape(B, _SUMS, -1)[:, :n, :S].swapaxes(0, 1)
    return received


def _received(
    q_ref: Any,
    k_ref: Any,
    sums_ref: Any,
    seen_ref: Any,
    slots_ref: Any,
    asks_ref: Any,
    out_ref: Any,
    reduced: Any,
    *,
    heads: str,
    later: bool,
) -> None:
    """A block of keys and one of queries, head after head; the last one adds up what they got."""
    s, i, h = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    number, block = pl.num_programs(3), k_ref.shape[2]
    slots = slots_ref[0, 0]  # [1, Q]

    @pl.when((i == 0) & (h == 0))
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(h == 0)
    def _() -> None:
        reduced[...] = jnp.zeros_like(reduced)

    @pl.when(jnp.max(slots) >= s * block)
    def _() -> None:
        logits = _logits(k_ref[0, 0], q_ref[0, 0])  # [K, Q]
        keys = s * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        allowed = (seen_ref[0] > 0) & (keys < slots if later else keys <= slots)
        weights = jnp.where(allowed, jnp.exp(logits - sums_ref[0, 0, 0]), 0.0)
        if heads == "max":
            reduced[...] = jnp.maximum(reduced[...], weights)
        else:
            reduced[...] += weights / number

    @pl.when(h == number - 1)
    def _() -> None:
        out_ref[0, 0] += jax.lax.dot_general(
            asks_ref[0, 0],
            reduced[...],
            (((1,), (1,)), ((), ())),
            precision=EXACT,
            preferred_element_type=jnp.float32,
        )


def _blocks(length: int) -> tuple[int, int]:
    """Equal blocks: the size of one, and how many."""
    number = -(-length // MOST_BLOCK)
    size = -(-length // number)
    return -(-size // _ROWS) * _ROWS, number


def _padded(x: Array, axis: int, length: int, value: int = 0) -> Array:
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
