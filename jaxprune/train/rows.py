"""Samples as the micro-batches of a training run, in an order that can be taken up again."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from jaxprune.data.lines import is_data_url
from jaxprune.engine.buckets import DEFAULT_BUCKETS, Buckets
from jaxprune.engine.engine import Engine
from jaxprune.engine.forward import Batch, batch_of
from jaxprune.errors import UserError, check_flag, check_whole
from jaxprune.inputs.images import check_image_file, picture_of
from jaxprune.inputs.layout import row_length, text_length, text_room
from jaxprune.inputs.pixels import size_of
from jaxprune.inputs.request import NO_LABEL, Request, Row
from jaxprune.inputs.videos import Visual
from jaxprune.methods.resolve import resolve
from jaxprune.methods.written import with_options
from jaxprune.model import Params, complete
from jaxprune.models.registry import depth_of
from jaxprune.ops.tiles import Tiling, VisualSize
from jaxprune.progress import track
from jaxprune.train.data import Conversation, conversation_of, kept
from jaxprune.train.order import Position, micro_batches
from jaxprune.train.prefetch import prefetched
from jaxprune.train.settings import Settings
from jaxprune.train.turns import row_of, rows_of

ALL_TURNS = -1
BEGINNING = Position()


class MicroBatch(NamedTuple):
    """What goes through the model at once.

    Attributes:
        batch: for `jaxprune.forward`. Rows that fill it up have no labels.
        next: what comes after it.
        left_out: what is wrong with rows whose labels are left out, since their images are
            damaged.
        samples: where its rows come from, for messages.
    """

    batch: Batch
    next: Position
    left_out: tuple[str, ...]
    samples: tuple[str, ...] = ()


Batches = Generator[MicroBatch, None, None]
"""Without an end; closing it ends its thread."""


class _Place(NamedTuple):
    """A row: a turn of a conversation, or `ALL_TURNS`, and the room that it needs."""

    sample: int
    turn: int
    images: int
    text: int


class Rows:
    """The rows of samples under a plan, and the batches of a run.

    Where the decoder drops tokens by what is asked last, or a method looks at an image by the
    question, each turn of a conversation is a row, with the turns before it as context; else a
    conversation with its images in the first turn is one row with several answers.

    All samples are tokenized here once, to know their lengths, and again when their turn comes;
    images are read when their turn comes, and here their headers. Batches have few shapes: for each
    number of images of a row and each text bucket one, and where images differ in tiles or an
    adaptive method in what it leaves, one for each bucket of those.

    Args:
        params: what `jaxprune.load` gives. How many tokens an adaptive method leaves of an image
            is found out with them.
        samples: what `read_data` gives, or a list of `jaxprune.calibrate.Sample`.
        settings: the run's.
        max_length: text and visual tokens of a row, at most; None: what the model's context and
            the buckets hold. An adaptive method's visual tokens count as if none were pruned.
        skip: leave out samples of which a row is too long or cannot be asked, and the labels of
            rows whose images turn out damaged; else they are errors.
        buckets: for text, tiles and visual tokens; a batch's rows are `settings.micro_batch`.
        show_progress: a bar on stderr; None shows it in a terminal.

    Attributes:
        engine: of the model under the plan.
        samples: those that are left.
        digest: of the samples and what the order follows from; 16 hex digits. Of images that are
            files it holds the places in the folder of all of them.

    Raises:
        UserError: for a method that the model cannot follow, and for samples that are too long or
            cannot be asked: the first ten and how many.
    """

    def __init__(
        self,
        params: Params,
        samples: Sequence[Any],
        settings: Settings,
        *,
        max_length: int | None = None,
        skip: bool = False,
        buckets: Buckets = DEFAULT_BUCKETS,
        show_progress: bool | None = None,
    ) -> None:
        check_flag("skip", skip)
        if max_length is not None:
            check_whole("max_length", max_length)
        if not isinstance(samples, Sequence) or isinstance(samples, str | bytes) or not samples:
            raise UserError("samples are no list with at least one; give what read_data gives.")
        model = complete(params, None, None)
        asked = with_options(settings.method)
        plan = resolve(asked.pop("method"), depth_of(model.config), **asked)
        size = settings.micro_batch
        images = tuple(size * n for n in buckets.row_images)
        buckets = dataclasses.replace(buckets, batch=(size,), images=images)
        self.engine = Engine(model, plan, buckets, gather=settings.gather is not False)
        if not self.engine.processor.eos_token_ids:
            raise UserError("The model has no token that ends an answer; its directory names none.")
        self.settings, self.skip = settings, skip
        self.together = plan.decoder is None and not self.engine.reads_question
        if self.engine.config.one_tile:
            self.engine.check_images([], [self._one_tile])
        context = model.config.text_config.context_length - 1
        self.longest = context if max_length is None else min(context, max_length)
        numbered = track(enumerate(samples, 1), "Reading", len(samples), show=show_progress)
        found: list[tuple[Conversation, list[_Place]]] = []
        wrong: list[str] = []
        for number, sample in numbered:
            try:
                conversation = conversation_of(sample, f"Sample {number}")
                found.append((conversation, self._places(len(found), conversation)))
            except UserError as error:
                wrong.append(str(error))
        found = kept(found, wrong, "the data", skip=skip)
        self.samples = [conversation for conversation, _ in found]
        self.places: Int[np.ndarray, "R 4"] = np.array([p for _, own in found for p in own])
        self.digest = self._digest()

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.places)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an epoch; every epoch has as many."""
        _, rows = np.unique(self.places[:, 2], return_counts=True)
        return sum(-(-int(number) // self.settings.micro_batch) for number in rows)

    def updates(self, epochs: float = 1.0) -> int:
        """Updates that some epochs take; the last one may begin another epoch."""
        each = self.settings.batch_size // self.settings.micro_batch
        return math.ceil(epochs * self.micro_batches / each)

    def order(self, epoch: int) -> list[Int[np.ndarray, " r"]]:
        """The rows of each of an epoch's micro-batches."""
        size, seed = self.settings.micro_batch, self.settings.seed
        return micro_batches(self.places[:, 2:], size, seed=seed, epoch=epoch)

    def batches(self, position: Position = BEGINNING, *, ahead: int = 2) -> Batches:
        """Micro-batches from a position on, epoch after epoch without an end.

        Args:
            position: where to begin.
            ahead: how many a thread makes while others are used; 0: each when it is asked for.

        Raises:
            UserError: for a position that there is not; later for a damaged image, where these
                are not skipped.
        """
        if position.batch >= (number := self.micro_batches):
            raise UserError(
                f"The data has {number} micro-batches, but the run is to go on at number "
                f"{position.batch + 1}; it was begun with other data or settings."
            )
        made = self._batches(position)
        return prefetched(made, ahead) if ahead else made

    def _batches(self, position: Position) -> Batches:
        first = position.batch
        for epoch in itertools.count(position.epoch):
            order = self.order(epoch)
            for number in range(first, len(order)):
                last = number + 1 == len(order)
                after = Position(epoch + 1) if last else Position(epoch, number + 1)
                yield self._batch(order[number], after)
            first = 0

    def _batch(self, numbers: Int[np.ndarray, " r"], after: Position) -> MicroBatch:
        """Some rows, and rows without labels in the place of those that are missing."""
        rows: list[Row] = []
        images: list[Visual] = []
        left_out: list[str] = []
        for i, number in enumerate(np.resize(numbers, self.settings.micro_batch)):  # goes round
            row, pictures, wrong = self._read(number)
            if wrong is not None or i >= len(numbers):
                row = dataclasses.replace(row, labels=[NO_LABEL] * len(row.answer))
            if wrong is not None and i < len(numbers):
                left_out.append(wrong)
            rows.append(dataclasses.replace(row, images=[len(images) + n for n in row.images]))
            images += pictures
        batch = batch_of(self.engine, Request(rows, images, single=False))
        samples = [self.samples[number].where for number in self.places[numbers, 0]]
        return MicroBatch(batch, after, tuple(left_out), tuple(samples))

    def _read(self, number: int) -> tuple[Row, list[Image.Image], str | None]:
        """A row, its images, and what is wrong with one of them, in whose place is a blank."""
        place = _Place(*self.places[number].tolist())
        sample, processor = self.samples[place.sample], self.engine.processor
        if place.turn == ALL_TURNS:
            (row,) = rows_of(processor, sample, together=True)
        else:
            row = row_of(processor, sample, place.turn)
        pictures: list[Image.Image] = []
        wrong = None
        for image in sample.images[: len(row.images)]:
            try:
                pictures.append(picture_of(image))
            except UserError as error:
                wrong = f"{sample.where}: {error}"
                if not self.skip:
                    raise UserError(wrong) from None
                size = self.engine.config.tower.tile_size
                pictures.append(Image.new("RGB", (size, size)))
        return row, pictures, wrong

    def _places(self, number: int, sample: Conversation) -> list[_Place]:
        """The rows of a sample, which all have to fit."""
        try:
            for image in filter(_is_path, sample.images):
                check_image_file(image)
            rows = rows_of(self.engine.processor, sample, together=self.together)
            self.engine.check_ids(rows)
            together = len(rows) < len(sample.turns)
            return [
                _Place(number, ALL_TURNS if together else turn, *self._needed(sample, row))
                for turn, row in enumerate(rows)
            ]
        except UserError as error:
            raise UserError(f"{sample.where}: {error}") from None

    def _needed(self, sample: Conversation, row: Row) -> tuple[int, int]:
        """Buckets of a row's images and text.

        Raises:
            UserError: for a row that is too long.
        """
        length = self._longest(sample, row)
        if length > self.longest:
            raise UserError(
                f"It has {length} tokens with its images and answers; expected at most "
                f"{self.longest}."
            )
        buckets = self.engine.buckets
        fixed = self.engine.unpruned([self._one_tile]).fixed.repeat(len(row.images))
        images = buckets.fit("row_images", len(row.images)) if row.images else 0
        return images, buckets.fit("text", text_room(row, fixed))

    def _longest(self, sample: Conversation, row: Row) -> int:
        """Tokens of a row with its images, at most."""
        engine, config = self.engine, self.engine.config
        if not row.images:
            return text_length(row)
        if config.one_tile:
            tilings = [self._one_tile] * len(row.images)
        else:
            most = text_length(row) + len(row.images) * config.most_tokens(config.most_tiles)
            if most <= self.longest:
                return most
            # Few rows come so close to the limit that the sizes of their images matter.
            pictures = [picture_of(image) for image in sample.images[: len(row.images)]]
            tilings = [config.tiling(size_of(picture)) for picture in pictures]
        shape = engine.shapes.of_images(len(tilings), max(tiling.tiles for tiling in tilings))
        counts = engine.known_counts(tilings, shape)
        if counts is None:
            counts = engine.unpruned(tilings).counts
            counts = counts + engine.shapes.most_left(shape) - shape.slots
        room = engine.room_for(tilings, counts, 0)
        return max(row_length(row, n) for n in (room.counts, room.extents))

    @functools.cached_property
    def _one_tile(self) -> Tiling:
        """How an image of a tile's size is seen."""
        size = self.engine.config.tower.tile_size
        return self.engine.config.tiling(VisualSize(size, size))

    def _digest(self) -> str:
        found = hashlib.sha256(np.array([self.settings.micro_batch]).tobytes())
        found.update(self.places.tobytes())
        paths = [pathlib.Path(x) for one in self.samples for x in one.images if _is_path(x)]
        folder = os.path.commonpath([str(path.absolute().parent) for path in paths] or ["."])
        for sample in self.samples:
            said = [sample.system, sample.turns, len(sample.images)]
            found.update(json.dumps(said).encode())
            for image in sample.images:
                found.update(_shown(image, folder))
        return found.hexdigest()[:16]


def _is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike) and not is_data_url(os.fspath(image))


def _shown(image: Any, folder: str) -> bytes:
    """What tells an image from others: a file's place in the folder of all, or what is in it."""
    if _is_path(image):
        return os.path.relpath(pathlib.Path(image).absolute(), folder).encode(errors="replace")
    return image.encode() if isinstance(image, str) else picture_of(image).tobytes()
