"""The kernels of a TPU in the place of `by_chunks`: over a mesh, and with gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxprune.ops.attention.by_chunks import attend_by_chunks
from jaxprune.ops.attention.definition import Options, asking_slots, watched
from jaxprune.ops.attention.fused_tpu import fused_attention, fused_received
from jaxprune.ops.axes import DATA_AXIS, MODEL_AXIS, AnyArray


@functools.partial(jax.jit, static_argnames=("options", "interpret"))  # traced once a shape
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
        return watched(attend_by_chunks, q, k, v, valid, queries, options=options)

    @jax.custom_vjp
    def attend(*arrays: Any) -> Any:
        return parts.run(functools.partial(_fused, options=options, interpret=interpret), arrays)

    def forward(*arrays: Any) -> Any:
        return attend(*arrays), arrays

    def backward(arrays: Any, gradients: Any) -> Any:
        q, k, v, *others = arrays
        _, pull = jax.vjp(
            lambda *x: watched(attend_by_chunks, *x, *others, options=options), q, k, v
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
