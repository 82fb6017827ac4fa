"""Scoring schedules on calibration samples, in mask mode: one program per batch shape.

The images are encoded once. A row is a prompt with its reference answer after it; the
answer's tokens are predicted from the pruned prompt, and never vote on what is pruned.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.data.samples import Sample
from jaxprune.engine.buckets import DEFAULT_BUCKETS
from jaxprune.engine.engine import Clock, Engine, Prompt, Seen
from jaxprune.engine.schedules import candidates_left, mask_schedule
from jaxprune.engine.shapes import ImageShape, RowRoom
from jaxprune.errors import UserError, check_choice, check_whole
from jaxprune.inputs.layout import text_length
from jaxprune.inputs.pixels import pixel_values, size_of
from jaxprune.inputs.request import Request, Row, make_request
from jaxprune.methods import Plan
from jaxprune.methods.resolve import resolve
from jaxprune.model import Params
from jaxprune.models.registry import depth_of
from jaxprune.ops.cuts import NO_CUTS, Schedule
from jaxprune.ops.tiles import Patches, Tiling, patches_of
from jaxprune.ops.visual import Signal
from jaxprune.progress import track

METRICS = ("accuracy", "logprob")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Calibration rows of one shape, on the host.

    Attributes:
        prompt: prompts with their answers.
        seen: the visual tokens.
        patches: what a vision-side method chooses from, signals that were asked for included.
        answers: int32 `[B, A]`, padded with -1; the end of sequence included.
    """

    prompt: Prompt
    seen: Seen
    patches: Patches
    answers: np.ndarray

    @property
    def rows(self) -> int:
        """Rows in use; the others pad the batch."""
        return self.prompt.rows


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Encoded samples in batches of one shape.

    Attributes:
        engine: the model's, without a plan.
        batches: all of the same shape.
    """

    engine: Engine
    batches: list[Batch]

    @property
    def samples(self) -> int:
        return sum(batch.rows for batch in self.batches)

    @property
    def room(self) -> RowRoom:
        """Text and visual slots of a row."""
        return self.batches[0].prompt.room

    @property
    def visual_tokens(self) -> np.ndarray:
        """Visual tokens of each sample: int `[samples]`."""
        each = [batch.prompt.layout.visual[: batch.rows] for batch in self.batches]
        return np.concatenate(each)


def encode_samples(
    params: Params,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    method: Any = "none",
    signals: frozenset[Signal] = frozenset(),
    with_answers: bool = True,
    show_progress: bool | None = None,
) -> CalibrationSet:
    """Run the vision tower over all samples, prune what it gives and lay their rows out.

    Args:
        params: what `jaxprune.load` gives.
        samples: image, question and answer.
        method: as for `jaxprune.generate`; of a pair, or a method of both sides, its vision side
            prunes here, and `score` takes the same again.
        batch_size: rows a batch; a smaller one takes less memory.
        signals: what the tower has to provide besides features.
        with_answers: put the reference answers after the prompts.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        UserError: for broken images, or prompts over the model's context.
    """
    if not isinstance(samples, Sequence) or isinstance(samples, str | bytes):
        raise UserError(f"samples is a {type(samples).__name__}; expected a list of Sample.")
    check_whole("batch_size", batch_size)
    if not samples:
        raise UserError("There are no samples; give at least one.")
    plan = resolve(method, depth_of(params.config))
    engine = Engine(params, Plan(vision=plan.vision), DEFAULT_BUCKETS, signals=signals)
    requests = [_request(engine, i, sample, with_answers) for i, sample in enumerate(samples)]
    tilings = [engine.config.tiling(size_of(request.images[0])) for request in requests]
    _check_context(engine, requests, tilings)
    whole = engine.unpruned(tilings)
    fixed = (text_length(r.rows[0]) + int(n) for r, n in zip(requests, whole.fixed, strict=True))
    most = max(1, *(len(request.rows[0].answer) for request in requests))
    batch_size = min(batch_size, len(requests))
    starts = range(0, len(requests), batch_size)
    parts = [slice(first, first + batch_size) for first in starts]
    tiles = max(sum(tiling.tiles for tiling in tilings[part]) for part in parts)
    images = ImageShape(batch_size, max(tiling.tiles for tiling in tilings), whole.capacity)
    visual = engine.shapes.fixed_capacity(images) or engine.shapes.most_left(images)
    room = RowRoom(DEFAULT_BUCKETS.fit("text", max(fixed)), visual)
    batches = [
        _batch(engine, requests[part], tilings[part], images, max(tiles, batch_size), room, most)
        for part in track(parts, "Encoding", len(parts), show=show_progress)
    ]
    return CalibrationSet(engine, batches)


def _request(engine: Engine, i: int, sample: Sample, with_answers: bool) -> Request:
    if not isinstance(sample, Sample):
        raise UserError(
            f"Sample {i + 1} is a {type(sample).__name__}; expected a jaxprune.calibrate.Sample."
        )
    if with_answers and not sample.answer.strip():
        raise UserError(
            f"Sample {i + 1} has no answer, but the score needs one; give answers, or fit "
            "a method that goes by attention alone (fitprune, iti)."
        )
    said = [sample.answer] if with_answers else None
    try:
        return make_request(
            engine.processor, sample.image, sample.question, chat=True, answers=said
        )
    except UserError as error:
        raise UserError(f"Sample {i + 1}: {error}") from None


def _check_context(engine: Engine, requests: Sequence[Request], tilings: Sequence[Tiling]) -> None:
    engine.check_ids([row for request in requests for row in request.rows])
    context = engine.config.text_config.context_length
    for i, (request, tiling) in enumerate(zip(requests, tilings, strict=True)):
        text = text_length(request.rows[0])
        if text + tiling.num_tokens >= context:
            raise UserError(
                f"Sample {i + 1} has {text} text and {tiling.num_tokens} visual tokens, but the "
                f"model's context is {context}."
            )


def _batch(
    engine: Engine,
    requests: Sequence[Request],
    tilings: Sequence[Tiling],
    shape: ImageShape,
    tiles: int,
    room: RowRoom,
    longest_answer: int,
) -> Batch:
    """Encode some samples and lay them out."""
    pictures = [request.images[0] for request in requests]
    pixels = pixel_values(engine.processor, pictures, engine.config)
    encoded = engine.encode(pixels, tilings, shape, Clock(), tiles=tiles)
    seen = engine.select(
        encoded,
        batch=shape.images,
        row_images=1,
        questions=[request.questions[0] for request in requests],
        capacity=room.visual,
        clock=Clock(),
    )
    N = engine.config.tower.tokens_per_tile
    patches = patches_of(encoded.vision.signals, encoded.packing, N)
    rows = [Row(r.rows[0].pieces, [i], r.rows[0].answer) for i, r in enumerate(requests)]
    prompt = engine.lay_out(rows, seen, room, batch=shape.images, new_slots=0)
    answers = np.full((shape.images, longest_answer), -1, np.int32)
    for own, row in zip(answers, rows, strict=False):
        own[: len(row.answer)] = row.answer
    selection, patches = jax.device_get((seen.selection, patches))
    return Batch(prompt, dataclasses.replace(seen, selection=selection), patches, answers)


def recorded(
    data: CalibrationSet, schedule: Schedule, counts: Sequence[object]
) -> Iterator[tuple[Batch, tuple[tuple[np.ndarray, ...], ...]]]:
    """Every batch with what a schedule notes down of it.

    Args:
        data: encoded samples.
        schedule: in mask mode.
        counts: the schedule's, one for each batch.
    """
    for batch, own in zip(data.batches, counts, strict=True):
        yield batch, data.engine.record(batch.prompt, batch.seen, schedule, own)


def score(data: CalibrationSet, method: Any = "none", metric: str = "accuracy") -> float:
    """How well the model answers the samples under a method.

    Args:
        data: encoded samples with answers.
        method: as for `jaxprune.generate`. Its decoder side prunes here; a vision side it has
            to share with the samples, which are encoded under it.
        metric: "accuracy": the share of samples whose every answer token, the end of
            sequence included, is the likeliest given the ones before; "logprob": the mean
            log-probability of an answer token, in nats.
    """
    check_choice("metric", metric, METRICS)
    depth = data.engine.depth
    vision, decoder = resolve(method, depth)
    if vision is not None and vision != data.engine.plan.vision:
        raise UserError(
            f"The method prunes images by {vision.name}, under which these samples are not "
            "encoded; pass the method to encode_samples too."
        )
    if not any((batch.answers >= 0).any() for batch in data.batches):
        raise UserError("The samples are encoded without answers, which the score needs.")
    schedule = NO_CUTS if decoder is None else mask_schedule(decoder, depth, data.room)
    total, tokens, right = 0.0, 0, 0
    for batch in data.batches:
        layout = batch.prompt.layout
        counts = None if decoder is None else candidates_left(decoder, depth, layout)
        found = data.engine.score(batch.prompt, batch.seen, batch.answers, schedule, counts)
        logprob, exact = (x[: batch.rows] for x in found)
        total += float(np.sum(logprob, dtype=np.float64))
        tokens += int((batch.answers[: batch.rows] >= 0).sum())
        right += int(exact.sum())
    return right / data.samples if metric == "accuracy" else total / tokens
