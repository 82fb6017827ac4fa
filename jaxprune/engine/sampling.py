"""The next token from logits: greedy, or temperature with top-k and top-p."""

import numbers
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UserError


class Sampling(flax.struct.PyTreeNode):
    """How to draw tokens, as values: one compiled program serves them all.

    Attributes:
        temperature: float32 `[]`; greedy decoding is a program of its own.
        top_k: int32 `[]`, the vocabulary's size for no limit.
        top_p: float32 `[]`, 1 for no limit.
        seeds: uint32 `[B]`. A row's draws depend on its seed alone, not on its neighbours
            or its place, so rows of equal seed and prompt give equal answers.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seeds: Any


def make_sampling(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: list[int],
    vocab_size: int,
) -> Sampling:
    """Check the user's values and make arrays of them.

    Raises:
        UserError: for a value out of its range.
    """
    if not _is_number(temperature) or not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature!r}; expected 0 (greedy) or more.")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise UserError(f"top_k is {top_k!r}; expected a whole number, 1 or more.")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p!r}; expected more than 0 and at most 1.")
    for seed in seeds:
        check_seed(seed)
    # NumPy's, not JAX's: to make these on a device would take programs of their own.
    return Sampling(
        temperature=np.float32(temperature),
        top_k=np.int32(min(top_k or vocab_size, vocab_size)),
        top_p=np.float32(1.0 if top_p is None else top_p),
        seeds=np.asarray(seeds, np.uint32),
    )


def check_seed(seed: object) -> None:
    """Raise `UserError` unless `seed` is a whole number of 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}; expected a whole number from 0 to 2**32 - 1.")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def next_token(
    logits: jax.Array, sampling: Sampling, step: jax.Array, *, greedy: bool
) -> jax.Array:
    """float32 `[B, vocabulary]` -> int32 `[B]`.

    Temperature first, then the k likeliest, then the likeliest that together reach p (at
    least one), then a draw from what is left.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the row's maximum down: a tiny temperature then gives -inf, never inf - inf.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    temperature = jnp.maximum(sampling.temperature, 1e-30)
    ordered, tokens = jax.lax.top_k(logits / temperature, logits.shape[-1])
    place = jnp.arange(logits.shape[-1])
    ordered = jnp.where(place < sampling.top_k, ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ordered = jnp.where((before < sampling.top_p) | (place == 0), ordered, -jnp.inf)

    def draw(seed: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    drawn = jax.vmap(draw)(sampling.seeds, ordered)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
