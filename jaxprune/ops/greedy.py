"""Choosing patches one after the other, each by what it adds to those that are chosen."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.ops.ranking import LEAST

State = TypeVar("State")

_TINY = 1e-12


def greedy(
    keep: int,
    candidates: Bool[Array, " P"],
    state: State,
    gain: Callable[[State], Float[Array, " P"]],
    update: Callable[[State, Int[Array, ""]], State],
) -> Bool[Array, " P"]:
    """`keep` candidates, or all where there are fewer; each in turn is the one that gains most.

    Args:
        keep: how many.
        candidates: who may be chosen; nobody is twice.
        state: what gains are computed from, any tree.
        gain: state -> float32 gains, of anybody. NaN counts as the least; ties go to the lower
            index.
        update: state and who was chosen -> the next state.
    """

    def step(_: Int[Array, ""], carry: tuple[Array, State]) -> tuple[Array, State]:
        open_, state = carry
        gains = gain(state)
        gains = jnp.where(jnp.isnan(gains), -jnp.inf, gains)
        # Somebody open comes before anybody who is not, even at a gain of minus infinity.
        best = jnp.where(open_, jnp.maximum(gains, LEAST), -jnp.inf)
        j = jnp.argmax(best)
        return open_.at[j].set(False), update(state, j)

    left, _ = jax.lax.fori_loop(0, min(keep, len(candidates)), step, (candidates, state))
    chosen: Array = candidates & ~left
    return chosen


def unit(x: Float[Array, "*any C"]) -> Float[Array, "*any C"]:
    """Vectors of length one, float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _TINY)


def cosines(x: Float[Array, "P C"]) -> Float[Array, "P P"]:
    """Cosine of the angle between any two vectors, float32; 0 with a zero vector."""
    x = unit(x)
    # A rounded product would decide who is nearest.
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
