"""A whole model as one pure function, for training and for whoever needs logits.

`batch` makes the arrays, on the host; `forward` can be jitted, differentiated and sharded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxprune.devices.mesh import spread
from jaxprune.engine import stages
from jaxprune.engine.buckets import DEFAULT_BUCKETS, Buckets
from jaxprune.engine.engine import (
    NOTHING_SEEN,
    Clock,
    Encoded,
    Engine,
    Seen,
    spread_layout,
)
from jaxprune.errors import UserError
from jaxprune.inputs.pixels import pixel_values, size_of
from jaxprune.inputs.request import NO_LABEL, Request, Row, make_request
from jaxprune.methods.base import VisionMethod
from jaxprune.methods.resolve import resolve
from jaxprune.model import Params, complete
from jaxprune.models.family import Embedded, ModelConfig
from jaxprune.models.registry import depth_of, family_of
from jaxprune.ops.axes import AnyArray
from jaxprune.ops.cuts import Schedule, Tokens
from jaxprune.ops.tiles import Packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts with their images and answers, as `forward` takes them: a pytree of arrays.

    Attributes:
        layout: where every token goes.
        labels: int32 `[B, S]`, the token of an answer to be said after each slot, -1 where there is
            none.
        pixel_values: float32 `[F, H, W, 3]` of all tiles; None without images.
        packing: how tiles make up images.
        questions: int32 `[I, Q]`, for a method that reads them.
        question_parts: int32 `[I, Q, S]`, for a method that goes by a CLIP's text tower.
        counts: int32 `[L, B]`, candidates that the decoder leaves, for a method that drops some.
        method: the vision-side method, or None.
        config: the model's; static.
        schedule: what the decoder drops; static.
        capacity, images: visual tokens of each image, and images, that there is room for; static.
        answer_slots: as many labels as any row has, or more: what is scored; static. None: S.
    """

    layout: Embedded
    labels: Int[AnyArray, "B S"]
    pixel_values: Float[AnyArray, "F H W 3"] | None
    packing: Packing | None
    questions: Int[AnyArray, "I Q"] | None
    question_parts: Int[AnyArray, "I Q S"] | None
    counts: Int[AnyArray, "L B"] | None
    method: VisionMethod | None
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    schedule: Schedule = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    images: int = dataclasses.field(metadata={"static": True})
    answer_slots: int | None = dataclasses.field(metadata={"static": True}, default=None)


class Hidden(NamedTuple):
    """A batch behind the decoder's last layer.

    Attributes:
        tokens: what is left of it; `x` is `[B, S', D]`, before the last norm.
        kept, survivors: see `Forward`.
    """

    tokens: Tokens
    kept: Int[Array, "I K"] | None
    survivors: tuple[tuple[Array, ...], ...]


class Forward(NamedTuple):
    """What `forward` gives; where nothing is dropped by gathering, S' is the batch's S.

    Attributes:
        logits: float32 `[B, S', V]`.
        slots: int32 `[B, S']`, the slot of the batch that each token had; -1 for one that is
            made of dropped ones.
        valid: bool `[B, S']`, tokens in use.
        kept: int32 `[I, K]`, the patches that are left of each image, or None; see
            `Answer.kept_indices`.
        survivors: for each layer that drops tokens, slots and whether they are left.
    """

    logits: Float[Array, "B S V"]
    slots: Int[Array, "B S"]
    valid: Bool[Array, "B S"]
    kept: Int[Array, "I K"] | None
    survivors: tuple[tuple[Array, ...], ...]


def batch(
    params: Params | Mapping[str, Any],
    images: Any,
    prompts: Any,
    *,
    answers: Sequence[str] | str | None = None,
    method: Any = "none",
    gather: bool = False,
    chat: bool = True,
    config: ModelConfig | None = None,
    processor: Any = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    **method_options: Any,
) -> Batch:
    """The arrays of prompts, of a bucket's size, for `forward`.

    How many visual tokens an adaptive method leaves is found out here, with these parameters.

    Args:
        params: what `load` gives.
        images, prompts: as for `generate`.
        answers: what is said to each prompt, whose tokens become the labels; one for one prompt.
        method, method_options: as for `generate`.
        gather: shorten sequences where the decoder drops tokens, which is faster; else they are
            masked, and every slot keeps its place.
        chat, config, processor, buckets: as for `generate`.

    Raises:
        jaxprune.UserError: as `generate`.
    """
    model = complete(params, config, processor)
    plan = resolve(method, depth_of(model.config), **method_options)
    engine = Engine(model, plan, buckets, gather=gather)
    said = [answers] if isinstance(answers, str) else answers
    request = make_request(engine.processor, images, prompts, chat=chat, answers=said)
    return batch_of(engine, request)


def batch_of(engine: Engine, request: Request) -> Batch:
    """The arrays of a request, of a bucket's size, for `forward`.

    Args:
        engine: of the model, under the plan that the batch is for.
        request: the prompts with their answers.

    Raises:
        UserError: for what does not fit the model or the buckets.
    """
    if engine.reads_question:
        request = request.with_own_images()
    rows, size = request.rows, engine.buckets.fit("batch", len(request.rows))
    engine.check_ids(rows)
    tilings = [engine.config.tiling(size_of(image)) for image in request.images]
    engine.check_images(request.images, tilings)
    engine.context_left(rows, engine.surely(tilings))
    pixels = packing = None
    seen, rooms = NOTHING_SEEN, 0
    if tilings:
        shape = engine.shapes.of_images(len(tilings), max(tiling.tiles for tiling in tilings))
        pixels = pixel_values(engine.processor, request.images, engine.config)
        pixels, packing = engine.padded(pixels, tilings, shape)
        row_images = max(len(row.images) for row in rows)
        counts = engine.known_counts(tilings, shape)
        if counts is None:
            vision = engine.encode(pixels, tilings, shape, Clock()).vision
            encoded = Encoded(vision, packing, shape, tilings)
            seen = engine.select(
                encoded, batch=size, row_images=row_images, questions=request.questions,
                clock=Clock(),
            )  # fmt: skip
        else:
            known = engine.shapes.fixed_capacity(shape)
            capacity = known or engine.shapes.of_selection(shape, int(counts.max()))
            seen = Seen(None, engine.room_for(tilings, counts, capacity))
        rooms = engine.shapes.visual_slots(shape.images, size, row_images)
    engine.context_left(rows, seen.room)
    prompt = engine.lay_out(rows, seen, engine.room_of(rows, seen), batch=size, new_slots=0)
    asked = parts = None
    if packing is not None:
        asked = engine.padded_questions(request.questions, len(packing.tile))
        parts = engine.question_parts(request.questions, len(packing.tile))
    labels = _labels(prompt.layout.embedded, rows)
    return Batch(
        layout=prompt.layout.embedded,
        labels=labels,
        pixel_values=pixels,
        packing=packing,
        questions=asked,
        question_parts=parts,
        counts=prompt.left,
        method=engine.plan.vision,
        config=engine.config,
        schedule=prompt.schedule,
        capacity=seen.room.capacity,
        images=rooms,
        answer_slots=engine.buckets.fit("text", int((labels >= 0).sum(axis=1).max())),
    )


def _labels(layout: Embedded, rows: Sequence[Row]) -> np.ndarray:
    """What is to be said after each slot: int32 `[B, S]`."""
    labels = np.full(np.shape(layout.token_ids), NO_LABEL, np.int32)
    for own, row, length in zip(labels, rows, layout.lengths, strict=False):
        # The token before the answer says its first one.
        own[length - len(row.answer) - 1 : length - 1] = (
            row.answer if row.labels is None else row.labels
        )
    return labels


def on_devices(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch with its rows, images and tiles spread over a mesh's "data" axis, as it divides them.

    Args:
        batch: what `batch` gives.
        mesh: as `devices.mesh.mesh_of` finds it; None leaves the batch as it is.
    """
    own = {
        name: spread(getattr(batch, name), mesh)
        for name in ("labels", "pixel_values", "packing", "questions", "question_parts")
    }
    layout = spread_layout(batch.layout, batch.config, mesh)
    counts = spread(batch.counts, mesh, axis=1)
    return dataclasses.replace(batch, layout=layout, counts=counts, **own)


def forward(params: Params | Mapping[str, Any], batch: Batch) -> Forward:
    """The logits of whole prompts, their images seen and pruned on the way.

    A pure function of two pytrees. It is differentiable in the parameters; which tokens are kept
    is not, and counts as given.

    Args:
        params: what `load` gives, or its `arrays`.
        batch: what `batch` gives.

    Raises:
        jaxprune.UserError: for anything else.
    """
    if not isinstance(batch, Batch):
        raise UserError(f"batch is a {type(batch).__name__}; expected what jaxprune.batch gives.")
    found = hidden_states(params, batch)
    return Forward(
        logits(params, batch, found.tokens.x),
        found.tokens.slot,
        found.tokens.valid,
        found.kept,
        found.survivors,
    )


def logits(
    params: Params | Mapping[str, Any], batch: Batch, x: Float[Array, "*any D"]
) -> Float[Array, "*any V"]:
    """The logits of hidden states, float32."""
    arrays: Any = params.arrays if isinstance(params, Params) else params
    return family_of(batch.config).logits(arrays, batch.config, x)


def hidden_states(params: Params | Mapping[str, Any], batch: Batch) -> Hidden:
    """`forward` up to the logits, which take more memory than anything else."""
    arrays: Any = params.arrays if isinstance(params, Params) else params
    config, family = batch.config, family_of(batch.config)
    selection = None
    if batch.pixel_values is not None:
        method = batch.method
        signals = frozenset() if method is None else method.tower_signals
        assert batch.packing is not None
        pixels, frames = jnp.asarray(batch.pixel_values), batch.packing.frames
        vision = family.encode(arrays, config, pixels, signals, frames)
        if batch.question_parts is not None:
            tower = params.text_tower if isinstance(params, Params) else None
            if tower is None:
                raise UserError(
                    "The batch is for a method that goes by a CLIP's text tower; pass the params "
                    "that have it, as jaxprune.load(..., text_tower=...) gives them."
                )
            parts = jnp.asarray(batch.question_parts)
            vision = stages.compare(tower.arrays, vision, batch.packing, parts, config=tower.config)
        asked = None
        if batch.questions is not None:
            asked = stages.embed_questions(arrays, batch.questions, config=config)
        selection = stages.select(
            vision, batch.packing, asked, method, capacity=batch.capacity, images=batch.images
        )
    tokens = family.embed(arrays, config, batch.layout, selection)
    found = family.prefill(
        arrays, config, tokens, new_slots=0, schedule=batch.schedule, counts=batch.counts
    )
    kept = None if selection is None else selection.indices
    return Hidden(found.tokens, kept, found.records)
