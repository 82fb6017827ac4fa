"""From an image and a prompt to an answer: the one place that composes the stages.

    request.py     image + prompt -> rows of token ids, RGB images              (host)
    encode         pixels -> features and signals                               (jit)
    count, select  -> visual tokens that are left                               (jit)
    embed          project, merge into the text embeddings                      (jit)
    prefill        all layers, dropping tokens -> first token, caches           (jit)
    decode         a loop of single steps, caches donated                       (jit)

Every array that enters a jitted stage has the size of a bucket (`shapes.py`). One number
an image comes back to the host before the prompt is laid out: how many tokens are kept.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.accounting import Cost, executed, prompt_cost
from jaxprune.checkpoints_convert.plan import flat_shapes, flatten
from jaxprune.errors import UserError
from jaxprune.loading import Params
from jaxprune.methods import Plan, RandomPlaces, VisionMethod, depth_of, resolve
from jaxprune.models.registry import family
from jaxprune.ops.schedule import NO_CUTS, Schedule
from jaxprune.ops.visual import Selection, VisionOutput
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
from jaxprune.sampling import Sampling, make_sampling, next_token
from jaxprune.schedules import Lengths, candidates_left, gather_schedule
from jaxprune.shapes import DEFAULT_BUCKETS, Buckets

STOP_CHECK_EVERY = 16  # tokens between looks for a stop string


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


# ---- the jitted stages


@functools.partial(jax.jit, static_argnames=("config", "signals"))
def _encode(
    params: dict, pixels: jax.Array, *, config: Any, signals: frozenset[str]
) -> VisionOutput:
    return family(config).encode_image(params, config, pixels, signals)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _count(vision: VisionOutput, *, config: Any, method: VisionMethod) -> jax.Array:
    return method.counts(_without_cls(vision, config)[1]) + config.keep_cls


@functools.partial(jax.jit, static_argnames=("config", "method", "capacity"))
def _select(vision: VisionOutput, *, config: Any, method: VisionMethod, capacity: int) -> Selection:
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
def _embed(
    params: dict,
    token_ids: jax.Array,
    visual_index: jax.Array,
    kind: jax.Array,
    lengths: jax.Array,
    visual_tokens: jax.Array | None,
    *,
    config: Any,
) -> Any:
    # A stage of its own: the number of images and of visual tokens ends here, so that the
    # decoder, which takes long to compile, is compiled for batch and sequence alone.
    model = family(config)
    return model.embed(params, config, token_ids, visual_index, kind, lengths, visual_tokens)


@functools.partial(jax.jit, static_argnames=("config", "schedule", "new_slots", "greedy"))
def _prefill(
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
def _decode(
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


# ---- the public calls


def generate(
    params: Params | Mapping[str, Any],
    image: Any = None,
    prompt: Any = None,
    *,
    method: Any = "none",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    chat: bool = True,
    return_details: bool = False,
    config: Any = None,
    processor: Processor | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    **method_options: Any,
) -> Any:
    """Answer a prompt about an image, or a batch of them.

    Args:
        params: what `load` gives, or the bare nested dict with `config` and `processor`.
        image: a path, PIL image or uint8 array `[H, W, 3]`; a list of them for a batch;
            lists of several for prompts with several images; None for text alone.
        prompt: a question, a conversation as a list of {"role", "content"} messages, or a
            list of either. Images stand where the prompt has "<image>", else in front.
            One prompt with a list of images asks the same about each, unless it has
            several placeholders.
        method: a pruning method by name (see `jaxprune.METHODS`), an instance, a recipe or
            its path, or a pair of one vision-side and one decoder-side method.
        max_new_tokens: at most this many tokens are generated; less where the model's
            context ends first.
        temperature: 0 decodes greedily; above, tokens are drawn.
        top_k: draw from the k likeliest only.
        top_p: draw from the likeliest that together reach this probability.
        seed: of the draws; one for all rows, or one a row. Rows of equal seed and prompt
            draw the same. The method "random" takes it too.
        stop: strings that end an answer; they are not part of it.
        chat: wrap prompts in the model's chat template; False takes them as they stand.
        return_details: `Answer` objects instead of strings.
        config, processor: for bare params.
        buckets: the shapes that may be compiled.
        **method_options: hyperparameters of a named method, such as `keep=64`; for a recipe
            `fractions=True` takes one that was made for another model.

    Returns:
        A string (or `Answer`) for one prompt, a list of them for lists.

    Raises:
        jaxprune.UserError: for a request that cannot be served; it says what to change.
    """
    run = _Run(
        params,
        image,
        prompt,
        method=method,
        method_options=method_options,
        max_new_tokens=max_new_tokens,
        sampling_options={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        seed=seed,
        stop=stop,
        chat=chat,
        config=config,
        processor=processor,
        buckets=buckets,
    )
    run.start()
    chunk = STOP_CHECK_EVERY if run.stop else run.max_new_tokens
    while not run.finished:
        run.advance(chunk)
    answers: list[Any] = run.answers() if return_details else run.texts()
    return answers[0] if run.request.single else answers


def stream(
    params: Params | Mapping[str, Any],
    image: Any = None,
    prompt: Any = None,
    *,
    method: Any = "none",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    chat: bool = True,
    chunk_tokens: int = 1,
    config: Any = None,
    processor: Processor | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    **method_options: Any,
) -> Iterator[Any]:
    """Answer piece by piece: the arguments of `generate`, the pieces join to its answer.

    Args:
        chunk_tokens: tokens generated between two pieces; more means fewer dispatches.

    Yields:
        For one prompt the next piece of text; for lists a list with one piece a row, empty
        for a row that has nothing new.

    Raises:
        jaxprune.UserError: as `generate`, at the first piece.
    """
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise UserError(f"chunk_tokens is {chunk_tokens!r}; expected a whole number, 1 or more.")
    run = _Run(
        params,
        image,
        prompt,
        method=method,
        method_options=method_options,
        max_new_tokens=max_new_tokens,
        sampling_options={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        seed=seed,
        stop=stop,
        chat=chat,
        config=config,
        processor=processor,
        buckets=buckets,
    )
    return _pieces(run, chunk_tokens)


def _pieces(run: "_Run", chunk_tokens: int) -> Iterator[Any]:
    run.start()
    sent = [""] * len(run.request.rows)
    while True:
        texts = run.texts()
        if not run.finished:
            texts = [run.safe_part(text) for text in texts]
        pieces = [new[len(old) :] for old, new in zip(sent, texts, strict=True)]
        sent = [old + piece for old, piece in zip(sent, pieces, strict=True)]
        if any(pieces):
            yield pieces[0] if run.request.single else pieces
        if run.finished:
            return
        run.advance(chunk_tokens)


class _Run:
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
            tokens = _embed(
                self.params,
                self.layout.token_ids,
                self.layout.visual_index,
                self.layout.kind,
                self.layout.lengths,
                None if selection is None else selection.tokens,
                config=self.config,
            )
            self.state, self.first_logits, self.survivors = jax.block_until_ready(
                _prefill(
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
            self.state = _decode(
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
            vision = _encode(self.params, pixels, config=config, signals=signals)
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
                counts = np.asarray(_count(vision, config=config, method=method))
                most = int(counts[: len(self.request.images)].max())
                bucket = self.buckets.fit("visual", most)
                capacity = min(bucket - config.keep_cls, patches + method.extra_tokens)
            selection = _select(
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
