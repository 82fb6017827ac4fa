"""One request on its way through the stages: what `generate` and `stream` drive.

    request.py     image + prompt -> rows of token ids, RGB images              (host)
    stages.py      encode, count, select, embed, prefill, decode                (jit)

Every array that enters a jitted stage has the size of a bucket (`shapes.py`). Numbers alone
come back to the host before the prompt is laid out: how many tokens are kept.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import stages
from jaxprune.accounting import Cost, executed, prompt_cost
from jaxprune.checkpoints_convert.plan import flat_shapes, flatten
from jaxprune.errors import UserError
from jaxprune.loading import Params
from jaxprune.methods import Plan, RandomPlaces, depth_of, resolve
from jaxprune.models.registry import family_name
from jaxprune.ops.schedule import NO_CUTS, Schedule
from jaxprune.ops.tiles import pack_tilings
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
        with self._timed("preprocess"):
            self.request: Request = make_request(self.processor, image, prompt, chat=chat)
            sizes = [(image.height, image.width) for image in self.request.images]
            self.tilings = [self.config.tiling(*size) for size in sizes]
            if self.plan.vision is not None and self.tilings:
                self.plan.vision.check(min(tiling.num_patches for tiling in self.tilings))
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
            known = self._unpruned() if self.plan.vision is None else 0 * self._unpruned()
            self._check_context(known)

    def start(self) -> None:
        """Everything up to the first token of every row."""
        selection = self._visual_tokens() if self.request.images else None
        counts = np.zeros(0, int) if selection is None else np.asarray(selection.counts)
        longest = self._check_context(counts)
        self.max_new_tokens = min(
            self.max_new_tokens, self.config.text_config.context_length - longest
        )
        capacity = 0 if selection is None else selection.tokens.shape[1]
        room = self._room(counts, capacity)
        self.layout: Layout = lay_out(
            self.request.rows,
            counts,
            capacity,
            batch=self.batch,
            sequence=sum(room),
            fixed=int(self.config.keep_cls),
        )
        self.schedule, left = self._schedule(room, counts)
        with self._timed("prefill"):
            tokens = stages.embed(
                self.params,
                self.layout.token_ids,
                self.layout.visual_index,
                self.layout.kind,
                self.layout.lengths,
                selection,
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

    def _unpruned(self) -> np.ndarray:
        """Visual tokens of each image before any pruning: int `[I]`."""
        counts = [tiling.num_tokens + self.config.keep_cls for tiling in self.tilings]
        return np.array(counts, int)

    def _room(self, counts: np.ndarray, capacity: int) -> Lengths:
        """The buckets of the batch's rows, whose images have `capacity` slots each."""
        rows, fit = self.request.rows, self.buckets.fit
        # What is never pruned counts as text: the last token of a row that ends with an image,
        # and every CLS where that is a feature.
        text = fit(
            "text",
            max(
                text_length(row) + (not row.pieces[-1]) + self.config.keep_cls * len(row.images)
                for row in rows
            ),
        )
        images = max(len(row.images) for row in rows)
        if not images:
            return Lengths(text, 0)
        whole = fit("row_images", images) * capacity
        longest = max(visual_length(row, counts) for row in rows)
        return Lengths(text, whole if longest == whole else min(fit("visual", longest), whole))

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
        fit = self.buckets.fit
        with self._timed("preprocess"):
            pixels = pixel_values(self.processor, self.request.images, config)
            single = all(tiling.tiles == 1 for tiling in self.tilings)
            images = fit("images", len(self.tilings))
            tiles = images if single else fit("tiles", len(pixels))
            packing = pack_tilings(
                self.tilings,
                images=images,
                tiles=tiles,
                image_tiles=fit("image_tiles", max(tiling.tiles for tiling in self.tilings)),
                slots=self._slots(max(tiling.num_tokens for tiling in self.tilings)),
            )
            pixels = np.pad(pixels, ((0, tiles - len(pixels)), (0, 0), (0, 0), (0, 0)))
        with self._timed("encode"):
            signals = frozenset() if method is None else method.signals
            vision = stages.encode(self.params, pixels, config=config, signals=signals)
            jax.block_until_ready(vision)
        with self._timed("select"):
            patches = vision.features.shape[1] - config.keep_cls
            tile_capacity, capacity = 0, packing.slots.shape[1] + config.keep_cls
            fixed = method.fixed_count(patches) if method is not None and single else None
            if fixed is not None:
                tile_capacity, capacity = min(fixed, patches), fixed + config.keep_cls
            elif method is not None:
                # The numbers that the host has to know: an image's tokens, a tile's patches.
                counts, kept = jax.device_get(
                    stages.count(vision, packing, config=config, method=method)
                )
                most = int(counts[: len(self.tilings)].max())
                full = capacity + (packing.tile.shape[1] if method.merges else 0)
                capacity = min(fit("visual", most), full)
                if method.merges:
                    room = capacity if single else fit("tile_patches", max(1, int(kept.max())))
                    tile_capacity = min(room, patches)
            selection = stages.select(
                vision,
                packing,
                config=config,
                method=method,
                tile_capacity=tile_capacity,
                capacity=capacity,
            )
            return jax.block_until_ready(selection)

    def _slots(self, tokens: int) -> int:
        """Room for the patches and newlines of one image: a bucket, or all there can be."""
        most = self.config.num_image_tokens - self.config.keep_cls
        return most if tokens == most else min(self.buckets.fit("visual", tokens), most)

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
            unpruned_visual_tokens=self._unpruned()[row.images].tolist(),
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
            _, place = np.divmod(visual[visual >= 0], max(self.capacity, 1))
            # An image may stand in a prompt twice, so what counts is which of its images it is.
            images = self.request.rows[b].images
            standing = np.cumsum(self.layout.visual_index[b] >= 0)[slots[visual >= 0]] - 1
            which = np.searchsorted(np.cumsum(self.counts[images]), standing, side="right")
            found[layer] = [
                self.indices[i, place[(which == n) & (place >= first)]]
                for n, i in enumerate(images)
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
    drawn = any(isinstance(part, str) and part == RandomPlaces.name for part in parts)
    if drawn and isinstance(seed, int | np.integer):
        options = {"seed": int(seed), **options}
    elif drawn and "seed" not in options:
        raise UserError(
            'The method "random" draws once for all rows, but several seeds came; pass '
            "method=jaxprune.RandomPlaces(keep=..., seed=...)."
        )
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
        family_name(config)  # refuses what is no config
        _check_arrays(params, config)
    if not isinstance(processor, Processor):
        raise UserError(f"processor is a {type(processor).__name__}; expected a Processor.")
    return dict(params), config, processor
