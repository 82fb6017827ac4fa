"""The jitted stages of a request, each one program per shape; `run.py` puts them together.

encode         pixels -> features and signals
count, select  -> visual tokens that are left
embed          project, merge into the text embeddings
prefill        all layers, dropping tokens -> first token, caches
decode         a loop of single steps, caches donated
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxprune.methods import VisionMethod
from jaxprune.models.registry import family
from jaxprune.ops.schedule import Schedule
from jaxprune.ops.visual import Selection, VisionOutput
from jaxprune.sampling import Sampling, next_token


class DecodeState(flax.struct.PyTreeNode):
    """A batch in the middle of its answers.

    Attributes:
        token: int32 `[B]`, the last token, not yet fed to the decoder.
        positions: int32 `[B]`, where that token goes.
        caches: one a layer.
        step: int32 `[]`, tokens generated so far.
        tokens: int32 `[B, M]`, the answers so far.
        lengths: int32 `[B]`, tokens of each answer, its end-of-sequence token left out.
        done: bool `[B]`.
    """

    token: jax.Array
    positions: jax.Array
    caches: Any
    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "signals"))
def encode(
    params: dict, pixels: jax.Array, *, config: Any, signals: frozenset[str]
) -> VisionOutput:
    """Pixels `[I, H, W, 3]` -> features and the signals asked for."""
    return family(config).encode_image(params, config, pixels, signals)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def count(vision: VisionOutput, *, config: Any, method: VisionMethod) -> jax.Array:
    """How many visual tokens a method leaves of each image: int32 `[I]`."""
    return method.counts(_without_cls(vision, config)[1]) + config.keep_cls


@functools.partial(jax.jit, static_argnames=("config", "method", "capacity"))
def select(vision: VisionOutput, *, config: Any, method: VisionMethod, capacity: int) -> Selection:
    """The visual tokens that a method leaves, in `capacity` slots an image."""
    cls, patches = _without_cls(vision, config)
    selection = method.select(patches, capacity - config.keep_cls)
    if not config.keep_cls:
        return selection
    return Selection(
        tokens=jnp.concatenate([cls, selection.tokens], axis=1),
        counts=selection.counts + 1,
        indices=jnp.pad(selection.indices, ((0, 0), (1, 0)), constant_values=-1),
    )


def _without_cls(vision: VisionOutput, config: Any) -> tuple[jax.Array, VisionOutput]:
    """Under the "full" select strategy CLS is a feature like any other, but never pruned."""
    first = int(config.keep_cls)
    return vision.features[:, :first], vision.replace(features=vision.features[:, first:])


@functools.partial(jax.jit, static_argnames=("config",))
def embed(
    params: dict,
    token_ids: jax.Array,
    visual_index: jax.Array,
    kind: jax.Array,
    lengths: jax.Array,
    visual_tokens: jax.Array | None,
    *,
    config: Any,
) -> Any:
    """Text and visual tokens of a layout as the decoder's input."""
    # A stage of its own: the number of images and of visual tokens ends here, so that the
    # decoder, which takes long to compile, is compiled for batch and sequence alone.
    model = family(config)
    return model.embed(params, config, token_ids, visual_index, kind, lengths, visual_tokens)


@functools.partial(jax.jit, static_argnames=("config", "schedule", "new_slots", "greedy"))
def prefill(
    params: dict,
    tokens: Any,
    counts: jax.Array | None,
    lengths: jax.Array,
    rows: jax.Array,
    sampling: Sampling,
    eos: jax.Array,
    *,
    config: Any,
    schedule: Schedule,
    new_slots: int,
    greedy: bool,
) -> tuple[DecodeState, jax.Array, Any]:
    """The prompt through the decoder: the state after the first token, its logits, survivors.

    Rows from `rows` on only pad the batch and are done from the start.
    """
    model = family(config)
    prefilled = model.prefill(
        params, config, tokens, new_slots=new_slots, schedule=schedule, counts=counts
    )
    batch, slots = prefilled.tokens.valid.shape
    # The last token is never dropped: it is in the last slot in use, whatever went before it.
    last = jnp.max(jnp.where(prefilled.tokens.valid, jnp.arange(slots), 0), axis=-1)
    hidden = jnp.take_along_axis(prefilled.tokens.x, last[:, None, None], axis=1)[:, 0]
    logits = model.logits(params, config, hidden)
    state = DecodeState(
        token=jnp.zeros(batch, jnp.int32),
        positions=lengths - 1,
        caches=prefilled.caches,
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((batch, new_slots), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.arange(batch) >= rows,
    )
    return _append(state, logits, sampling, eos, greedy=greedy), logits, prefilled.records


@functools.partial(jax.jit, static_argnames=("config", "greedy"), donate_argnames=("state",))
def decode(
    params: dict,
    state: DecodeState,
    until: jax.Array,
    sampling: Sampling,
    eos: jax.Array,
    *,
    config: Any,
    greedy: bool,
) -> DecodeState:
    """Single steps until `until` tokens are there or every row is done."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: DecodeState) -> DecodeState:
        logits, caches = family(config).decode(
            params, config, state.token, state.positions, state.caches, state.step - 1
        )
        return _append(state.replace(caches=caches), logits, sampling, eos, greedy=greedy)

    return jax.lax.while_loop(unfinished, step, state)


def _append(
    state: DecodeState, logits: jax.Array, sampling: Sampling, eos: jax.Array, *, greedy: bool
) -> DecodeState:
    """Draw the next token of every row that is not done."""
    token = next_token(logits, sampling, state.step, greedy=greedy)
    done = state.done | jnp.any(token[:, None] == eos, axis=-1)
    return state.replace(
        token=token,
        positions=state.positions + 1,
        step=state.step + 1,
        tokens=jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.step, axis=1
        ),
        lengths=state.lengths + ~done,
        done=done,
    )
