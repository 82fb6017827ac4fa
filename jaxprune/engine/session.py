"""One request on its way through the stages: what `generate`, `stream` and `generate_many` drive.

    request.py     image + prompt -> rows of token ids, RGB images              (host)
    stages.py      encode, count, select, embed, prefill, decode                (jit)

Every array that enters a jitted stage has the size of a bucket (`shapes.py`). Numbers alone
come back to the host before the answer: how many tokens an adaptive method keeps.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxprune.devices.compilation import covered
from jaxprune.devices.mesh import devices_of, devices_sharing, mesh_of, on_mesh, spread, to_host
from jaxprune.engine import stages
from jaxprune.engine.cost import Cost, executed, prompt_cost
from jaxprune.engine.footprint import (
    check_memory,
    check_tower_memory,
    free_bytes,
    told_if_exhausted,
)
from jaxprune.engine.lengths import candidates_left, gather_schedule
from jaxprune.engine.sampling import make_sampling
from jaxprune.engine.shapes import Buckets, Lengths, Shapes
from jaxprune.errors import UserError
from jaxprune.inputs.processor import decode_text, pixel_values
from jaxprune.inputs.request import (
    Layout,
    Request,
    Row,
    lay_out,
    row_lengths,
    text_length,
    visual_length,
)
from jaxprune.methods import Plan, RandomPlaces, depth_of, resolve
from jaxprune.model import Params
from jaxprune.ops.cuts import NO_CUTS, Schedule
from jaxprune.ops.tiles import pack_tilings
from jaxprune.ops.visual import Selection


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
            order; -1 for a token that stands for several, -2 for a newline. Of an image of
            several tiles a patch is tile * (patches of a tile) + its place in the tile.
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


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request asks for beside its prompts and images; equal ones can share a batch.

    Attributes:
        plan: the methods that prune.
        max_new_tokens: at most.
        temperature, top_k, top_p: see `sampling`.
        stop: strings that end an answer.
        chat: wrap prompts in the chat template.
        buckets: the shapes that may be compiled.
    """

    plan: Plan
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop: tuple[str, ...]
    chat: bool
    buckets: Buckets


def make_options(
    config: Any,
    *,
    method: Any,
    method_options: dict[str, Any],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | Sequence[int],
    stop: str | Sequence[str],
    chat: bool,
    buckets: Buckets,
) -> Options:
    """Check what the user gave; see `generate` for what it means.

    Raises:
        UserError: for a value that cannot be served.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple):
        raise UserError(f"stop is {stop!r}; expected a string or a list of them.")
    if not all(isinstance(text, str) and text for text in strings):
        raise UserError(f"stop is {stop!r}; expected strings that are not empty.")
    if not isinstance(buckets, Buckets):
        raise UserError(f"buckets is a {type(buckets).__name__}; expected jaxprune.Buckets.")
    plan = _resolve(method, config, seed, method_options)
    return Options(plan, max_new_tokens, temperature, top_k, top_p, tuple(strings), chat, buckets)


class Run:
    """One request on its way through the stages.

    Args:
        params: the model.
        options: what is asked for.
        request: the prompts and images.
        seeds: of the draws, one a row.
        limits: new tokens of each row, at most; None: what the options say.
        timed: wait for every stage, so that `seconds` tells them apart.

    Raises:
        UserError: here for what the arguments tell; in `start` and `advance` for what only
            the images or the device do, and under `no_compilation` for a shape not covered.
    """

    def __init__(
        self,
        params: Params,
        options: Options,
        request: Request,
        seeds: Sequence[int],
        *,
        limits: Sequence[int] | None = None,
        timed: bool = False,
    ) -> None:
        assert params.processor is not None
        self.params, self.config, self.processor = params.arrays, params.config, params.processor
        self.mesh, self.devices = mesh_of(params.arrays), devices_of(params.arrays)
        self.options, self.request, self.timed = options, request, timed
        self.plan, self.buckets = options.plan, options.buckets
        self.shapes = Shapes(self.buckets, self.config, self.plan.vision)
        self.limits = np.array(limits or [options.max_new_tokens] * len(request.rows))
        self.seconds: dict[str, float] = {}
        sizes = [(image.height, image.width) for image in request.images]
        self.tilings = [self.config.tiling(*size) for size in sizes]
        if self.plan.vision is not None and self.tilings:
            self.plan.vision.check(min(tiling.num_patches for tiling in self.tilings))
        rows = len(request.rows)
        self.batch = self.buckets.fit("batch", rows)
        self.row_images = max(len(row.images) for row in request.rows)
        if len(seeds) != rows:
            raise UserError(f"{len(seeds)} seeds came for {rows} prompts; give one for each.")
        sampling = make_sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seeds=[*seeds, *[0] * (self.batch - rows)],
            vocab_size=self.config.text_config.vocab_size,
        )
        self.sampling = sampling.replace(seeds=spread(sampling.seeds, self.mesh))
        self.greedy = options.temperature == 0
        self.eos = eos_ids(self.processor)
        # Before any work on an accelerator: the part of the length that is known now.
        self.counts = self._unpruned() if self.plan.vision is None else 0 * self._unpruned()
        self._check_context(self.counts)

    def start(self) -> None:
        """Everything up to the first token of every row."""
        with on_mesh(self.mesh):
            selection = self._visual_tokens() if self.request.images else None
            counts = self.counts
            self._check_context(counts)
            # Each row for itself: what a long one lacks, its neighbours still have.
            lengths = np.array(row_lengths(self.request.rows, counts))
            context = self.config.text_config.context_length
            self.limits = np.minimum(self.limits, context - lengths)
            self.max_new_tokens = int(self.limits.max())
            self.capacity = 0 if selection is None else selection.tokens.shape[1]
            self.indices = None if selection is None else selection.indices
            room = self._room(counts, self.capacity)
            self.layout: Layout = lay_out(
                self.request.rows,
                counts,
                self.capacity,
                batch=self.batch,
                sequence=sum(room),
                fixed=int(self.config.keep_cls),
            )
            self.schedule, left = self._schedule(room, counts)
            new_slots = self.buckets.fit("new_tokens", self.max_new_tokens)
            check_memory(
                self.config,
                batch=self.batch,
                slots=sum(room),
                schedule=self.schedule,
                new_slots=new_slots,
                batches=self.buckets.batch,
                devices=devices_sharing(self.mesh, self.batch),
                free=free_bytes(self.devices),
            )
            layout = spread(self.layout, self.mesh)
            shape = {"batch": self.batch, **room._asdict(), "new_tokens": new_slots}
            with self._stage("prefill", **shape, greedy=self.greedy):
                tokens = stages.embed(
                    self.params,
                    layout.token_ids,
                    layout.visual_index,
                    layout.kind,
                    layout.lengths,
                    selection,
                    config=self.config,
                )
                self.state, self.first_logits, self.survivors = stages.prefill(
                    self.params,
                    tokens,
                    spread(left, self.mesh, axis=1),
                    layout.lengths,
                    np.int32(len(self.request.rows)),
                    self.sampling,
                    self.eos,
                    config=self.config,
                    schedule=self.schedule,
                    new_slots=new_slots,
                    greedy=self.greedy,
                )
                self._wait(self.first_logits)
        self.step = 1

    def _unpruned(self) -> np.ndarray:
        """Visual tokens of each image before any pruning: int `[I]`."""
        counts = [tiling.num_tokens + self.config.keep_cls for tiling in self.tilings]
        return np.array(counts, int)

    def _room(self, counts: np.ndarray, capacity: int) -> Lengths:
        """The buckets of the batch's rows, whose images have `capacity` slots each."""
        rows = self.request.rows
        text = max(text_room(row, self.config) for row in rows)
        longest = max(visual_length(row, counts) for row in rows)
        return self.shapes.of_rows(text, self.row_images, capacity, longest)

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
        """Generate up to so many more tokens in every row that is not done: one dispatch."""
        until = np.int32(min(self.step + tokens, self.max_new_tokens))
        batch, new_slots = self.state.tokens.shape
        shape = {"batch": batch, "slots": self.layout.token_ids.shape[1], "new_tokens": new_slots}
        with on_mesh(self.mesh), self._stage("decode", **shape, greedy=self.greedy):
            if until > self.step:
                self.state = stages.decode(
                    self.params,
                    self.state,
                    until,
                    self.sampling,
                    self.eos,
                    config=self.config,
                    greedy=self.greedy,
                )
            self.fetch()

    @property
    def finished(self) -> bool:
        return all(
            self.step >= limit or self._text(b)[2] != "length"
            for b, limit in enumerate(self.limits)
        )

    def texts(self) -> list[str]:
        """The answers so far."""
        return [self._text(b)[0] for b in range(len(self.request.rows))]

    def answers(self) -> list[Answer]:
        """The answers so far in detail; a row that goes on has the finish reason "length"."""
        noted = to_host((self.indices, self.survivors))
        return [self._answer(b, *noted) for b in range(len(self.request.rows))]

    def safe_part(self, text: str) -> str:
        """What of an unfinished text can be shown: no half character, no half stop string."""
        text = text.rstrip("\ufffd")
        sizes = [
            n
            for string in self.options.stop
            for n in range(1, len(string))
            if text.endswith(string[:n])
        ]
        return text[: len(text) - max(sizes, default=0)]

    def _visual_tokens(self) -> Selection:
        """Encode all images of the batch and prune them."""
        config, method, mesh = self.config, self.plan.vision, self.mesh
        number = len(self.tilings)
        shape = self.shapes.of_images(number, max(tiling.tiles for tiling in self.tilings))
        tiles = shape.images * shape.tiles
        check_tower_memory(
            config,
            tiles=tiles,
            images=self.buckets.images,
            image_tiles=shape.tiles,
            devices=devices_sharing(mesh, tiles),
            free=free_bytes(self.devices),
        )
        with self._stage("preprocess"):
            pixels = pixel_values(self.processor, self.request.images, config)
            packing = pack_tilings(
                self.tilings,
                images=shape.images,
                tiles=tiles,
                image_tiles=shape.tiles,
                slots=shape.slots,
            )
            pixels = np.pad(pixels, ((0, tiles - len(pixels)), (0, 0), (0, 0), (0, 0)))
            pixels, packing = spread((pixels, packing), mesh)
        sizes = shape._asdict()
        with self._stage("encode", **sizes):
            signals = frozenset() if method is None else method.signals
            vision = stages.encode(self.params, pixels, config=config, signals=signals)
            self._wait(vision)
        slots = self.shapes.visual_slots(shape.images, self.batch, self.row_images)
        sizes |= {"batch": self.batch, "row_images": self.row_images}
        with self._stage("select", **sizes) as told:
            capacity = self.shapes.fixed_capacity(shape)
            if capacity is not None:
                self.counts = np.full(number, capacity)
            elif method is None:
                self.counts = self._unpruned()
            else:  # the numbers that the host has to know
                counts = stages.count(vision, packing, config=config, method=method)
                self.counts = to_host(counts)[:number]
            if capacity is None:
                capacity = self.shapes.of_selection(shape, int(self.counts.max()))
            told["visual"] = capacity
            selection = stages.select(
                vision,
                packing,
                config=config,
                method=method,
                capacity=capacity,
                images=slots,
            )
            self._wait(selection)
        return selection

    def _check_context(self, counts: np.ndarray) -> None:
        longest = max(row_lengths(self.request.rows, counts))
        context = self.config.text_config.context_length
        if longest >= context:
            raise UserError(
                f"The prompt is {longest} tokens long with its images, but the model's context "
                f"is {context}; shorten it{' or prune more' if self.request.images else ''}."
            )

    def fetch(self) -> None:
        """Bring what is generated so far to the host."""
        rows = len(self.request.rows)
        state = self.state
        fetched = to_host((state.step, state.tokens, state.lengths, state.done))
        self.step = int(fetched[0])
        self.tokens, self.lengths, self.done = (array[:rows] for array in fetched[1:])

    def _text(self, b: int) -> tuple[str, list[int], str]:
        """Text, token ids and finish reason of a row so far."""
        ids = self.tokens[b, : min(self.lengths[b], self.limits[b])].tolist()
        ended = self.done[b] and self.lengths[b] < self.limits[b]
        text, reason = decode_text(self.processor, ids), "eos" if ended else "length"
        # Of several stop strings the one that is complete first, however far decoding went on.
        stop = self.options.stop
        found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        if found:
            text, reason = text[: min(found)[1]], "stop"
        return text, ids, reason

    def _answer(self, b: int, indices: np.ndarray | None, survivors: Any) -> Answer:
        row = self.request.rows[b]
        text, ids, reason = self._text(b)
        first = int(self.config.keep_cls)
        kept = [] if indices is None else [indices[i, first : self.counts[i]] for i in row.images]
        return Answer(
            text=text,
            token_ids=ids,
            finish_reason=reason,
            prompt_tokens=row_lengths([row], self.counts)[0],
            visual_tokens=[int(self.counts[i]) for i in row.images],
            unpruned_visual_tokens=self._unpruned()[row.images].tolist(),
            kept_indices=kept,
            kept_by_layer=self._kept_by_layer(b, indices, survivors),
            cost=self._cost(row),
            seconds=dict(self.seconds),
        )

    def _kept_by_layer(
        self, b: int, indices: np.ndarray | None, survivors: Any
    ) -> dict[int, list[np.ndarray]]:
        """For each layer that drops tokens, the patches of each image that are left."""
        found: dict[int, list[np.ndarray]] = {}
        if indices is None:
            return found
        first = int(self.config.keep_cls)
        for layer, (positions, valid) in zip(self.schedule.layers, survivors, strict=True):
            # Before anything is dropped, a token's position is its slot.
            slots = positions[b][valid[b]]
            visual = self.layout.visual_index[b, slots]
            _, place = np.divmod(visual[visual >= 0], max(self.capacity, 1))
            # An image may stand in a prompt twice, so what counts is which of its images it is.
            images = self.request.rows[b].images
            standing = np.cumsum(self.layout.visual_index[b] >= 0)[slots[visual >= 0]] - 1
            which = np.searchsorted(np.cumsum(self.counts[images]), standing, side="right")
            found[layer] = [
                indices[i, place[(which == n) & (place >= first)]] for n, i in enumerate(images)
            ]
        return found

    def _cost(self, row: Row) -> Cost:
        found = prompt_cost(
            self.config,
            self.plan,
            text_tokens=text_length(row),
            unpruned_visual_tokens=int(self._unpruned()[row.images].sum()),
            visual_tokens=visual_length(row, self.counts),
        )
        slots, new = self.layout.token_ids.shape[1], self.state.tokens.shape[1]
        run = executed(self.config, slots, self.schedule, new_slots=new)
        return dataclasses.replace(found, executed=run)

    def _wait(self, found: Any) -> None:
        if self.timed:
            jax.block_until_ready(found)

    @contextmanager
    def _stage(self, name: str, **shape: Any) -> Iterator[dict[str, Any]]:
        """Add up a stage's seconds; under `no_compilation`, refuse shapes that are not warm.

        Yields:
            The shape, to which the stage can add what it finds.
        """
        began = time.perf_counter()
        with covered(name, shape), told_if_exhausted():
            yield shape
        spent = time.perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


def eos_ids(processor: Any) -> np.ndarray:
    """What ends an answer: int32 `[E]`."""
    return np.asarray(processor.eos_token_ids or (-1,), np.int32)


def text_room(row: Row, config: Any) -> int:
    """Slots of a row that are not pruned before the decoder.

    The last token of a row that ends with an image counts as text, and every CLS where that
    is a feature.
    """
    return text_length(row) + (not row.pieces[-1]) + config.keep_cls * len(row.images)


def seeds_of(seed: Any, rows: int) -> list[int]:
    """A seed for every row: the one that came, or the list of them."""
    if isinstance(seed, int | np.integer):
        return [int(seed)] * rows
    if isinstance(seed, list | tuple | np.ndarray):
        return [int(s) if isinstance(s, np.integer) else s for s in seed]
    raise UserError(f"seed is {seed!r}; expected a whole number, or a list with one a prompt.")


def _resolve(method: Any, config: Any, seed: Any, options: dict[str, Any]) -> Plan:
    """A named method that draws at random takes the request's seed."""
    parts = method if isinstance(method, tuple | list) else [method]
    drawn = any(isinstance(part, str) and part == RandomPlaces.name for part in parts)
    if drawn and isinstance(seed, int | np.integer):
        options = {"seed": int(seed), **options}
    elif drawn and "seed" not in options:
        raise UserError(
            'The method "random" draws once for all rows, but several seeds came; pass '
            "method=jaxprune.RandomPlaces(keep=..., seed=...)."
        )
    return resolve(method, config, **options)
