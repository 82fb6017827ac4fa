"""Scoring schedules on calibration samples, in mask mode: one program per batch shape.

The images are encoded once. A row is a prompt with its reference answer behind it; the
answer's tokens are predicted from the pruned prompt, and never vote on what is pruned.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.data.samples import Sample
from jaxprune.engine import stages
from jaxprune.engine.lengths import candidates_left, mask_schedule
from jaxprune.engine.shapes import DEFAULT_BUCKETS, Lengths
from jaxprune.errors import UserError
from jaxprune.inputs.processor import pixel_values
from jaxprune.inputs.request import Layout, Row, lay_out, make_request, text_length
from jaxprune.methods import DecoderMethod, depth_of
from jaxprune.model import Params
from jaxprune.models.registry import family
from jaxprune.ops.cuts import NO_CUTS, Schedule, is_last
from jaxprune.ops.tiles import Patches, pack_tilings, patches_of
from jaxprune.ops.visual import Selection
from jaxprune.progress import track

METRICS = ("accuracy", "logprob")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Calibration rows of one shape, on the host.

    Attributes:
        layout: prompts with their answers.
        visual: the unpruned visual tokens, `[B, M, C]`.
        visual_tokens: int `[B]`, how many a row has; 0 for rows that pad the batch.
        patches: what a vision-side method chooses from, signals that were asked for included.
        answers: int32 `[B, A]`, padded with -1; the end of sequence included.
        rows: rows in use; the others pad the batch.
    """

    layout: Layout
    visual: Selection
    visual_tokens: np.ndarray
    patches: Patches
    answers: np.ndarray
    rows: int


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Encoded samples in batches of one shape.

    Attributes:
        params: the model.
        batches: all of the same shape.
        room: text and visual slots of a row.
    """

    params: Params
    batches: list[Batch]
    room: Lengths

    @property
    def samples(self) -> int:
        return sum(batch.rows for batch in self.batches)

    @property
    def visual_tokens(self) -> np.ndarray:
        """Visual tokens of each sample: int `[samples]`."""
        return np.concatenate([batch.visual_tokens[: batch.rows] for batch in self.batches])


def encode_samples(
    params: Params,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    signals: frozenset[str] = frozenset(),
    with_answers: bool = True,
    show_progress: bool | None = None,
) -> CalibrationSet:
    """Run the vision tower over all samples and lay their rows out.

    Args:
        params: what `jaxprune.load` gives.
        samples: image, question and answer.
        batch_size: rows a batch; a smaller one takes less memory.
        signals: what the tower has to provide besides features.
        with_answers: put the reference answers behind the prompts.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        UserError: for broken images, or prompts over the model's context.
    """
    config, processor = params.config, params.processor
    if processor is None:
        raise UserError("params have no processor; load them with jaxprune.load.")
    if not samples:
        raise UserError("There are no samples; give at least one.")
    requests = []
    for i, sample in enumerate(samples):
        if with_answers and not sample.answer.strip():
            raise UserError(
                f"Sample {i + 1} has no answer, but the score needs one; give answers, or fit "
                "a method that goes by attention alone (fitprune, iti)."
            )
        said = sample.answer if with_answers else None
        try:
            requests.append(
                make_request(processor, sample.image, sample.question, chat=True, answer=said)
            )
        except UserError as error:
            raise UserError(f"Sample {i + 1}: {error}") from None
    rows = [Row(request.rows[0].pieces, [0], request.rows[0].answer) for request in requests]
    images = [request.images[0] for request in requests]
    tilings = [config.tiling(image.height, image.width) for image in images]
    tokens = np.array([tiling.num_tokens + config.keep_cls for tiling in tilings])
    # CLS, where it is a feature, is never pruned, and so counts as text.
    text = DEFAULT_BUCKETS.fit("text", max(map(text_length, rows)) + config.keep_cls)
    for i, (row, number) in enumerate(zip(rows, tokens, strict=True)):
        if text_length(row) + number >= config.text_config.context_length:
            raise UserError(
                f"Sample {i + 1} has {text_length(row)} text and {number} visual tokens, but the "
                f"model's context is {config.text_config.context_length}."
            )
    most = max(1, max(len(row.answer) for row in rows))
    batch_size = min(batch_size, len(rows))
    starts = range(0, len(rows), batch_size)
    tiles = [sum(t.tiles for t in tilings[first : first + batch_size]) for first in starts]
    shape = {
        "images": batch_size,
        "tiles": batch_size if max(tiles) <= batch_size else max(tiles),
        "image_tiles": max(tiling.tiles for tiling in tilings),
        "slots": int(tokens.max()) - config.keep_cls,
    }
    batches = []
    for first in track(starts, "Encoding", len(starts), show=show_progress):
        part, own = rows[first : first + batch_size], slice(first, first + batch_size)
        pixels = pixel_values(processor, images[own], config)
        pixels = np.pad(pixels, ((0, shape["tiles"] - len(pixels)), (0, 0), (0, 0), (0, 0)))
        packing = pack_tilings(tilings[own], **shape)
        vision = stages.encode(params.arrays, pixels, config=config, signals=signals)
        visual = stages.select(
            vision,
            packing,
            config=config,
            method=None,
            capacity=int(tokens.max()),
            images=batch_size,
        )
        patches = patches_of(vision.signals, packing, config.vision_config.num_patches)
        each = [Row(row.pieces, [i], row.answer) for i, row in enumerate(part)]
        layout = lay_out(
            each,
            tokens[own],
            int(tokens.max()),
            batch=batch_size,
            sequence=text + int(tokens.max()),
            fixed=int(config.keep_cls),
        )
        answers = np.full((batch_size, most), -1, np.int32)
        for i, row in enumerate(part):
            answers[i, : len(row.answer)] = row.answer
        counts = np.pad(tokens[own], (0, batch_size - len(part)))
        visual, patches = jax.device_get((visual, patches))
        batches.append(Batch(layout, visual, counts, patches, answers, len(part)))
    return CalibrationSet(params, batches, Lengths(text, int(tokens.max())))


def _through(params: dict, inputs: dict, counts: Any, config: Any, schedule: Schedule) -> Any:
    model = family(config)
    visual = model.visual_embeddings(params, config, inputs["visual"])
    tokens = model.embed(params, config, **{**inputs, "visual": visual})
    return model.prefill(params, config, tokens, new_slots=0, schedule=schedule, counts=counts)


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def run_prompts(params: dict, inputs: dict, counts: Any, *, config: Any, schedule: Schedule) -> Any:
    """A batch through the decoder, caches left out: what `schedule.record` noted."""
    return _through(params, inputs, counts, config, schedule).records


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def _score_answers(
    params: dict,
    inputs: dict,
    counts: Any,
    answers: jax.Array,
    *,
    config: Any,
    schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability `[B]` of each answer, and whether every token is the likeliest."""
    found, kind = _through(params, inputs, counts, config, schedule), inputs["kind"]
    # Mask mode: slots stay where they are. The token at slot s predicts the one behind it.
    last = jnp.argmax(is_last(kind), axis=-1)[:, None]
    slots = jnp.minimum(last + jnp.arange(answers.shape[1]), kind.shape[1] - 1)
    hidden = jnp.take_along_axis(found.tokens.x, slots[..., None], axis=1)
    logits = family(config).logits(params, config, hidden)  # [B, A, V]
    used = answers >= 0
    labels = jnp.maximum(answers, 0)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    right = jnp.all((logits.argmax(-1) == labels) | ~used, axis=-1)
    return jnp.sum(logprob * used, axis=-1), right


def run_set(
    data: CalibrationSet, function: Callable, schedule: Schedule, counts: Callable, *extra: str
) -> Iterator[tuple[Batch, Any]]:
    """`function` on every batch, with what `counts(batch)` gives."""
    for batch in data.batches:
        found = function(
            data.params.arrays,
            {**vars(batch.layout), "visual": batch.visual},
            counts(batch),
            *(getattr(batch, name) for name in extra),
            config=data.params.config,
            schedule=schedule,
        )
        yield batch, jax.device_get(found)


def score(data: CalibrationSet, method: DecoderMethod | None, metric: str = "accuracy") -> float:
    """How well the model answers the samples under a decoder-side method.

    Args:
        data: encoded samples with answers.
        method: what prunes; None scores the unpruned model.
        metric: "accuracy": the share of samples whose every answer token, the end of
            sequence included, is the likeliest given the ones before; "logprob": the mean
            log-probability of an answer token, in nats.
    """
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}; expected one of: {', '.join(METRICS)}.")
    depth = depth_of(data.params.config)
    schedule = NO_CUTS if method is None else mask_schedule(method, depth, data.room)

    def counts(batch: Batch) -> np.ndarray | None:
        if method is None:
            return None
        return candidates_left(method, depth, batch.layout.kind, batch.visual_tokens)

    total, tokens, right = 0.0, 0, 0
    for batch, found in run_set(data, _score_answers, schedule, counts, "answers"):
        logprob, exact = (x[: batch.rows] for x in found)
        total += float(np.sum(logprob, dtype=np.float64))
        tokens += int((batch.answers[: batch.rows] >= 0).sum())
        right += int(exact.sum())
    return right / data.samples if metric == "accuracy" else total / tokens
