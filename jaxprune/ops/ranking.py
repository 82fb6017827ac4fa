"""Orders, quartiles and gathers over tokens; ties always keep the lower index."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.ops.axes import AnyArray

LEAST = float(np.finfo(np.float32).min)
"""The least score of a candidate: what is none comes after it."""


def descending_order(scores: Float[AnyArray, "*axes N"]) -> Int[Array, "*axes N"]:
    """Indices from the largest score to the smallest, int32."""
    return jax.lax.top_k(scores, scores.shape[-1])[1]


def ranks(order: Int[AnyArray, "*axes N"]) -> Int[Array, "*axes N"]:
    """The place of every index in an order: the inverse permutation, int32."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def best(
    scores: Float[AnyArray, "*axes N"],
    candidates: Bool[AnyArray, "*axes N"],
    number: int | Int[Array, "..."],
) -> Bool[Array, "*axes N"]:
    """The candidates with the highest scores, `number` of them or all where there are fewer."""
    inside = jnp.where(candidates, jnp.maximum(scores, LEAST), -jnp.inf)
    first: Array = ranks(descending_order(inside)) < number
    return first & candidates


def hand_out(
    number: Int[Array, ""], room: Int[Array, " n"], preference: Float[Array, " n"]
) -> Int[Array, " n"]:
    """How many each gets of `number`: one a round, by falling preference, while there is room."""

    def left(given: Int[Array, " n"]) -> Int[Array, ""]:
        return jnp.minimum(number, jnp.sum(room)) - jnp.sum(given)

    given: Array = jax.lax.while_loop(
        lambda given: left(given) > 0,
        lambda given: given + best(preference, given < room, left(given)),
        jnp.zeros_like(room),
    )
    return given


def nonzero_first(mask: Bool[AnyArray, "*axes N"], size: int) -> Int[Array, "*axes {size}"]:
    """Indices where a mask is True, ascending, then those where it is not: the first `size`."""
    return descending_order(mask.astype(jnp.float32))[..., :size]  # ties keep their order


def quartiles(
    scores: Float[AnyArray, "*axes N"],
) -> tuple[Float[Array, "*axes"], Float[Array, "*axes"]]:
    """First and third quartile by linear interpolation, float32."""
    ordered = jnp.sort(scores.astype(jnp.float32), axis=-1)

    def at(share: float) -> Float[Array, "..."]:
        place = share * (scores.shape[-1] - 1)
        low, high = math.floor(place), math.ceil(place)
        a, b = ordered[..., low], ordered[..., high]
        t = place - low
        # Interpolated from the nearer end, as NumPy does.
        return a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)

    return at(0.25), at(0.75)


def gather_tokens(
    x: Float[AnyArray, "F N C"], indices: Int[AnyArray, "F K"]
) -> Float[Array, "F K C"]:
    """The patches of `x` at `indices`; an index out of range gives NaN."""
    return jnp.take_along_axis(x, indices[..., None], axis=1)
