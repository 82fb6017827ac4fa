"""`warmup`: compile everything that requests of certain sizes will need, before they come.

The stages run for real, on nothing, with the shapes that `shapes.py` gives for every request
there can be: the same functions choose them for `generate`.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.devices.compilation import Compilations, guarded
from jaxprune.devices.mesh import devices_of, devices_sharing, mesh_of, on_mesh, spread, to_host
from jaxprune.engine import stages
from jaxprune.engine.footprint import (
    check_memory,
    check_tower_memory,
    free_bytes,
    peak_bytes,
    told_if_exhausted,
)
from jaxprune.engine.lengths import candidates_left, gather_schedule
from jaxprune.engine.sampling import Sampling, make_sampling
from jaxprune.engine.session import eos_ids
from jaxprune.engine.shapes import DEFAULT_BUCKETS, Buckets, ImageShape, Lengths, Shapes
from jaxprune.errors import UserError
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.request import Row, lay_out
from jaxprune.methods import Plan, depth_of, resolve
from jaxprune.model import Params, complete
from jaxprune.ops.cuts import NO_CUTS
from jaxprune.ops.tiles import pack_tilings
from jaxprune.ops.visual import Selection
from jaxprune.progress import track

SERVING_BUCKETS = DEFAULT_BUCKETS.up_to(batch=8, images=8, row_images=1, text=512, new_tokens=128)
"""What `warmup` covers unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """What a warm-up has done.

    Attributes:
        programs: XLA programs made, by stage.
        combinations: combinations of buckets that were run; programs are fewer where some
            share one, or were there before.
        seconds: wall time.
        compile_seconds: of it, XLA's.
        peak_bytes: the most memory that the process (on an accelerator: the device) has had
            in use so far.
        buckets: what is covered.
    """

    programs: dict[str, int]
    combinations: int
    seconds: float
    compile_seconds: float
    peak_bytes: int
    buckets: Buckets

    def __str__(self) -> str:
        made = ", ".join(f"{stage} {n}" for stage, n in sorted(self.programs.items()))
        return (
            f"{sum(self.programs.values())} programs ({made or 'all there already'}) for "
            f"{self.combinations} combinations of buckets in {self.seconds:.1f} s, of which XLA "
            f"{self.compile_seconds:.1f} s; peak memory {self.peak_bytes / 2**30:.2f} GiB."
        )


class Images(NamedTuple):
    """A combination of buckets up to the visual tokens of a batch."""

    batch: int
    row_images: int
    shape: ImageShape
    capacity: int
    least: int


def warmup(
    params: Params | Mapping[str, Any],
    *,
    method: Any = "none",
    buckets: Buckets = SERVING_BUCKETS,
    text_only: bool = False,
    greedy: bool = True,
    sampled: bool = False,
    config: Any = None,
    processor: Processor | None = None,
    show_progress: bool | None = None,
    **method_options: Any,
) -> WarmUp:
    """Compile the programs that `generate` will use for requests within `buckets`.

    Afterwards `generate`, `stream` and `generate_many` compile nothing for requests of this
    method whose sizes the buckets hold; `no_compilation` proves it. They may be called with
    these buckets or with the default ones, if these are made of them by `up_to`. The stages run
    once for each combination, so the largest one has to fit into memory.

    Args:
        params, method, config, processor, method_options: as for `generate`.
        buckets: what is covered. The default holds batches of up to 8 prompts with an image
            each, 512 text tokens and 128 new ones; `jaxprune.Buckets().up_to(...)` makes others.
        text_only: prompts without an image too.
        greedy: programs that take the likeliest token.
        sampled: programs that draw tokens, of any temperature, top-k and top-p.
        show_progress: a bar on stderr; None shows it in a terminal.

    Returns:
        A report; `print` it.

    Raises:
        jaxprune.UserError: as `generate`.
    """
    model = complete(params, config, processor)
    if not isinstance(buckets, Buckets):
        raise UserError(f"buckets is a {type(buckets).__name__}; expected jaxprune.Buckets.")
    if not greedy and not sampled:
        raise UserError("Neither greedy nor sampled programs are asked for; expected one or both.")
    plan = resolve(method, model.config, **method_options)
    if plan.vision is not None and model.config.one_tile:
        plan.vision.check(model.config.vision_config.num_patches)
    warm = _WarmUp(model, plan, buckets)
    draws = [name for name, wanted in ((True, greedy), (False, sampled)) if wanted]
    began, made = time.perf_counter(), Compilations()
    images = list(warm.combinations())
    with on_mesh(warm.mesh), guarded(), told_if_exhausted():
        for n in track(range(len(images)), "Warming up", len(images), show=show_progress):
            warm.run(images[n], draws)
        if text_only:
            for batch in track(buckets.batch, "Text alone", len(buckets.batch), show=show_progress):
                warm.run_rows(batch, None, warm.shapes.every_row(0, 0, 0), 0, draws)
    programs: dict[str, int] = {}
    for name in made.programs:
        stage = name.removeprefix("jit(").removesuffix(")")
        programs[stage] = programs.get(stage, 0) + 1
    return WarmUp(
        programs, warm.done, time.perf_counter() - began, made.seconds, peak_bytes(), buckets
    )


class _WarmUp:
    def __init__(self, model: Params, plan: Plan, buckets: Buckets) -> None:
        self.params, self.config, self.processor = model.arrays, model.config, model.processor
        self.mesh, self.devices = mesh_of(model.arrays), devices_of(model.arrays)
        self.plan, self.buckets = plan, buckets
        self.shapes = Shapes(buckets, model.config, plan.vision)
        self.done = 0
        self.vision: dict[ImageShape, Any] = {}
        self.seen: set[Any] = set()

    def combinations(self) -> Iterator[Images]:
        """Everything up to the decoder."""
        for shape in self.shapes.every_image():
            for capacity, least in self.shapes.every_selection(shape).items():
                for row_images in self.buckets.row_images:
                    for batch in self.buckets.batch:
                        if self.shapes.reachable(shape.images, batch, row_images):
                            yield Images(batch, row_images, shape, capacity, least)

    def run(self, images: Images, draws: list[bool]) -> None:
        """One combination from pixels to a token."""
        config, method = self.config, self.plan.vision
        vision, packing = self._encoded(images.shape)
        slots = self.shapes.visual_slots(images.shape.images, images.batch, images.row_images)
        selection = stages.select(
            vision,
            packing,
            config=config,
            method=method,
            capacity=images.capacity,
            images=slots,
        )
        rooms = self.shapes.every_row(images.row_images, images.capacity, images.least)
        self.run_rows(images.batch, selection, rooms, images.least, draws)

    def _encoded(self, shape: ImageShape) -> tuple[Any, Any]:
        if shape not in self.vision:
            config, method = self.config, self.plan.vision
            tiles, size = shape.images * shape.tiles, config.vision_config.image_size
            check_tower_memory(
                config,
                tiles=tiles,
                devices=devices_sharing(self.mesh, tiles),
                free=free_bytes(self.devices),
            )
            packing = pack_tilings(
                [], images=shape.images, tiles=tiles, image_tiles=shape.tiles, slots=shape.slots
            )
            pixels = np.zeros((tiles, size, size, 3), np.float32)
            pixels, packing = spread((pixels, packing), self.mesh)
            signals = frozenset() if method is None else method.signals
            vision = stages.encode(self.params, pixels, config=config, signals=signals)
            if method is not None and self.shapes.fixed_capacity(shape) is None:
                to_host(stages.count(vision, packing, config=config, method=method))
            self.vision = {shape: (vision, packing)}  # only the newest stays in memory
        return self.vision[shape]

    def run_rows(
        self,
        batch: int,
        selection: Selection | None,
        rooms: list[Lengths],
        least: int,
        draws: list[bool],
    ) -> None:
        """The decoder's part, for every room that rows of `least` visual tokens may need."""
        texts = self.buckets.text
        for room in rooms:
            place = texts.index(room.text)
            # The longest text and the largest image may be in different rows.
            shortest = max(texts[place - 1] if place else 0, least)
            if shortest < self.config.text_config.context_length:
                self._decode(batch, room, selection, draws)

    def _decode(
        self, batch: int, room: Lengths, selection: Selection | None, draws: list[bool]
    ) -> None:
        config, method = self.config, self.plan.decoder
        capacity = 0 if selection is None else selection.tokens.shape[1]
        row = Row([[1, 1]], []) if selection is None else Row([[1], [1]], [0])
        layout = lay_out([row], np.ones(1, int), capacity, batch=batch, sequence=sum(room))
        schedule, left = NO_CUTS, None
        if method is not None and room.visual:
            depth, visual = depth_of(config), np.zeros(batch, int)
            distinct = self.buckets.schedule_lengths
            schedule = gather_schedule(method, depth, room, distinct=distinct)
            left = candidates_left(method, depth, layout.kind, visual)
        shape = sharding = None
        if selection is not None:  # on a mesh, programs differ by where their arguments are
            shape, sharding = selection.tokens.shape, selection.tokens.sharding
        key = (batch, sum(room), schedule, sharding)
        if (key, shape) in self.seen:
            return
        known = key in self.seen  # the decoder does not ask what makes up its rows
        self.seen |= {key, (key, shape)}
        layout, left = spread(layout, self.mesh), spread(left, self.mesh, axis=1)
        tokens = stages.embed(
            self.params,
            layout.token_ids,
            layout.visual_index,
            layout.kind,
            layout.lengths,
            selection,
            config=config,
        )
        for new_slots in () if known else self.buckets.new_tokens:
            check_memory(
                config,
                batch=batch,
                slots=sum(room),
                schedule=schedule,
                new_slots=new_slots,
                devices=devices_sharing(self.mesh, batch),
                free=free_bytes(self.devices),
            )
            for greedy in draws:
                sampling = self._sampling(batch)
                eos = eos_ids(self.processor)
                state, _, _ = stages.prefill(
                    self.params,
                    tokens,
                    left,
                    layout.lengths,
                    np.int32(1),
                    sampling,
                    eos,
                    config=config,
                    schedule=schedule,
                    new_slots=new_slots,
                    greedy=greedy,
                )
                for _ in range(2):  # on a mesh, its own result may lie otherwise than prefill's
                    state = stages.decode(
                        self.params, state, np.int32(1), sampling, eos, config=config, greedy=greedy
                    )
                to_host((state.step, state.tokens, state.lengths, state.done))  # as a request does
                self.done += 1

    def _sampling(self, batch: int) -> Sampling:
        vocabulary = self.config.text_config.vocab_size
        sampling = make_sampling(
            temperature=1.0, top_k=None, top_p=None, seeds=[0] * batch, vocab_size=vocabulary
        )
        return sampling.replace(seeds=spread(sampling.seeds, self.mesh))
