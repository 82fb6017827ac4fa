"""The next token from logits: the likeliest, or as each row asks for it.

In the order of `transformers`: what was said already is made less likely, tokens are ruled out,
then temperature, top-k and top-p, and a draw.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxprune.errors import (
    UserError,
    check_flag,
    check_seed,
    check_whole,
    is_number,
    is_whole,
)
from jaxprune.ops.axes import AnyArray

MOST_LOGPROBS = 20
_SPREAD = 0x9E3779B9  # odd: of 2**32 copies no two seeds are the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a row asks for beside its prompt and images.

    Args:
        max_new_tokens: at most.
        temperature: 0 decodes greedily.
        top_k: draw from the k likeliest only.
        top_p: draw from the likeliest that together reach this probability.
        seed: of the draws.
        stop: strings that end the answer; a single one may come as it is. A special token ends
            it too.
        min_new_tokens: before these no token ends the answer.
        repetition_penalty: above 1, by which the logits of tokens that prompt or answer have
            already are divided, or multiplied where they are negative.
        suppress_tokens: ids that are never generated.
        begin_suppress_tokens: ids with which an answer does not begin.
        logprobs: of how many likeliest tokens at each place to note the log-probability.
        logits: whether to note all logits.

    Raises:
        UserError: for a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    logprobs: int | None = None
    logits: bool = False

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
        check_whole("min_new_tokens", self.min_new_tokens, least=0)
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty!r}; expected a number above 0."
            )
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            ids = getattr(self, name)
            if not isinstance(ids, list | tuple) or not all(map(is_whole, ids)):
                raise UserError(f"{name} is {ids!r}; expected ids of tokens.")
            object.__setattr__(self, name, tuple(ids))
        if self.logprobs is not None and not (
            is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS
        ):
            raise UserError(f"logprobs is {self.logprobs!r}; expected 0 to {MOST_LOGPROBS}.")
        check_flag("return_logits", self.logits)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken and nothing noted: a shorter program does that."""
        ruled = self.min_new_tokens or self.suppress_tokens or self.begin_suppress_tokens
        noted = self.logprobs is not None or self.logits
        return self.temperature == 0 and self.repetition_penalty == 1 and not (ruled or noted)

    def copies(self, number: int) -> list["Ask"]:
        """The same so many times over, each with a seed of its own; the first keeps its seed."""
        seeds = [(self.seed + place * _SPREAD) % 2**32 for place in range(number)]
        return [dataclasses.replace(self, seed=seed) for seed in seeds]

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
        least: int32 `[B]`, tokens before which none ends the answer.
        penalty: float32 `[B]`, of what was said already.
        said: bool `[B, V]`, the tokens of the prompt.
        banned: bool `[B, V]`, tokens that are not generated.
        banned_first: bool `[B, V]`, tokens with which no answer begins.
        top: bool `[B]`, whether the likeliest tokens are noted.
    """

    temperature: Float[AnyArray, " B"]
    top_k: Int[AnyArray, " B"]
    top_p: Float[AnyArray, " B"]
    seeds: UInt[AnyArray, " B"]
    least: Int[AnyArray, " B"]
    penalty: Float[AnyArray, " B"]
    said: Bool[AnyArray, "B V"]
    banned: Bool[AnyArray, "B V"]
    banned_first: Bool[AnyArray, "B V"]
    top: Bool[AnyArray, " B"]


class Noted(NamedTuple):
    """What is noted down of the answers so far.

    Attributes:
        said: bool `[B, V]`, the tokens of prompt and answer.
        logprob: float32 `[B, M]`, of each token by the model's own logits.
        top: int32 `[B, M, K]`, the likeliest tokens at its place.
        top_logprob: float32 `[B, M, K]`, theirs.
        logits: float32 `[B, M, V]`, where they are asked for.
    """

    said: Bool[Array, "B V"]
    logprob: Float[Array, "B M"]
    top: Int[Array, "B M K"]
    top_logprob: Float[Array, "B M K"]
    logits: Float[Array, "B M V"] | None


def nothing_noted(sampling: Sampling, room: int, *, logits: bool) -> Noted:
    """The notes of answers that have not begun, with `room` tokens each."""
    batch, vocabulary = sampling.said.shape
    each = (batch, room, min(MOST_LOGPROBS, vocabulary))
    return Noted(
        jnp.asarray(sampling.said),
        jnp.zeros(each[:2], jnp.float32),
        jnp.zeros(each, jnp.int32),
        jnp.zeros(each, jnp.float32),
        jnp.zeros((*each[:2], vocabulary), jnp.float32) if logits else None,
    )


def noted(
    notes: Noted,
    sampling: Sampling,
    logits: Float[Array, "B V"],
    token: Int[Array, " B"],
    at: Int[Array, " B"],
) -> Noted:
    """The notes with each row's token at the place `at`; out of bounds for a row that rests."""
    rows, room = jnp.arange(len(token)), notes.logprob.shape[1]
    logprobs = jax.nn.log_softmax(logits)
    values, ids = jax.lax.cond(
        jnp.any(sampling.top),
        lambda: jax.lax.top_k(logprobs, notes.top.shape[-1]),
        lambda: [notes.top_logprob[:, 0], notes.top[:, 0]],
    )
    own = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    said = notes.said.at[jnp.where(at < room, rows, len(rows)), token].set(True, mode="drop")
    return Noted(
        said,
        notes.logprob.at[rows, at].set(own, mode="drop"),
        notes.top.at[rows, at].set(ids, mode="drop"),
        notes.top_logprob.at[rows, at].set(values, mode="drop"),
        None if notes.logits is None else notes.logits.at[rows, at].set(logits, mode="drop"),
    )


def make_sampling(
    asks: Sequence[Ask], said: Sequence[Sequence[int]] = (), *, batch: int, vocab_size: int
) -> Sampling:
    """The values of a batch's rows, padded to `batch` rows.

    Args:
        asks: what the rows ask for.
        said: the token ids of their prompts.
        batch: rows to pad to.
        vocab_size: V.

    Raises:
        UserError: for ids of tokens that there are not.
    """
    padded = [*asks, *[Ask()] * (batch - len(asks))]

    def among(lists: Sequence[Sequence[int]], name: str) -> np.ndarray:
        found = np.zeros((batch, vocab_size), bool)
        for own, ids in zip(found, lists, strict=False):
            if any(not 0 <= token < vocab_size for token in ids):
                raise UserError(f"{name} is {[*ids]}; the vocabulary has 0 to {vocab_size - 1}.")
            own[list(ids)] = True
        return found

    # NumPy's, not JAX's: to make these on a device would take programs of their own.
    return Sampling(
        np.array([ask.temperature for ask in padded], np.float32),
        np.array([min(ask.top_k or vocab_size, vocab_size) for ask in padded], np.int32),
        np.array([1.0 if ask.top_p is None else ask.top_p for ask in padded], np.float32),
        np.array([ask.seed for ask in padded], np.uint32),
        np.array([ask.min_new_tokens for ask in padded], np.int32),
        np.array([ask.repetition_penalty for ask in padded], np.float32),
        among(said, "The prompt"),
        among([ask.suppress_tokens for ask in padded], "suppress_tokens"),
        among([ask.begin_suppress_tokens for ask in padded], "begin_suppress_tokens"),
        np.array([ask.logprobs is not None for ask in padded]),
    )


def one_seed(seed: Any) -> Any:
    """NumPy's whole numbers as Python's, anything else as it is, to be checked."""
    return int(seed) if isinstance(seed, np.integer) else seed


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The next token of rows that ask for nothing else."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def ruled(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    said: Bool[Array, "B V"],
    step: Int[Array, " B"],
    eos: Int[Array, " E"],
) -> Float[Array, "B V"]:
    """Logits after the penalty of what was said, -inf for what is ruled out.

    Args:
        logits: float32.
        sampling: what the rows ask for.
        said: the tokens of prompt and answer.
        step: int32, tokens that a row has already.
        eos: what ends an answer; below 0 nothing.
    """
    penalty = jnp.asarray(sampling.penalty)[:, None]
    logits = jnp.where(said, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    V = logits.shape[1]
    ends = jnp.zeros(V, bool).at[jnp.where(eos < 0, V, eos)].set(True, mode="drop")
    banned = sampling.banned | ((step == 0)[:, None] & sampling.banned_first)
    banned |= (step < sampling.least)[:, None] & ends
    return jnp.where(banned, -jnp.inf, logits)


def next_token(
    logits: Float[Array, "B V"], sampling: Sampling, step: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of every row.

    Temperature first, then the k likeliest, then the likeliest that together reach p (at
    least one), then a draw from the remaining ones.

    Args:
        logits: float32, as `ruled` leaves them.
        sampling: how to draw.
        step: int32, tokens that a row has already.
    """
    found: Array = jax.lax.cond(  # where nobody draws, the vocabulary need not be sorted
        jnp.any(sampling.temperature > 0),
        lambda: _drawn(logits, sampling, step),
        lambda: likeliest(logits),
    )
    return found


def _drawn(
    logits: Float[Array, "B V"], sampling: Sampling, step: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The same, at whatever temperature."""
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
