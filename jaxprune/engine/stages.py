"""The jitted stages of a request, each one program per shape; `run.py` puts them together.

encode         pixels of tiles -> features and signals
count, select  -> visual tokens that are left of each image
embed          project, merge into the text embeddings
prefill        all layers, dropping tokens -> first token, caches
decode         a loop of single steps, caches donated
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxprune.engine.sampling import Sampling, next_token
from jaxprune.methods import VisionMethod
from jaxprune.models.registry import family
from jaxprune.ops.cuts import Schedule
from jaxprune.ops.ranking import nonzero_first
from jaxprune.ops.tiles import NO_PATCH, Chosen, Packing, by_tile, line_up, patches_of
from jaxprune.ops.visual import Selection, VisionOutput


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
    """Pixels of tiles `[F, H, W, 3]` -> features and the signals asked for."""
    return family(config).encode_image(params, config, pixels, signals)


@functools.partial(jax.jit, static_argnames=("config",))
def count(
    vision: VisionOutput, packing: Packing, *, config: Any, method: VisionMethod
) -> jax.Array:
    """How many visual tokens a method leaves of each image: int32 `[I]`."""
    chosen, _ = _choose(_without_cls(vision, config)[1], packing, method)
    left = line_up(chosen, packing, extra_tokens=method.merges, capacity=1)
    return left.counts + config.keep_cls


@functools.partial(jax.jit, static_argnames=("config", "capacity", "images"))
def select(
    vision: VisionOutput,
    packing: Packing,
    *,
    config: Any,
    method: VisionMethod | None,
    capacity: int,
    images: int,
) -> Selection:
    """The visual tokens that a method leaves, as the decoder reads them.

    Args:
        vision: what the tower gives for the tiles.
        packing: how they make up the images.
        config: the model's.
        method: what chooses and merges; None keeps everything.
        capacity: slots for each image.
        images: how many images the result has room for.
    """
    cls, vision = _without_cls(vision, config)
    chosen, inside = _choose(vision, packing, method)
    merges = method is not None and method.merges
    room = capacity - config.keep_cls
    left = line_up(chosen, packing, extra_tokens=merges, capacity=room)
    number, place = jnp.divmod(jnp.maximum(left.indices, 0), vision.features.shape[1])
    number = jnp.where(left.extra < 0, number, left.extra)
    own = jnp.arange(len(packing.tile))[:, None]
    tile = jnp.maximum(packing.tile, 0)[own, number]  # [I, K]
    if not merges:
        tokens = vision.features[tile, place]
    else:
        assert method is not None
        stays = by_tile(chosen.kept & inside, packing)  # [F, N]
        tile_capacity = min(capacity, stays.shape[1])
        merged, extra = method.merge_tokens(
            vision, by_tile(chosen.kept, packing), nonzero_first(stays, tile_capacity)
        )
        which = (jnp.cumsum(stays, axis=-1) - 1)[tile, place]  # of the tile's kept patches
        which = jnp.where(left.extra < 0, which, tile_capacity)
        pool = jnp.concatenate([merged, extra[:, None]], axis=1)  # [F, tile_capacity + 1, C]
        tokens = pool[tile, which].astype(vision.features.dtype)
    counts, indices = left.counts, left.indices
    if config.keep_cls:
        first = cls[jnp.maximum(packing.tile[:, 0], 0)]
        tokens, counts = jnp.concatenate([first, tokens], axis=1), counts + 1
        indices = jnp.pad(indices, ((0, 0), (1, 0)), constant_values=NO_PATCH)
    found = Selection(tokens, counts, indices)
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, images - len(x))] + [(0, 0)] * (x.ndim - 1)), found
    )


def _choose(
    vision: VisionOutput, packing: Packing, method: VisionMethod | None
) -> tuple[Chosen, jax.Array]:
    """What is kept, and what is part of the picture: bool `[I, T, N]`."""
    patches = patches_of(vision.signals, packing, vision.features.shape[1])
    inside = patches.place >= 0
    return (Chosen(inside) if method is None else method.choose(patches)), inside


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
    selection: Selection | None,
    *,
    config: Any,
) -> Any:
    """Text and visual tokens of a layout as the decoder's input."""
    # A stage of its own: the number of images and of visual tokens ends here, so that the
    # decoder, which takes long to compile, is compiled for batch and sequence alone.
    model = family(config)
    visual = None if selection is None else model.visual_embeddings(params, config, selection)
    return model.embed(params, config, token_ids, visual_index, kind, lengths, visual)


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
