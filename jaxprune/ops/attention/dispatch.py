"""Attention among the slots of a sequence, as the platform does it best."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.ops.attention import limits
from jaxprune.ops.attention.by_chunks import attend_by_chunks, attend_by_rows
from jaxprune.ops.attention.by_heads import attend_by_heads, heads_at_once
from jaxprune.ops.attention.definition import Options, Watch, watched
from jaxprune.ops.attention.fused import attend_fused
from jaxprune.ops.axes import AnyArray, on_mesh


def full_attention(
    q: Float[AnyArray, "F H S d"], k: Float[AnyArray, "F J S d"], v: Float[AnyArray, "F J S d"]
) -> Float[Array, "F H S d"]:
    """Attention of every slot to every slot, in the dtype of `v`."""
    valid = jnp.ones((q.shape[0], q.shape[2]), bool)
    out, _ = _by_platform(q, k, v, valid, None, Options(causal=False))
    return out


def causal_attention(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    watch: Watch | None = None,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"] | None]:
    """Attention of every slot to the valid slots up to itself, and what `watch` asks for.

    Args:
        q: queries.
        k: keys; J = H is plain multi-head attention.
        v: values.
        valid: slots that are no padding.
        watch: which attention weights are summed up.

    Returns:
        The output in the dtype of `v`, and the float32 sums, or None without a watch.
    """
    if watch is None:
        return _by_platform(q, k, v, valid, None, Options(causal=True))[0], None
    options = Options(causal=True, heads=watch.heads, later=watch.later, rows=watch.rows)
    out, received = _by_platform(q, k, v, valid, watch.queries, options)
    if watch.later:
        after = watch.queries.sum(-1, keepdims=True) - jnp.cumsum(watch.queries, axis=-1)
        received = received / jnp.maximum(after, 1.0)
    return out, received


def scratch_bytes(rows: int, slots: int, *, heads: int, key_value_heads: int, block: int) -> int:
    """Bytes of attention weights that are alive at once, before and after the softmax.

    Args:
        rows: of the batch.
        slots: of the sequence.
        heads: H.
        key_value_heads: J.
        block: queries at once on a CPU: `limits.BLOCK`, or `limits.FULL_BLOCK` where
            everything sees everything.
    """
    if jax.default_backend() == "tpu" and slots > limits.SHORT:
        return 0  # kernels hold them in a core's own memory
    if jax.default_backend() == "cpu" and not on_mesh():  # a few heads of a row at a time
        some = heads // key_value_heads * heads_at_once(key_value_heads)
        return 2 * some * min(block, slots) * slots * 4
    if on_mesh():
        return 2 * rows * heads * min(limits.QUERY_CHUNK, slots) * slots * 4
    rows = min(rows, limits.rows_at_once(heads, slots))
    return 2 * rows * heads * min(limits.queries_at_once(rows, heads, slots), slots) * slots * 4


def _by_platform(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    queries: Float[AnyArray, "n B S"] | None,
    options: Options,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """By heads on a CPU, fused on a TPU, by rows elsewhere, at once where there is little to do."""
    chunks = functools.partial(watched, attend_by_chunks, options=options)
    rows = functools.partial(watched, attend_by_rows, options=options)
    if q.shape[2] <= limits.SHORT:
        return chunks(q, k, v, valid, queries)
    heads = functools.partial(watched, attend_by_heads, options=options)
    found: tuple[Array, Array] = jax.lax.platform_dependent(
        q,
        k,
        v,
        valid,
        queries,
        cpu=chunks if on_mesh() else heads,
        tpu=functools.partial(attend_fused, options=options),
        default=chunks if on_mesh() else rows,
    )
    return found
