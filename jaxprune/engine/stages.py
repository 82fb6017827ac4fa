"""The jitted stages of a request, each one program per shape; `engine` puts them together.

encode         pixels of tiles -> features and signals
compare        features and questions -> one signal more, for a method that goes by it
count, select  -> visual tokens that are left of each image
embed          project, merge into the text embeddings
prefill        all layers, dropping tokens -> first token, caches
decode         a loop of single steps, caches donated
record, score  a prompt with its answer through the decoder, for calibration
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.engine.sampling import (
    Noted,
    Sampling,
    likeliest,
    next_token,
    noted,
    nothing_noted,
    ruled,
)
from jaxprune.errors import UserError
from jaxprune.methods.base import VisionMethod
from jaxprune.models.clip import ClipTextConfig
from jaxprune.models.clip.modeling import similar_to_texts
from jaxprune.models.family import Arrays, Embedded, LayerCache, ModelConfig, Prefilled
from jaxprune.models.registry import family_of
from jaxprune.ops.cuts import Schedule, Tokens, is_last
from jaxprune.ops.ranking import nonzero_first
from jaxprune.ops.tiles import (
    CLS,
    NO_EXTRA,
    Chosen,
    Frames,
    LinedUp,
    Packing,
    Questions,
    by_tile,
    line_up,
    patches_of,
)
from jaxprune.ops.visual import TEXT_SIMILARITY, Selection, Signal, VisionOutput


class DecodeState(NamedTuple):
    """A batch in the middle of its answers; every row is where it is by itself.

    Attributes:
        token: int32 `[B]`, the last token, not yet fed to the decoder.
        positions: int32 `[B]`, where that token goes.
        caches: one a layer.
        step: int32 `[B]`, tokens generated so far.
        tokens: int32 `[B, M]`, the answers so far.
        lengths: int32 `[B]`, tokens of each answer, its end-of-sequence token left out.
        done: bool `[B]`.
        notes: what is noted down of rows that ask for more than the likeliest tokens, or None.
    """

    token: Int[Array, " B"]
    positions: Int[Array, " B"]
    caches: tuple[LayerCache, ...]
    step: Int[Array, " B"]
    tokens: Int[Array, "B M"]
    lengths: Int[Array, " B"]
    done: Bool[Array, " B"]
    notes: Noted | None = None


class Read(NamedTuple):
    """A prompt after its prefill.

    Attributes:
        state: where decoding begins, with the first token.
        first_logits: float32 `[B, V]`, of that token.
        survivors: for each layer that drops tokens, who is left; see `Schedule.record`.
        sound: bool `[B]`, whether a row's first logits are numbers, all of them.
    """

    state: DecodeState
    first_logits: Float[Array, "B V"]
    survivors: tuple[tuple[Array, ...], ...]
    sound: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("config", "signals"))
def encode(
    params: Arrays,
    pixels: Float[Array, "F H W 3"],
    frames: Frames | None = None,
    *,
    config: ModelConfig,
    signals: frozenset[Signal],
) -> VisionOutput:
    """Pixels of tiles -> features and the signals asked for."""
    return family_of(config).encode(params, config, pixels, signals, frames)


@jax.jit
def together(parts: tuple[VisionOutput, ...], tile: Int[Array, " F"]) -> VisionOutput:
    """Some of the tiles of several encoded images, one behind the other."""
    joined: VisionOutput = jax.tree.map(lambda *x: jnp.concatenate(x)[tile], *parts)
    return joined


@functools.partial(jax.jit, static_argnames=("config",))
def embed_questions(
    params: Arrays, token_ids: Int[Array, "I Q"], *, config: ModelConfig
) -> Questions:
    """Questions in the decoder's embeddings; ids below 0 are padding."""
    tokens = family_of(config).embed_text(params, config, jnp.maximum(token_ids, 0))
    return Questions(tokens, token_ids >= 0)


@functools.partial(jax.jit, static_argnames=("config",))
def compare(
    params: Arrays,
    vision: VisionOutput,
    packing: Packing,
    texts: Int[Array, "I Q S"],
    *,
    config: ClipTextConfig,
) -> VisionOutput:
    """What a tower gives, and how similar each patch is to what is asked about its image.

    Args:
        params, config: the text tower's.
        vision: what the vision tower gives.
        packing: how its tiles make up images.
        texts: what is asked about each image, in parts; see `similar_to_texts`.
    """
    similar = similar_to_texts(params, config, vision.features, texts, packing.image)
    return vision._replace(signals={**vision.signals, TEXT_SIMILARITY: similar})


@jax.jit
def count(
    vision: VisionOutput,
    packing: Packing,
    questions: Questions | None,
    method: VisionMethod,
) -> Int[Array, " I"]:
    """How many visual tokens a method leaves of each image."""
    chosen, _ = _choose(vision, packing, questions, method)
    return line_up(chosen, packing, extra=method.extra_tokens, capacity=1).counts


@functools.partial(jax.jit, static_argnames=("capacity", "images"))
def select(
    vision: VisionOutput,
    packing: Packing,
    questions: Questions | None,
    method: VisionMethod | None,
    *,
    capacity: int,
    images: int,
) -> Selection:
    """The visual tokens that a method leaves, as the decoder reads them.

    Args:
        vision: what the tower gives for the tiles.
        packing: how they make up the images.
        questions: what is asked about the images, for a method that reads it.
        method: what chooses and merges; None keeps everything.
        capacity: K, slots for each image.
        images: how many images the result has room for.
    """
    chosen, inside = _choose(vision, packing, questions, method)
    extra = NO_EXTRA if method is None else method.extra_tokens
    left = line_up(chosen, packing, extra=extra, capacity=capacity)
    tokens = _tokens(vision, packing, method, chosen, inside, left)
    if vision.cls is not None:
        own = jnp.arange(len(packing.tile))[:, None]
        tile = jnp.asarray(packing.tile)[own, jnp.maximum(CLS - left.indices, 0)]
        is_cls = (left.indices <= CLS)[..., None]
        tokens = jnp.where(is_cls, vision.cls[jnp.maximum(tile, 0)], tokens)
    found = Selection(tokens, left.counts, left.indices, _positions(left, packing, method))

    def with_room(x: Array, axis: int) -> Array:
        room = images - x.shape[axis]
        return jnp.pad(x, [(0, room if i == axis else 0) for i in range(x.ndim)])

    axis = found.positions.ndim - 2
    return Selection(
        with_room(found.tokens, 0),
        with_room(found.counts, 0),
        with_room(found.indices, 0),
        with_room(found.positions, axis),
    )


def _choose(
    vision: VisionOutput,
    packing: Packing,
    questions: Questions | None,
    method: VisionMethod | None,
) -> tuple[Chosen, Bool[Array, "I T N"]]:
    """What is kept, and what is part of the picture."""
    patches = patches_of(vision.signals, packing, vision.features.shape[1], questions)
    inside = patches.place >= 0
    if method is None:
        return Chosen(inside), inside
    with _told_of_signals(method):
        return method.choose(patches), inside


@contextlib.contextmanager
def _told_of_signals(method: VisionMethod) -> Iterator[None]:
    """A `UserError` for a method that reads a signal which it does not ask for."""
    try:
        yield
    except KeyError as error:
        if not isinstance(error.args[0], Signal):
            raise
        raise UserError(
            f"{method.name} reads {error.args[0]}, which its `signals` do not name; add it there."
        ) from None


def _tokens(
    vision: VisionOutput,
    packing: Packing,
    method: VisionMethod | None,
    chosen: Chosen,
    inside: Bool[Array, "I T N"],
    left: LinedUp,
) -> Float[Array, "I K C"]:
    """The features of what is left, merged where the method merges."""
    number, place = jnp.divmod(jnp.maximum(left.indices, 0), vision.features.shape[1])
    number = jnp.where(left.tile < 0, number, left.tile)
    own = jnp.arange(len(packing.tile))[:, None]
    tile = jnp.maximum(jnp.asarray(packing.tile)[own, number], 0)  # [I, K]
    if method is None or not method.merges:
        return vision.features[tile, place]
    stays = by_tile(chosen.kept & inside, packing)  # [F, N]
    room = min(left.indices.shape[1], stays.shape[1])
    indices = nonzero_first(stays, room)
    with _told_of_signals(method):
        merged = method.merge_tokens(vision, by_tile(chosen.kept, packing), indices)
    which = (jnp.cumsum(stays, axis=-1) - 1)[tile, place]  # of the tile's kept patches
    which = jnp.where(left.extra < 0, which, room + left.extra)
    pool = jnp.concatenate([merged.tokens, merged.extra], axis=1)  # [F, room + E, C]
    return pool[tile, which].astype(vision.features.dtype)


def _positions(
    left: LinedUp, packing: Packing, method: VisionMethod | None
) -> Int[Array, "*A I K"]:
    """Positions of what is left, counted from the image's first one."""
    positions = jnp.asarray(packing.positions)
    if method is None or method.positions == "original":
        own = jnp.arange(len(left.slots))[:, None]
        return positions[..., own, left.slots]
    place = jnp.arange(left.indices.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(place, (*positions.shape[:-1], len(place)))


@functools.partial(jax.jit, static_argnames=("config",))
def embed(
    params: Arrays, layout: Embedded, selection: Selection | None, *, config: ModelConfig
) -> Tokens:
    """Text and visual tokens of a layout as the decoder's input."""
    # A stage of its own: the number of images and of visual tokens ends here, so that the
    # decoder, which takes long to compile, is compiled for batch and sequence alone.
    return family_of(config).embed(params, config, layout, selection)


@functools.partial(jax.jit, static_argnames=("config", "schedule", "new_slots", "logits"))
def prefill(
    params: Arrays,
    tokens: Tokens,
    counts: Int[Array, "L B"] | None,
    next_position: Int[Array, " B"],
    rows: Int[Array, ""],
    sampling: Sampling | None,
    eos: Int[Array, " E"],
    *,
    config: ModelConfig,
    schedule: Schedule,
    new_slots: int,
    logits: bool = False,
) -> Read:
    """The prompt through the decoder, up to the first token.

    Rows from `rows` on only pad the batch and are done from the start. Without `sampling` the
    likeliest token is taken; with `logits` all logits are noted.
    """
    model = family_of(config)
    prefilled = model.prefill(
        params, config, tokens, new_slots=new_slots, schedule=schedule, counts=counts
    )
    batch, slots = prefilled.tokens.valid.shape
    # The last token is never dropped: it is in the last slot in use, whatever went before it.
    last = jnp.max(jnp.where(prefilled.tokens.valid, jnp.arange(slots), 0), axis=-1)
    hidden = jnp.take_along_axis(prefilled.tokens.x, last[:, None, None], axis=1)[:, 0]
    first = model.logits(params, config, hidden)
    nothing = jnp.zeros(batch, jnp.int32)
    state = DecodeState(
        token=nothing,
        positions=next_position - 1,
        caches=prefilled.caches,
        step=nothing,
        tokens=jnp.zeros((batch, new_slots), jnp.int32),
        lengths=nothing,
        done=jnp.arange(batch) >= rows,
        notes=None if sampling is None else nothing_noted(sampling, new_slots, logits=logits),
    )
    state = _append(state, ~state.done, first, sampling, eos)
    return Read(state, first, prefilled.records, jnp.isfinite(first).all(axis=-1))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode(
    params: Arrays,
    state: DecodeState,
    until: Int[Array, " B"],
    sampling: Sampling | None,
    eos: Int[Array, " E"],
    *,
    config: ModelConfig,
) -> DecodeState:
    """Single steps until every row is done or has its `until` tokens.

    Rows that go on are at the same step: they began together, and one that rests has its end.
    """

    def active(state: DecodeState) -> Bool[Array, " B"]:
        return ~state.done & (state.step < until)

    def step(state: DecodeState) -> DecodeState:
        go = active(state)
        seen = jnp.arange(state.tokens.shape[1]) < state.step[:, None] - 1
        slot = jnp.max(jnp.where(go, state.step, 1)) - 1
        logits, caches = family_of(config).decode(
            params, config, state.token, state.positions, state.caches, slot, seen
        )
        state = state._replace(caches=caches)
        return _append(state, go, logits, sampling, eos)

    return jax.lax.while_loop(lambda state: jnp.any(active(state)), step, state)


def _append(
    state: DecodeState,
    active: Bool[Array, " B"],
    logits: Float[Array, "B V"],
    sampling: Sampling | None,
    eos: Int[Array, " E"],
) -> DecodeState:
    """Take the next token of every row that is active."""
    notes = state.notes
    if sampling is None or notes is None:
        drawn = likeliest(logits)
    else:
        allowed = ruled(logits, sampling, notes.said, state.step, eos)
        drawn = next_token(allowed, sampling, state.step)
    token = jnp.where(active, drawn, state.token)
    ended = active & jnp.any(drawn[:, None] == eos, axis=-1)
    rows = jnp.arange(len(token))
    # A row that rests writes nowhere: this slot is out of bounds.
    at = jnp.where(active, state.step, state.tokens.shape[1])
    if sampling is not None and notes is not None:
        notes = noted(notes, sampling, logits, token, at)
    return state._replace(
        token=token,
        positions=state.positions + active,
        step=state.step + active,
        tokens=state.tokens.at[rows, at].set(token, mode="drop"),
        lengths=state.lengths + (active & ~ended),
        done=state.done | ended,
        notes=notes,
    )


def _through(
    params: Arrays,
    layout: Embedded,
    selection: Selection,
    counts: Any,
    config: ModelConfig,
    schedule: Schedule,
) -> Prefilled:
    model = family_of(config)
    tokens = model.embed(params, config, layout, selection)
    return model.prefill(params, config, tokens, new_slots=0, schedule=schedule, counts=counts)


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def record(
    params: Arrays,
    layout: Embedded,
    selection: Selection,
    counts: Any,
    *,
    config: ModelConfig,
    schedule: Schedule,
) -> tuple[tuple[Array, ...], ...]:
    """A batch through the decoder, caches left out: what `schedule.record` noted."""
    return _through(params, layout, selection, counts, config, schedule).records


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def score(
    params: Arrays,
    layout: Embedded,
    selection: Selection,
    counts: Any,
    answers: Int[Array, "B A"],
    *,
    config: ModelConfig,
    schedule: Schedule,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Log-probability of each answer, and whether every token is the likeliest.

    Args:
        params: the model's.
        layout: prompts with their answers.
        selection: their unpruned visual tokens.
        counts: of the schedule.
        answers: int32, padded with -1.
        config: the model's.
        schedule: in mask mode.
    """
    found = _through(params, layout, selection, counts, config, schedule)
    # Mask mode: slots stay where they are. The token at slot s predicts the one after it.
    last = jnp.argmax(is_last(jnp.asarray(layout.kind)), axis=-1)[:, None]
    slots = jnp.minimum(last + jnp.arange(answers.shape[1]), layout.kind.shape[1] - 1)
    hidden = jnp.take_along_axis(found.tokens.x, slots[..., None], axis=1)
    logits = family_of(config).logits(params, config, hidden)  # [B, A, V]
    used = answers >= 0
    labels = jnp.maximum(answers, 0)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    right = jnp.all((logits.argmax(-1) == labels) | ~used, axis=-1)
    return jnp.sum(logprob * used, axis=-1), right
