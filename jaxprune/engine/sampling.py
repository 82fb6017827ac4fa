"""The next token from logits: greedy, or temperature with top-k and top-p, for each row its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxprune.errors import UserError, check_seed, check_whole, is_number, is_whole
from jaxprune.ops.axes import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a row asks for beside its prompt and images.

    Args:
        max_new_tokens: at most.
        temperature: 0 decodes greedily.
        top_k: draw from the k likeliest only.
        top_p: draw from the likeliest that together reach this probability.
        seed: of the draws.
        stop: strings that end the answer; a single one may come as it is.

    Raises:
        UserError: for a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens)
        if not is_number(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature is {self.temperature!r}; expected 0 (greedy) or more.")
        if self.top_k is not None:
            check_whole("top_k", self.top_k)
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p is {self.top_p!r}; expected more than 0 and at most 1.")
        check_seed(self.seed)
        strings = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(strings, list | tuple):
            raise UserError(f"stop is {self.stop!r}; expected a string or a list of them.")
        if not all(isinstance(text, str) and text for text in strings):
            raise UserError(f"stop is {self.stop!r}; expected strings that are not empty.")
        object.__setattr__(self, "stop", tuple(strings))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def of_rows(self, seed: object, rows: int) -> list["Ask"]:
        """The same for every row, with a seed for each: the one that came, or a list of them.

        Raises:
            UserError: for a seed that is none, or not one for every row.
        """
        if is_whole(seed) or isinstance(seed, np.integer):
            return [dataclasses.replace(self, seed=int(seed))] * rows
        if not isinstance(seed, list | tuple | np.ndarray):
            raise UserError(
                f"seed is {seed!r}; expected a whole number, or a list with one a prompt."
            )
        if len(seed) != rows:
            raise UserError(f"{len(seed)} seeds came for {rows} prompts; give one for each.")
        return [dataclasses.replace(self, seed=one_seed(own)) for own in seed]


class Sampling(NamedTuple):
    """How to draw tokens, as values: one compiled program serves them all.

    A row's draws depend on what it asks for alone, not on its neighbours or its place, so rows
    of equal seed and prompt give equal answers.

    Attributes:
        temperature: float32 `[B]`; 0 takes the likeliest.
        top_k: int32 `[B]`, the vocabulary's size for no limit.
        top_p: float32 `[B]`, 1 for no limit.
        seeds: uint32 `[B]`.
    """

    temperature: Float[AnyArray, " B"]
    top_k: Int[AnyArray, " B"]
    top_p: Float[AnyArray, " B"]
    seeds: UInt[AnyArray, " B"]


def make_sampling(asks: Sequence[Ask], *, batch: int, vocab_size: int) -> Sampling:
    """The values of a batch's rows, padded to `batch` rows."""
    padded = [*asks, *[Ask()] * (batch - len(asks))]
    # NumPy's, not JAX's: to make these on a device would take programs of their own.
    return Sampling(
        np.array([ask.temperature for ask in padded], np.float32),
        np.array([min(ask.top_k or vocab_size, vocab_size) for ask in padded], np.int32),
        np.array([1.0 if ask.top_p is None else ask.top_p for ask in padded], np.float32),
        np.array([ask.seed for ask in padded], np.uint32),
    )


def one_seed(seed: Any) -> Any:
    """NumPy's whole numbers as Python's, anything else as it is, to be checked."""
    return int(seed) if isinstance(seed, np.integer) else seed


def next_token(
    logits: Float[Array, "B V"], sampling: Sampling, step: Int[Array, " B"], *, greedy: bool
) -> Int[Array, " B"]:
    """The next token of every row.

    Temperature first, then the k likeliest, then the likeliest that together reach p (at
    least one), then a draw from the remaining ones.

    Args:
        logits: float32.
        sampling: how to draw.
        step: int32, tokens that a row has already.
        greedy: that no row has a temperature above 0; the program is then a shorter one.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the row's maximum down: a tiny temperature then gives -inf, never inf - inf.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    temperature = jnp.maximum(sampling.temperature, 1e-30)[:, None]
    ordered, tokens = jax.lax.top_k(logits / temperature, logits.shape[-1])
    place = jnp.arange(logits.shape[-1])
    ordered = jnp.where(place < sampling.top_k[:, None], ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ordered = jnp.where((before < sampling.top_p[:, None]) | (place == 0), ordered, -jnp.inf)

    def draw(seed: AnyArray, step: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    drawn = jax.vmap(draw)(sampling.seeds, step, ordered)
    drawn = jnp.where(sampling.temperature > 0, drawn, 0)  # the likeliest, the first of equals
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
