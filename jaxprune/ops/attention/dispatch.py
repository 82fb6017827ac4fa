"""Attention among the slots of a sequence, as the platform does it best."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxprune.ops.attention import limits
from jaxprune.ops.attention.by_chunks import attend_by_chunks
from jaxprune.ops.attention.by_heads import attend_by_heads, heads_at_once
from jaxprune.ops.attention.definition import (
    Options,
    Watch,
    asking_slots,
    received_from_few,
)
from jaxprune.ops.attention.fused_tpu import fused_attention, fused_received
from jaxprune.ops.axes import DATA_AXIS, MODEL_AXIS, AnyArray


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
    if jax.default_backend() == "cpu" and not _on_mesh():  # a few heads of a row at a time
        some = heads // key_value_heads * heads_at_once(key_value_heads)
        return 2 * some * min(block, slots) * slots * 4
    return 2 * rows * heads * min(limits.QUERY_CHUNK, slots) * slots * 4


def _by_platform(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    queries: Float[AnyArray, "n B S"] | None,
    options: Options,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """By heads on a CPU, fused on a TPU, by chunks elsewhere and where there is little to do."""
    chunks = functools.partial(_watched, attend_by_chunks, options=options)
    if q.shape[2] <= limits.SHORT:
        return chunks(q, k, v, valid, queries)
    heads = functools.partial(_watched, attend_by_heads, options=options)
    found: tuple[Array, Array] = jax.lax.platform_dependent(
        q,
        k,
        v,
        valid,
        queries,
        cpu=chunks if _on_mesh() else heads,
        tpu=functools.partial(attend_fused, options=options),
        default=chunks,
    )
    return found


def _watched(
    attend: Any,
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


def attend_fused(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    queries: Float[AnyArray, "n B S"] | None,
    *,
    options: Options,
    interpret: bool = False,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """The same by a TPU's kernels, each device for its own rows and heads; gradients by chunks."""
    parts = _Parts(len(valid), k.shape[1])
    if options.heads == "max" and queries is not None and parts.heads_split:
        # The largest weight over heads that lie on several devices is none's own to sum up.
        return _watched(attend_by_chunks, q, k, v, valid, queries, options=options)

    @jax.custom_vjp
    def attend(*arrays: Any) -> Any:
        return parts.run(functools.partial(_fused, options=options, interpret=interpret), arrays)

    def forward(*arrays: Any) -> Any:
        return attend(*arrays), arrays

    def backward(arrays: Any, gradients: Any) -> Any:
        q, k, v, *others = arrays
        _, pull = jax.vjp(
            lambda *x: _watched(attend_by_chunks, *x, *others, options=options), q, k, v
        )
        return (*pull(gradients), None, None)

    attend.defvjp(forward, backward)
    found: tuple[Array, Array] = attend(q, k, v, valid, queries)
    return found


def _fused(
    q: Float[AnyArray, "B H S d"],
    k: Float[AnyArray, "B J S d"],
    v: Float[AnyArray, "B J S d"],
    valid: Bool[AnyArray, "B S"],
    queries: Float[AnyArray, "n B S"] | None,
    *,
    options: Options,
    interpret: bool,
) -> tuple[Float[Array, "B H S d"], Float[Array, "n B S"]]:
    """On one device."""
    B, S = valid.shape
    found = fused_attention(q, k, v, valid, causal=options.causal, interpret=interpret)
    if queries is None:
        return found.out, jnp.zeros((0, B, S))
    sums, slots = found.sums, jnp.broadcast_to(jnp.arange(S), (B, S))
    asks = jnp.moveaxis(jnp.asarray(queries), 0, -1)
    if options.rows is not None:
        slots, asks = asking_slots(queries, options.rows)
        q = jnp.take_along_axis(q, slots[:, None, :, None], axis=2)
        sums = jnp.take_along_axis(sums, slots[:, None], axis=2)
    received = fused_received(
        q,
        k,
        sums,
        valid,
        slots,
        asks,
        heads=options.heads,
        later=options.later,
        interpret=interpret,
    )
    return found.out, received


class _Parts:
    """How rows and heads are spread over the devices of a mesh, if there is one.

    Args:
        batch: rows.
        heads: of keys and values.
    """

    def __init__(self, batch: int, heads: int) -> None:
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {} if mesh.empty else dict(mesh.shape)
        self.mesh = None if mesh.empty else mesh
        self.rows = DATA_AXIS if batch % sizes.get(DATA_AXIS, batch + 1) == 0 else None
        self.heads_split = sizes.get(MODEL_AXIS, 1) > 1 and heads % sizes[MODEL_AXIS] == 0
        self.heads = MODEL_AXIS if self.heads_split else None

    def run(self, function: Any, arrays: Any) -> Any:
        """A function of `_fused`'s arrays, on every device for what it has of them."""
        if self.mesh is None:
            return function(*arrays)
        of_heads = PartitionSpec(self.rows, self.heads)
        of_rows, sums = PartitionSpec(self.rows), PartitionSpec(None, self.rows)

        def own(*arrays: Any) -> Any:
            out, received = function(*arrays)
            # Each device has the mean over its own heads, as many as all others have.
            return out, jax.lax.pmean(received, self.heads) if self.heads_split else received

        return jax.shard_map(
            own,
            mesh=self.mesh,
            in_specs=(of_heads, of_heads, of_heads, of_rows, sums),
            out_specs=(of_heads, sums),
            check_vma=False,
        )(*arrays)


def _on_mesh() -> bool:
    """Whether arrays are laid over a mesh of devices: a loop over rows would gather them."""
    return not jax.sharding.get_abstract_mesh().empty
