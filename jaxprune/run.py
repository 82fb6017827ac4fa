"""One request on its way through the stages: what `generate` and `stream` drive.

    request.py     image + prompt -> rows of token ids, RGB images              (host)
    stages.py      encode, count, select, embed, prefill, decode                (jit)

Every array that enters a jitted stage has the size of a bucket (`shapes.py`). One number
an image comes back to the host before the prompt is laid out: how many tokens are kept.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import stages
from jaxprune.accounting import Cost, executed, prompt_cost
from jaxprune.checkpoints_convert.plan import flat_shapes, flatten
from jaxprune.errors import UserError
from jaxprune.loading import Params
from jaxprune.methods import Plan, RandomPlaces, depth_of, resolve
from jaxprune.ops.schedule import NO_CUTS, Schedule
from jaxprune.ops.visual import Selection
from jaxprune.processing import Processor, decode_text, pixel_values
from jaxprune.request import (
    Layout,
    Request,
    Row,
    lay_out,
    make_request,
    row_lengths,
    text_length,
    visual_length,
)
from jaxprune.sampling import make_sampling
from jaxprune.schedules import Lengths, candidates_left, gather_schedule
from jaxprune.shapes import Buckets


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's answer in detail.

    Attributes:
        text: the answer.
        token_ids: its tokens, the end-of-sequence token left out.
        finish_reason: "eos", "stop" (a stop string) or "length".
        prompt_tokens: tokens that entered the decoder, visual ones included.
        visual_tokens: for each image, how many of them were visual.
        unpruned_visual_tokens: for each image, how many there are without pruning.
        kept_indices: for each image, the patches that stayed, int32, in the decoder's
            order; -1 for a token that stands for several.
        kept_by_layer: for each decoder layer that drops tokens, for each image, the patches
            that are left behind it.
        cost: tokens, multiply-adds and cache bytes in every decoder layer, exact and as
            executed in padded shapes.
        seconds: wall time of the whole batch by stage: "preprocess", "encode", "select",
            "prefill", "decode". A first call includes compilation.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    visual_tokens: list[int]
    unpruned_visual_tokens: list[int]
    kept_indices: list[np.ndarray]
    kept_by_layer: dict[int, list[np.ndarray]]
    cost: Cost
    seconds: dict[str, float]


class Run:
    """One request on its way through the stages; `generate` and `stream` drive it."""

    def __init__(
        self,
        params: Params | Mapping[str, Any],
        image: Any,
        prompt: Any,
        *,
        method: Any,
        method_options: dict[str, Any],
        max_new_tokens: int,
        sampling_options: dict[str, Any],
        seed: int | Sequence[int],
        stop: str | Sequence[str],
        chat: bool,
        config: Any,
        processor: Processor | None,
        buckets: Buckets,
    ) -> None:
        self.params, self.config, self.processor = _unpack(params, config, processor)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise UserError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
        self.stop = [stop] if isinstance(stop, str) else list(_checked_stop(stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop is {stop!r}; expected strings that are not empty.")
        if not isinstance(buckets, Buckets):
            raise UserError(f"buckets is a {type(buckets).__name__}; expected jaxprune.Buckets.")
        self.plan, self.buckets = _resolve(method, self.config, seed, method_options), buckets
        self.max_new_tokens = max_new_tokens
        self.seconds: dict[str, float] = {}
        if self.plan.vision is not None:
            self.plan.vision.check(self.config.num_image_tokens - self.config.keep_cls)

        with self._timed("preprocess"):
            self.request: Request = make_request(self.processor, image, prompt, chat=chat)
            rows = len(self.request.rows)
            self.batch = buckets.fit("batch", rows)
            seeds = _seeds(seed, rows)
            if len(seeds) != rows:
                raise UserError(f"{len(seeds)} seeds came for {rows} prompts; give one for each.")
            self.sampling = make_sampling(
                **sampling_options,
                seeds=seeds + [0] * (self.batch - rows),
                vocab_size=self.config.text_config.vocab_size,
            )
            self.greedy = sampling_options["temperature"] == 0
            self.eos = np.asarray(self.processor.eos_token_ids or (-1,), np.int32)
            # Before any work on an accelerator: the part of the length that is known now.
            self._check_context(np.zeros(len(self.request.images), int))

    def start(self) -> None:
        """Everything up to the first token of every row."""
        selection = self._visual_tokens() if self.request.images else None
        counts = np.zeros(0, int) if selection is None else np.asarray(selection.counts)
        longest = self._check_context(counts)
        self.max_new_tokens = min(
            self.max_new_tokens, self.config.text_config.context_length - longest
        )
        capacity = 0 if selection is None else selection.tokens.shape[1]
        room = self._room(capacity)
        self.layout: Layout = lay_out(
            self.request.rows, counts, capacity, batch=self.batch, sequence=sum(room)
        )
        self.schedule, left = self._schedule(room, counts)
        with self._timed("prefill"):
            tokens = stages.embed(
                self.params,
                self.layout.token_ids,
                self.layout.visual_index,
                self.layout.kind,
                self.layout.lengths,
                None if selection is None else selection.tokens,
                config=self.config,
            )
            self.state, self.first_logits, self.survivors = jax.block_until_ready(
                stages.prefill(
                    self.params,
                    tokens,
                    left,
                    self.layout.lengths,
                    np.int32(len(self.request.rows)),
                    self.sampling,
                    self.eos,
                    config=self.config,
                    schedule=self.schedule,
                    new_slots=self.buckets.fit("new_tokens", self.max_new_tokens),
                    greedy=self.greedy,
                )
            )
        self.counts, self.capacity = counts, capacity
        self.indices = None if selection is None else np.asarray(selection.indices)
        self._fetch()

    def _room(self, capacity: int) -> Lengths:
        """The buckets of the batch's rows, whose images have `capacity` slots each."""
        rows, fit = self.request.rows, self.buckets.fit
        # A row that ends with an image keeps its last visual token, which then counts as text.
        text = fit("text", max(text_length(row) + (not row.pieces[-1]) for row in rows))
        images = max(len(row.images) for row in rows)
        return Lengths(text, fit("row_images", images) * capacity if images else 0)

    def _schedule(self, room: Lengths, counts: np.ndarray) -> tuple[Schedule, np.ndarray | None]:
        """What the decoder drops, and how many candidates it leaves: int32 `[L, B]`."""
        method, depth = self.plan.decoder, depth_of(self.config)
        if method is None or not room.visual:
            return NO_CUTS, None
        schedule = gather_schedule(method, depth, room, distinct=self.buckets.schedule_lengths)
        visual = np.zeros(self.batch, int)
        visual[: len(self.request.rows)] = [visual_length(r, counts) for r in self.request.rows]
        return schedule, candidates_left(method, depth, self.layout.kind, visual)

    def advance(self, tokens: int) -> None:
        """Generate up to so many more tokens in every row that is not done."""
        until = np.int32(min(self.step + tokens, self.max_new_tokens))
        with self._timed("decode"):
            self.state = stages.decode(
                self.params,
                self.state,
                until,
                self.sampling,
                self.eos,
                config=self.config,
                greedy=self.greedy,
            )
            self._fetch()

    @property
    def finished(self) -> bool:
        if self.step >= self.max_new_tokens:
            return True
        rows = range(len(self.request.rows))
        return all(self._text(b)[2] != "length" for b in rows)

    def texts(self) -> list[str]:
        """The answers so far."""
        return [self._text(b)[0] for b in range(len(self.request.rows))]

    def answers(self) -> list[Answer]:
        """The answers so far in detail; a row that goes on has the finish reason "length"."""
        return [self._answer(b) for b in range(len(self.request.rows))]

    def safe_part(self, text: str) -> str:
        """What of an unfinished text can be shown: no half character, no half stop string."""
        text = text.rstrip("\ufffd")
        sizes = [
            n for string in self.stop for n in range(1, len(string)) if text.endswith(string[:n])
        ]
        return text[: len(text) - max(sizes, default=0)]

    def _visual_tokens(self) -> Selection:
        """Encode all images of the batch and prune them."""
        config, method = self.config, self.plan.vision
        with self._timed("preprocess"):
            pixels = pixel_values(
                self.processor, self.request.images, config.vision_config.image_size
            )
            padding = self.buckets.fit("images", len(pixels)) - len(pixels)
            pixels = np.pad(pixels, ((0, padding), (0, 0), (0, 0), (0, 0)))
        with self._timed("encode"):
            signals = frozenset() if method is None else method.signals
            vision = stages.encode(self.params, pixels, config=config, signals=signals)
            jax.block_until_ready(vision)
        images, N = vision.features.shape[:2]
        if method is None:
            return Selection(
                tokens=vision.features,
                counts=jnp.full(images, N, jnp.int32),
                indices=jnp.tile(jnp.arange(N, dtype=jnp.int32) - config.keep_cls, (images, 1)),
            )
        with self._timed("select"):
            patches = N - config.keep_cls
            capacity = method.fixed_count(patches)
            if capacity is None:
                # The one number an image that the host has to know.
                counts = np.asarray(stages.count(vision, config=config, method=method))
                most = int(counts[: len(self.request.images)].max())
                bucket = self.buckets.fit("visual", most)
                capacity = min(bucket - config.keep_cls, patches + method.extra_tokens)
            selection = stages.select(
                vision, config=config, method=method, capacity=capacity + config.keep_cls
            )
            return jax.block_until_ready(selection)

    def _check_context(self, counts: np.ndarray) -> int:
        longest = max(row_lengths(self.request.rows, counts))
        context = self.config.text_config.context_length
        if longest >= context:
            raise UserError(
                f"The prompt is {longest} tokens long with its images, but the model's context "
                f"is {context}; shorten it{' or prune more' if self.request.images else ''}."
            )
        return longest

    def _fetch(self) -> None:
        rows = len(self.request.rows)
        fetched = jax.device_get(
            (self.state.step, self.state.tokens, self.state.lengths, self.state.done)
        )
        self.step = int(fetched[0])
        self.tokens, self.lengths, self.done = (array[:rows] for array in fetched[1:])

    def _text(self, b: int) -> tuple[str, list[int], str]:
        """Text, token ids and finish reason of a row so far."""
        ids = self.tokens[b, : self.lengths[b]].tolist()
        text, reason = decode_text(self.processor, ids), "eos" if self.done[b] else "length"
        # Of several stop strings the one that is complete first, however far decoding went on.
        found = [(text.find(s) + len(s), text.find(s)) for s in self.stop if s in text]
        if found:
            text, reason = text[: min(found)[1]], "stop"
        return text, ids, reason

    def _answer(self, b: int) -> Answer:
        row = self.request.rows[b]
        text, ids, reason = self._text(b)
        first = int(self.config.keep_cls)
        indices = self.indices if self.indices is not None else np.zeros((0, 0), np.int32)
        kept = [indices[i, first : self.counts[i]] for i in row.images]
        return Answer(
            text=text,
            token_ids=ids,
            finish_reason=reason,
            prompt_tokens=row_lengths([row], self.counts)[0],
            visual_tokens=[int(self.counts[i]) for i in row.images],
            unpruned_visual_tokens=[self.config.num_image_tokens] * len(row.images),
            kept_indices=kept,
            kept_by_layer=self._kept_by_layer(b),
            cost=self._cost(row),
            seconds=dict(self.seconds),
        )

    def _kept_by_layer(self, b: int) -> dict[int, list[np.ndarray]]:
        """For each layer that drops tokens, the patches of each image that are left."""
        found: dict[int, list[np.ndarray]] = {}
        if self.indices is None:
            return found
        first = int(self.config.keep_cls)
        for layer, (positions, valid) in zip(self.schedule.layers, self.survivors, strict=True):
            # Before anything is dropped, a token's position is its slot.
            slots = np.asarray(positions)[b][np.asarray(valid)[b]]
            visual = self.layout.visual_index[b, slots]
            image, place = np.divmod(visual[visual >= 0], max(self.capacity, 1))
            found[layer] = [
                self.indices[i, place[(image == i) & (place >= first)]]
                for i in self.request.rows[b].images
            ]
        return found

    def _cost(self, row: Row) -> Cost:
        found = prompt_cost(
            self.config,
            self.plan,
            text_tokens=text_length(row),
            unpruned_visual_tokens=self.config.num_image_tokens * len(row.images),
            visual_tokens=visual_length(row, self.counts),
        )
        slots, new = self.layout.token_ids.shape[1], self.state.tokens.shape[1]
        run = executed(self.config, slots, self.schedule, new_slots=new)
        return dataclasses.replace(found, executed=run)

    def _timed(self, stage: str) -> "_Timer":
        return _Timer(self.seconds, stage)


class _Timer:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        spent = time.perf_counter() - self.began
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + spent


def _checked_stop(stop: Any) -> Sequence[str]:
    if not isinstance(stop, list | tuple):
        raise UserError(f"stop is {stop!r}; expected a string or a list of them.")
    return stop


def _seeds(seed: Any, rows: int) -> list[int]:
    if isinstance(seed, int | np.integer):
        return [int(seed)] * rows
    if isinstance(seed, list | tuple | np.ndarray):
        return [int(s) if isinstance(s, np.integer) else s for s in seed]
    raise UserError(f"seed is {seed!r}; expected a whole number, or a list with one a prompt.")


def _resolve(method: Any, config: Any, seed: Any, options: dict[str, Any]) -> Plan:
    """A named method that draws at random takes the request's seed."""
    parts = method if isinstance(method, tuple | list) else [method]
    if any(part == RandomPlaces.name for part in parts) and isinstance(seed, int):
        options = {"seed": seed, **options}
    return resolve(method, config, **options)


def _check_arrays(params: Mapping[str, Any], config: Any) -> None:
    """Raise `UserError` unless bare params have the names and shapes of the config's model."""
    expected = flat_shapes(config)
    try:
        found = flatten(dict(params))
    except (AttributeError, TypeError):
        raise UserError("params are no nested dicts of arrays; expected what load gives.") from None
    shapes = {path: getattr(leaf, "shape", None) for path, leaf in found.items()}
    wrong = [
        f"{path} is {shapes.get(path, 'missing')}, expected {leaf.shape}"
        for path, leaf in expected.items()
        if shapes.get(path) != leaf.shape
    ]
    wrong += [f"{path} is unknown" for path in found if path not in expected]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"params do not fit the config: {'; '.join(wrong[:3])}{more}.")


def _unpack(
    params: Params | Mapping[str, Any], config: Any, processor: Processor | None
) -> tuple[dict[str, Any], Any, Processor]:
    if isinstance(params, Params):
        config = params.config if config is None else config
        processor = params.processor if processor is None else processor
        params = params.arrays
    elif not isinstance(params, Mapping):
        raise UserError(
            f"params is a {type(params).__name__}; expected what jaxprune.load gives, or a "
            "nested dict of arrays."
        )
    elif config is None or processor is None:
        raise UserError("Bare params need config= and processor=; jaxprune.load gives all three.")
    else:
        _check_arrays(params, config)
    if not isinstance(processor, Processor):
        raise UserError(f"processor is a {type(processor).__name__}; expected a Processor.")
    return dict(params), config, processor
