"""An axis of queries in equal parts, to be handled one after the other."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxprune.ops.axes import AnyArray


def split(x: Shaped[AnyArray, "..."], axis: int, parts: int) -> Shaped[Array, "{parts} ..."]:
    """`[..., Q, ...]` -> `[parts, ..., Q / parts, ...]`, rounded up: the last part is padded."""
    size = -(-x.shape[axis] // parts)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, parts * size - x.shape[axis])
    padded = jnp.pad(x, padding)
    padded = padded.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(padded, axis, 0)


def join(parts: Float[Array, "parts X Y _ d"], length: int) -> Float[Array, "X Y {length} d"]:
    """An output of parts, with two axes X and Y in front of its queries, as one without padding."""
    whole = jnp.moveaxis(parts, 0, 2)  # [X, Y, parts, Q / parts, d]
    return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])[:, :, :length]
