"""The stages of a request as shapes alone: what there is to compile, without any array.

The same stages in the same order as `engine` runs them, with the sizes that `shapes` chooses.
"""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from jaxprune.engine import stages
from jaxprune.engine.buckets import DEFAULT_BUCKETS, Buckets
from jaxprune.engine.engine import MOST_EOS
from jaxprune.engine.schedules import candidates_left, gather_schedule
from jaxprune.engine.shapes import ALIGNED, RowRoom, Shapes
from jaxprune.errors import UserError
from jaxprune.inputs.layout import ImageRoom, lay_out
from jaxprune.inputs.request import Row
from jaxprune.methods.base import Plan
from jaxprune.models.family import Arrays, ModelConfig
from jaxprune.models.registry import depth_of
from jaxprune.ops.cuts import NO_CUTS, Schedule
from jaxprune.ops.tiles import VisualSize, pack_tilings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a request is made of, as far as shapes go: an image and a text a row.

    Attributes:
        batch: rows.
        text_tokens: of each.
        new_tokens: room for them.
        image_size: height and width in pixels; None is the image that has the most tokens.
        visual_tokens: what is left of each image, for a method that decides by it.
        buckets: the shapes that these are rounded up to.
    """

    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 128
    image_size: VisualSize | None = None
    visual_tokens: int | None = None
    buckets: Buckets = DEFAULT_BUCKETS


@dataclasses.dataclass(frozen=True)
class Padded:
    """The sizes that a request is given: tiles through the tower, slots and cuts of the decoder."""

    batch: int
    tiles: int
    images: int
    capacity: int
    room: RowRoom
    new_slots: int
    schedule: Schedule


class Run(Protocol):
    """What is done with a stage: it gets its arguments, and gives what it would give."""

    def __call__(self, name: str, stage: Any, /, *arguments: Any, **static: Any) -> Any: ...


def padded(config: ModelConfig, plan: Plan, sizes: Sizes) -> Padded:
    """The sizes that a request is given.

    Raises:
        UserError: for sizes over the largest bucket or the model's context, or a method that
            decides by the image and no number of visual tokens.
    """
    shapes, buckets = Shapes(sizes.buckets, config, plan.vision, ALIGNED), sizes.buckets
    batch = buckets.fit("batch", sizes.batch)
    shape = shapes.of_images(sizes.batch, _tiling(config, sizes).tiles)
    capacity = _capacity(shapes, plan, sizes)
    room = shapes.of_rows(sizes.text_tokens, 1, capacity, capacity)
    context = config.text_config.context_length
    if room.slots > context:
        raise UserError(
            f"A row of {room.text} text and {room.visual} visual tokens is over the model's "
            f"context of {context}."
        )
    schedule = NO_CUTS
    if plan.decoder is not None:
        distinct = buckets.schedule_lengths
        schedule = gather_schedule(
            plan.decoder, depth_of(config), room, distinct=distinct, multiple=ALIGNED
        )
    new_slots = buckets.fit("new_tokens", sizes.new_tokens)
    tiles = shape.images * shape.tiles
    return Padded(batch, tiles, shape.images, capacity, room, new_slots, schedule)


def through_stages(
    params: Arrays, config: ModelConfig, plan: Plan, sizes: Sizes, place: Any, run: Run
) -> None:
    """Every stage of a request, one after the other.

    Args:
        params: the parameters' shapes, with where they lie.
        config: the model's config.
        plan: what prunes.
        sizes: of the request.
        place: where a request's arrays lie: `place(tree, axis)` gives their shapes with it,
            for arrays whose rows are counted by `axis`.
        run: what is done with each stage.
    """
    whole, tiling = padded(config, plan, sizes), _tiling(config, sizes)
    shapes, method = Shapes(sizes.buckets, config, plan.vision), plan.vision
    shape = shapes.of_images(sizes.batch, tiling.tiles)
    packing = pack_tilings(
        [tiling] * sizes.batch,
        images=shape.images,
        tiles=whole.tiles,
        image_tiles=shape.tiles,
        slots=shape.slots,
        axes=config.position_axes,
    )
    side = config.tower.tile_size
    pixels = jax.ShapeDtypeStruct((whole.tiles, side, side, 3), np.float32)
    pixels, packing = place((pixels, packing), 0)
    if method is not None and method.compares_text:
        raise UserError(
            f"{method.name} goes by a CLIP's text tower, which is not compiled without a model; "
            "warm up the model that is loaded with it."
        )
    signals = frozenset() if method is None else method.signals
    vision = run(
        "encode", stages.encode, params, pixels, packing.frames, config=config, signals=signals
    )
    asked = None
    if method is not None and method.reads_question:
        question = place(np.zeros((shape.images, whole.room.text), np.int32), 0)
        asked = run("embed_questions", stages.embed_questions, params, question, config=config)
    chooses = None if method is None else place(method, 0)
    if method is not None and shapes.fixed_capacity(shape) is None:
        run("count", stages.count, vision, packing, asked, chooses)
    selection = run(
        "select",
        stages.select,
        vision,
        packing,
        asked,
        chooses,
        capacity=whole.capacity,
        images=shapes.visual_slots(shape.images, whole.batch, 1),
    )
    one = np.full(sizes.batch, whole.capacity)
    room = ImageRoom(one, one, np.full(sizes.batch, tiling.num_cls), whole.capacity)
    rows = [Row([[1], [1] * (sizes.text_tokens - 1)], [i]) for i in range(sizes.batch)]
    axes = config.position_axes
    layout = lay_out(rows, room, batch=whole.batch, sequence=whole.room.slots, axes=axes)
    positions = place(layout.embedded.positions, len(axes))
    embedded = place(layout.embedded, 0)._replace(positions=positions)
    tokens = run("embed", stages.embed, params, embedded, selection, config=config)
    left = None
    if plan.decoder is not None:
        left = place(candidates_left(plan.decoder, depth_of(config), layout), 1)
    eos = np.full(MOST_EOS, -1, np.int32)
    read = run(
        "prefill",
        stages.prefill,
        params,
        tokens,
        left,
        place(layout.next_position, 0),
        np.int32(sizes.batch),
        None,
        eos,
        config=config,
        schedule=whole.schedule,
        new_slots=whole.new_slots,
        logits=False,
    )
    until = place(np.zeros(whole.batch, np.int32), 0)
    run("decode", stages.decode, params, read.state, until, None, eos, config=config)


def _tiling(config: ModelConfig, sizes: Sizes) -> Any:
    if sizes.image_size is not None:
        return config.tiling(sizes.image_size)
    side = config.tower.tile_size
    if config.one_tile:
        return config.tiling(VisualSize(side, side))
    ratios = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (3, 4), (4, 3))
    every = [config.tiling(VisualSize(8 * side * h, 8 * side * w)) for h, w in ratios]
    return max(every, key=lambda tiling: tiling.num_tokens)


def _capacity(shapes: Shapes, plan: Plan, sizes: Sizes) -> int:
    """Visual tokens of an image that the decoder has room for."""
    tiling = _tiling(shapes.config, sizes)
    shape = shapes.of_images(sizes.batch, tiling.tiles)
    known = shapes.fixed_capacity(shape)
    if known is not None:
        return known
    if plan.vision is None:
        return shapes.of_selection(shape, tiling.num_tokens)
    if sizes.visual_tokens is None:
        fixed_keep = ", or a fixed keep" if shapes.config.one_tile else ""
        raise UserError(
            f"How many tokens {plan.vision.name} leaves depends on the image; give their number "
            f"as visual_tokens (--visual-tokens){fixed_keep}."
        )
    return shapes.of_selection(shape, sizes.visual_tokens)
