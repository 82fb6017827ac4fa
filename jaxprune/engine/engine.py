"""A model on its devices, under one plan and one list of buckets: the one place that runs stages.

    encode   pixels of tiles -> features                       look at images
    select   features -> the visual tokens that are left
    lay_out  rows and their images -> a prompt of a bucket's size   (host)
    read     a prompt -> the state after its first token       read a prompt
    write    a state -> the same some tokens further           write tokens
    record, score   prompts with answers, for calibration

Every array that enters a jitted stage has the size of a bucket. Numbers alone come back to the
host before an answer does: how many tokens an adaptive method keeps. Warm-up calls the same
methods with empty requests of every size.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxprune.devices.compilation import Compilations, covered
from jaxprune.devices.memory import free_bytes, told_if_exhausted
from jaxprune.devices.mesh import devices_of, devices_sharing, mesh_of, on_mesh, spread, to_host
from jaxprune.engine import stages
from jaxprune.engine.buckets import Buckets
from jaxprune.engine.footprint import check_memory, check_tower_memory
from jaxprune.engine.sampling import Ask, Sampling, make_sampling
from jaxprune.engine.schedules import candidates_left, gather_schedule, mask_schedule
from jaxprune.engine.shapes import ALIGNED, ImageShape, RowRoom, Shapes, tokens_left_of
from jaxprune.engine.stages import DecodeState, Read
from jaxprune.errors import UserError
from jaxprune.inputs.images import EncodedImage
from jaxprune.inputs.layout import (
    NO_IMAGES,
    ImageRoom,
    Layout,
    lay_out,
    row_length,
    text_room,
    visual_length,
)
from jaxprune.inputs.pixels import pixel_values, size_of
from jaxprune.inputs.request import Row
from jaxprune.inputs.videos import Frame, Visual
from jaxprune.methods.base import Plan
from jaxprune.model import Params, check_text_tower
from jaxprune.models.family import Embedded, ModelConfig
from jaxprune.models.registry import depth_of
from jaxprune.ops.cuts import NO_CUTS, Schedule, Tokens
from jaxprune.ops.tiles import Packing, Questions, Tiling, pack_tilings
from jaxprune.ops.visual import Selection, Signal, VisionOutput

T = TypeVar("T")

MOST_EOS = 16  # tokens that may end an answer: a fixed number, so that programs do not ask


class Clock:
    """Seconds by stage, of one request, and XLA programs that were made meanwhile.

    Args:
        timed: wait for every stage, so that `seconds` tells them apart.
    """

    def __init__(self, *, timed: bool = False) -> None:
        self.timed = timed
        self.seconds: dict[str, float] = {}
        self.compiled = 0

    @contextlib.contextmanager
    def stage(self, name: str, **shape: Any) -> Iterator[dict[str, Any]]:
        """Add up a stage's seconds; under `no_compilation`, refuse shapes that are not warm.

        Yields:
            The shape, to which the stage can add what it finds.
        """
        began, made = time.perf_counter(), Compilations()
        with covered(name, shape), told_if_exhausted():
            yield shape
        self.compiled += len(made)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def wait(self, found: T) -> T:
        """What a stage gave, once it is there if stages are to be told apart."""
        if self.timed:
            jax.block_until_ready(found)
        return found


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images after the vision tower.

    Attributes:
        vision: features and signals of all tiles.
        packing: how they make up the images.
        shape: the room that there is.
        tilings: one an image; rooms without an image have none.
    """

    vision: VisionOutput
    packing: Packing
    shape: ImageShape
    tilings: Sequence[Tiling]


@dataclasses.dataclass(frozen=True)
class Seen:
    """Images after pruning: their visual tokens, and what they take up in a row."""

    selection: Selection | None
    room: ImageRoom


NOTHING_SEEN = Seen(None, NO_IMAGES)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A batch of rows, laid out for the decoder.

    Attributes:
        layout: where every token goes.
        room: the buckets of a row.
        schedule: what the decoder drops.
        left: int32 `[L, B]`, candidates that it leaves, or None.
        rows: rows in use.
        new_slots: room for new tokens.
    """

    layout: Layout
    room: RowRoom
    schedule: Schedule
    left: np.ndarray | None
    rows: int
    new_slots: int

    @property
    def batch(self) -> int:
        return len(self.layout.next_position)


class Engine:
    """See the module.

    Args:
        model: arrays, config and processor.
        plan: what prunes.
        buckets: the shapes that may be compiled.
        signals: what the tower has to give besides what the plan asks for.
        gather: shorten sequences where the decoder drops tokens; False masks them, which is
            slower and gives the same.

    Raises:
        UserError: for a plan that the model cannot follow.
    """

    def __init__(
        self,
        model: Params,
        plan: Plan,
        buckets: Buckets,
        *,
        signals: frozenset[Signal] = frozenset(),
        gather: bool = True,
    ) -> None:
        if not isinstance(buckets, Buckets):
            raise UserError(f"buckets is a {type(buckets).__name__}; expected jaxprune.Buckets.")
        if model.processor is None:
            raise UserError("params have no processor; load them with jaxprune.load.")
        self.arrays, self.config, self.processor = model.arrays, model.config, model.processor
        self.plan, self.buckets, self.gather = plan, buckets, gather
        self.depth = depth_of(self.config)
        self.mesh, self.devices = mesh_of(self.arrays), devices_of(self.arrays)
        on_cpu = not self.devices or self.devices[0].platform == "cpu"
        self.shapes = Shapes(buckets, self.config, plan.vision, 1 if on_cpu else ALIGNED)
        ids = self.processor.eos_token_ids
        if len(ids) > MOST_EOS:
            raise UserError(f"{len(ids)} tokens end an answer; expected at most {MOST_EOS}.")
        self.eos = np.array([*ids, *[-1] * (MOST_EOS - len(ids))], np.int32)
        self.signals = signals if plan.vision is None else signals | plan.vision.tower_signals
        self.config.tower.check(self.signals)
        self.text_tower = None
        if plan.vision is not None and plan.vision.compares_text:
            self.text_tower = check_text_tower(model, plan.vision.name)

    # ---- images

    def check_images(self, images: Sequence[Visual], tilings: Sequence[Tiling]) -> None:
        """Raise `UserError` for images that the method cannot prune."""
        method = self.plan.vision
        if method is None or not tilings:
            return
        if method.of_videos and any(isinstance(image, Frame) for image in images):
            raise UserError(
                f"{method.name} compares the frames of a video that is seen as one, but this model "
                "sees frames as images of their own; take another method."
            )
        method.check(min(tiling.num_patches for tiling in tilings))

    def surely(self, tilings: Sequence[Tiling]) -> ImageRoom:
        """What images take up at least, whatever is pruned of them."""
        room = self.unpruned(tilings)
        if self.plan.vision is None:
            return room
        whole = self.plan.vision.positions == "original"
        return room._replace(counts=0 * room.counts, extents=whole * room.extents)

    def unpruned(self, tilings: Sequence[Tiling]) -> ImageRoom:
        """What images take up before any pruning."""
        counts = np.array([tiling.num_tokens for tiling in tilings], int)
        return self.room_for(tilings, counts, int(counts.max(initial=0)))

    def room_for(self, tilings: Sequence[Tiling], counts: np.ndarray, capacity: int) -> ImageRoom:
        """What images take up of which so many visual tokens are left."""
        method = self.plan.vision
        whole = method is None or method.positions == "original"
        extents = [tiling.num_positions for tiling in tilings] if whole else counts
        fixed = np.array([tiling.num_cls for tiling in tilings], int)
        return ImageRoom(counts, np.array(extents, int), fixed, capacity)

    def encode(
        self,
        pixels: Float[np.ndarray, "f H W 3"],
        tilings: Sequence[Tiling],
        shape: ImageShape,
        clock: Clock,
        *,
        tiles: int | None = None,
    ) -> Encoded:
        """Images through the tower.

        Args:
            pixels: of all their tiles.
            tilings: one an image.
            shape: the room for them.
            clock: of the request.
            tiles: room for the tiles of all of them; None: for as many of each.
        """
        tiles = shape.images * shape.tiles if tiles is None else tiles
        check_tower_memory(
            self.config,
            tiles=tiles,
            signals=self.signals,
            images=self.buckets.images,
            image_tiles=shape.tiles,
            devices=devices_sharing(self.mesh, tiles),
            free=free_bytes(self.devices),
        )
        pixels, packing = self.padded(pixels, tilings, shape, tiles=tiles)
        pixels, packing = spread((pixels, packing), self.mesh)
        with on_mesh(self.mesh), clock.stage("encode", **shape._asdict()):
            vision = stages.encode(
                self.arrays, pixels, packing.frames, config=self.config, signals=self.signals
            )
            return Encoded(clock.wait(vision), packing, shape, tilings)

    def encode_alone(self, image: Visual, clock: Clock) -> EncodedImage:
        """An image through the tower, to be asked about later."""
        size = size_of(image)
        tiling = self.config.tiling(size)
        pixels = pixel_values(self.processor, [image], self.config)
        encoded = self.encode(pixels, [tiling], self.shapes.of_images(1, tiling.tiles), clock)
        weights = self._some_weights
        return EncodedImage(image.height, image.width, weights, encoded.vision, size.frames)

    @property
    def _some_weights(self) -> Array:
        """What tells this model from others, whatever their config."""
        first: Array = jax.tree.leaves(self.arrays)[0]
        return first

    def together(
        self,
        images: Sequence[Visual],
        tilings: Sequence[Tiling],
        shape: ImageShape,
        clock: Clock,
    ) -> Encoded:
        """Images of which some are encoded already, as `encode` gives those that are not.

        Raises:
            UserError: for one of another model, or without what the method goes by.
        """
        known = [x if isinstance(x, EncodedImage) else self.encode_alone(x, clock) for x in images]
        for image in known:
            missing = self.signals - set(image.vision.signals)
            if image.tower is not self._some_weights or missing:
                raise UserError(
                    "An image is encoded by another model, or without what the method goes by; "
                    "encode it with this one: jaxprune.encode(params, image, method=...)."
                )
        _, packing = self.padded(np.zeros((0, 1, 1, 3), np.float32), tilings, shape)
        tile: list[int] = []
        first = 0
        for image, tiling in zip(known, tilings, strict=True):
            tile += range(first, first + tiling.tiles)
            first += len(image.vision.features)
        vision = self.joined([image.vision for image in known], tile, shape, clock)
        return Encoded(vision, spread(packing, self.mesh), shape, tilings)

    def joined(
        self, parts: Sequence[VisionOutput], tile: Sequence[int], shape: ImageShape, clock: Clock
    ) -> VisionOutput:
        """Some tiles of encoded images, numbered through all parts, in the room of a shape."""
        padded = np.zeros(shape.images * shape.tiles, np.int32)
        padded[: len(tile)] = tile
        own = [
            part._replace(signals={signal: part.signals[signal] for signal in self.signals})
            for part in parts
        ]
        own += own[:1] * (shape.images - len(own))
        with on_mesh(self.mesh), clock.stage("encode", **shape._asdict()):
            vision: VisionOutput = stages.together(tuple(own), spread(padded, self.mesh))
            return clock.wait(vision)

    def padded(
        self,
        pixels: Float[np.ndarray, "f H W 3"],
        tilings: Sequence[Tiling],
        shape: ImageShape,
        *,
        tiles: int | None = None,
    ) -> tuple[Float[np.ndarray, "F H W 3"], Packing]:
        """The pixels of images' tiles, and how they make up the images, as large as the room."""
        tiles = shape.images * shape.tiles if tiles is None else tiles
        packing = pack_tilings(
            tilings,
            images=shape.images,
            tiles=tiles,
            image_tiles=shape.tiles,
            slots=shape.slots,
            axes=self.config.position_axes,
        )
        return np.pad(pixels, ((0, tiles - len(pixels)), (0, 0), (0, 0), (0, 0))), packing

    def select(
        self,
        encoded: Encoded,
        *,
        batch: int,
        row_images: int,
        questions: Sequence[str] = (),
        question_width: int = 1,
        capacity: int | None = None,
        clock: Clock,
    ) -> Seen:
        """Prune encoded images.

        Args:
            encoded: the images.
            batch: rows, a bucket.
            row_images: images of the row that has the most.
            questions: what is asked about each, for a method that reads it.
            question_width: tokens of a question that there is room for at least.
            capacity: slots for each image; None goes by what is left of them.
            clock: of the request.
        """
        shape, method, number = encoded.shape, self.plan.vision, len(encoded.tilings)
        sizes = {**shape._asdict(), "batch": batch, "row_images": row_images}
        with on_mesh(self.mesh), clock.stage("select", **sizes) as told:
            vision, asked = self._asked(encoded, questions, question_width)
            known = self.shapes.fixed_capacity(shape)
            counts = self.known_counts(encoded.tilings, shape)
            if counts is None:  # the numbers that the host has to know
                assert method is not None
                found = stages.count(vision, encoded.packing, asked, method)
                counts = to_host(found)[:number]
                if known is not None and (counts != known).any():
                    raise UserError(
                        f"{method.name} leaves {sorted(set(counts.tolist()))} visual tokens of an "
                        f"image, but its fixed_count promises {known}; correct fixed_count, or "
                        "leave it out."
                    )
            if capacity is None:
                capacity = known or self.shapes.of_selection(shape, int(counts.max()))
            told["visual"] = capacity
            selection = stages.select(
                vision,
                encoded.packing,
                asked,
                method,
                capacity=capacity,
                images=self.shapes.visual_slots(shape.images, batch, row_images),
            )
            clock.wait(selection)
        return Seen(selection, self.room_for(encoded.tilings, counts, capacity))

    def known_counts(self, tilings: Sequence[Tiling], shape: ImageShape) -> np.ndarray | None:
        """Visual tokens that are left of each image, int `[I]`; None where one has to look."""
        method = self.plan.vision
        if method is None:
            return self.unpruned(tilings).counts
        if not type(method).__module__.startswith("jaxprune."):
            return None  # what a user's own method says of itself is counted
        if self.shapes.fixed_capacity(shape) is None and not tilings:
            return None  # a warm-up: there may be images of which nothing is known
        counts = [tokens_left_of(tiling, method) for tiling in tilings]
        known = [count for count in counts if count is not None]
        return np.array(known, int) if len(known) == len(counts) else None

    @property
    def reads_question(self) -> bool:
        """Whether what is seen of an image depends on what is asked about it."""
        return self.text_tower is not None or self._embeds_question

    @property
    def _embeds_question(self) -> bool:
        return self.plan.vision is not None and self.plan.vision.reads_question

    @property
    def question_widths(self) -> tuple[int, ...]:
        """All sizes that questions are padded to; one where nobody reads them."""
        return self.buckets.text if self.reads_question else (1,)

    def padded_questions(
        self, questions: Sequence[str], images: int, width: int = 1
    ) -> np.ndarray | None:
        """Token ids of what is asked about each image, of a bucket's length: int32 `[I, Q]`.

        None where the method does not read them.
        """
        if not self._embeds_question:
            return None
        each = [self.processor.ids_of(self._read(question)) for question in questions]
        self._check_known(itertools.chain(*each))
        longest = max(width, *map(len, each), 1)
        ids = np.full((images, self.buckets.fit("text", longest)), -1, np.int32)
        for own, question in zip(ids, each, strict=False):
            own[: len(question)] = question
        return ids

    def question_parts(
        self, questions: Sequence[str], images: int, width: int = 1
    ) -> np.ndarray | None:
        """What is asked about each image, for the text tower: see `TextTower.parts_of`.

        As many parts as a question of a bucket's length has; None where nobody reads them.
        """
        if self.text_tower is None:
            return None
        each = [self.text_tower.ids_of(self._read(question)) for question in questions]
        longest = max(width, *map(len, each), 1)
        return self.text_tower.parts_of(each, images, self.buckets.fit("text", longest))

    def _read(self, question: str) -> str:
        """What the method reads of a question."""
        return question if self.plan.vision is None else self.plan.vision.read(question)

    def _asked(
        self, encoded: Encoded, questions: Sequence[str], width: int
    ) -> tuple[VisionOutput, Questions | None]:
        """What both towers give, and the questions for a method that reads them."""
        vision, asked = encoded.vision, None
        ids = self.padded_questions(questions, encoded.shape.images, width)
        if ids is not None:
            asked = stages.embed_questions(self.arrays, spread(ids, self.mesh), config=self.config)
        parts = self.question_parts(questions, encoded.shape.images, width)
        if self.text_tower is not None:
            vision = stages.compare(
                self.text_tower.arrays,
                vision,
                encoded.packing,
                spread(parts, self.mesh),
                config=self.text_tower.config,
            )
        return vision, asked

    # ---- prompts

    def check_ids(self, rows: Sequence[Row]) -> None:
        """Raise `UserError` for a token id that the model's embedding has no row for."""
        for row in rows:
            self._check_known(itertools.chain(*row.pieces, row.answer))

    def _check_known(self, ids: Iterable[int]) -> None:
        size = self.config.text_config.vocab_size
        for token in ids:
            if not 0 <= token < size:
                text = self.processor.tokenizer.convert_ids_to_tokens(token)
                raise UserError(
                    f"The prompt has the token {text!r} of id {token}, but the model's embedding "
                    f"has {size} rows; tokenizer and weights are not of one model."
                )

    def context_left(self, rows: Sequence[Row], room: ImageRoom) -> np.ndarray:
        """New tokens that each row has place for in the model's context: int `[rows]`.

        Positions count like tokens: those of a whole image may be more than what is left of it.

        Raises:
            UserError: for a row that fills it.
        """
        each = [max(row_length(row, n) for n in (room.counts, room.extents)) for row in rows]
        longest, context = max(each), self.config.text_config.context_length
        if longest >= context:
            pruned = " or prune more" if any(row.images for row in rows) else ""
            raise UserError(
                f"The prompt takes {longest} places with its images, but the model's context "
                f"is {context}; shorten it{pruned}."
            )
        return context - np.array(each)

    def room_of(self, rows: Sequence[Row], seen: Seen) -> RowRoom:
        """The buckets of a batch's rows."""
        room = seen.room
        return self.shapes.of_rows(
            max(text_room(row, room.fixed) for row in rows),
            max(len(row.images) for row in rows),
            room.capacity,
            max(visual_length(row, room.counts) for row in rows),
        )

    def lay_out(
        self, rows: Sequence[Row], seen: Seen, room: RowRoom, *, batch: int, new_slots: int
    ) -> Prompt:
        """Rows and their images as a prompt of a bucket's size."""
        axes = self.config.position_axes
        layout = lay_out(rows, seen.room, batch=batch, sequence=room.slots, axes=axes)
        method, schedule, left = self.plan.decoder, NO_CUTS, None
        if method is not None and room.visual:
            distinct = self.buckets.schedule_lengths
            schedule = (
                gather_schedule(
                    method, self.depth, room, distinct=distinct, multiple=self.shapes.multiple
                )
                if self.gather
                else mask_schedule(method, self.depth, room)
            )
            left = candidates_left(method, self.depth, layout)
        return Prompt(layout, room, schedule, left, len(rows), new_slots)

    def sampling(self, asks: Sequence[Ask], rows: Sequence[Row], *, batch: int) -> Sampling | None:
        """What the rows of a batch ask for, on the devices; None: nothing but likeliest tokens."""
        if all(ask.plain for ask in asks):
            return None
        vocabulary, image = self.config.text_config.vocab_size, self.processor.image_token_id
        known = [] if image is None or image >= vocabulary else [image]
        said = [[*itertools.chain(*row.pieces), *(known if row.images else [])] for row in rows]
        made = make_sampling(asks, said, batch=batch, vocab_size=vocabulary)
        # On the devices once, not with every token of a stream.
        there: Sampling = spread(made, self.mesh) if self.mesh else jax.device_put(made)
        return there

    def embed(self, prompt: Prompt, seen: Seen) -> Tokens:
        """A prompt as the decoder's input."""
        layout = self._layout(prompt)
        with on_mesh(self.mesh):
            tokens: Tokens = stages.embed(self.arrays, layout, seen.selection, config=self.config)
        return tokens

    def read(
        self,
        prompt: Prompt,
        seen: Seen,
        sampling: Sampling | None,
        *,
        logits: bool = False,
        clock: Clock,
    ) -> Read:
        """A prompt through the decoder, up to the first token of every row.

        Args:
            prompt: the rows.
            seen: their images.
            sampling: what they ask for.
            logits: whether all logits are to be noted.
            clock: of the request.
        """
        check_memory(
            self.config,
            batch=prompt.batch,
            slots=prompt.room.slots,
            schedule=prompt.schedule,
            new_slots=prompt.new_slots,
            logits=logits,
            batches=self.buckets.batch,
            devices=devices_sharing(self.mesh, prompt.batch),
            free=free_bytes(self.devices),
        )
        next_position = spread(prompt.layout.next_position, self.mesh)
        left = spread(prompt.left, self.mesh, axis=1)
        shape = {"batch": prompt.batch, **prompt.room._asdict(), "new_tokens": prompt.new_slots}
        with on_mesh(self.mesh), clock.stage("prefill", **shape, greedy=sampling is None):
            tokens = self.embed(prompt, seen)
            found: Read = stages.prefill(
                self.arrays,
                tokens,
                left,
                next_position,
                np.int32(prompt.rows),
                sampling,
                self.eos,
                config=self.config,
                schedule=prompt.schedule,
                new_slots=prompt.new_slots,
                logits=logits,
            )
            return clock.wait(found)

    # ---- answers

    def write(
        self,
        state: DecodeState,
        until: np.ndarray,
        sampling: Sampling | None,
        clock: Clock,
    ) -> DecodeState:
        """A state after so many tokens of every row, `[B]`: one dispatch; it takes the old one."""
        batch, new_slots = state.tokens.shape
        slots = state.caches[0].valid.shape[1]
        shape = {"batch": batch, "slots": slots, "new_tokens": new_slots}
        with on_mesh(self.mesh), clock.stage("decode", **shape, greedy=sampling is None):
            written: DecodeState = stages.decode(
                self.arrays,
                state,
                spread(until.astype(np.int32), self.mesh),
                sampling,
                self.eos,
                config=self.config,
            )
        return written

    # ---- prompts with answers

    def record(
        self, prompt: Prompt, seen: Seen, schedule: Schedule, counts: Any
    ) -> tuple[tuple[np.ndarray, ...], ...]:
        """What a schedule notes down of a prompt in every layer, in mask mode."""
        arguments = (self._layout(prompt), *self._seen(seen, counts))
        with on_mesh(self.mesh):
            found = stages.record(self.arrays, *arguments, config=self.config, schedule=schedule)
        noted: tuple[tuple[np.ndarray, ...], ...] = to_host(found)
        return noted

    def score(
        self, prompt: Prompt, seen: Seen, answers: np.ndarray, schedule: Schedule, counts: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each answer, int32 `[B, A]`, and whether it is what is said."""
        arguments = (self._layout(prompt), *self._seen(seen, counts), spread(answers, self.mesh))
        with on_mesh(self.mesh):
            found = stages.score(self.arrays, *arguments, config=self.config, schedule=schedule)
        scores: tuple[np.ndarray, np.ndarray] = to_host(found)
        return scores

    def _layout(self, prompt: Prompt) -> Embedded:
        """Where every token goes, on the devices."""
        return spread_layout(prompt.layout.embedded, self.config, self.mesh)

    def _seen(self, seen: Seen, counts: Any) -> tuple[Any, Any]:
        """Visual tokens and a schedule's counts, `[L, B]`, on the devices."""
        return spread(seen.selection, self.mesh), spread(counts, self.mesh, axis=1)


def spread_layout(layout: Embedded, config: ModelConfig, mesh: Mesh | None) -> Embedded:
    """Where every token of a batch goes, on a mesh's devices."""
    axis = len(config.position_axes)  # of the rows, in positions
    embedded: Embedded = spread(layout, mesh)
    return embedded._replace(positions=spread(layout.positions, mesh, axis=axis))
