"""`warmup`: compile everything that requests of certain sizes will need, before they come.

The engine runs empty requests of every shape that `shapes` gives for all requests there can
be: the same functions choose them for `generate`.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.devices.compilation import Compilations, guarded
from jaxprune.devices.memory import peak_bytes, told_if_exhausted
from jaxprune.devices.mesh import to_host
from jaxprune.engine.buckets import DEFAULT_BUCKETS, Buckets
from jaxprune.engine.engine import NOTHING_SEEN, Clock, Encoded, Engine, Prompt, Seen
from jaxprune.engine.sampling import Ask
from jaxprune.engine.shapes import ImageShape, RowRoom
from jaxprune.errors import UserError, check_flag
from jaxprune.inputs.layout import ImageRoom
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.request import Row
from jaxprune.methods import resolve
from jaxprune.model import Params, complete
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import depth_of
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
    encoded: bool = False,
    config: ModelConfig | None = None,
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
        sampled: programs that draw tokens, of any temperature, top-k and top-p, or note more of
            them than the likeliest; all logits are apart, and never covered.
        encoded: programs for images that `jaxprune.encode` has been given before, as many tiles
            of each.
        show_progress: a bar on stderr; None shows it in a terminal.

    Returns:
        A report; `print` it.

    Raises:
        jaxprune.UserError: as `generate`.
    """
    if not greedy and not sampled:
        raise UserError("Neither greedy nor sampled programs are asked for; expected one or both.")
    model = complete(params, config, processor)
    engine = Engine(model, resolve(method, depth_of(model.config), **method_options), buckets)
    if engine.plan.vision is not None and model.config.one_tile:
        engine.plan.vision.check(model.config.tower.tokens_per_tile)
    check_flag("encoded", encoded)
    draws = [name for name, wanted in ((True, greedy), (False, sampled)) if wanted]
    warm = _WarmUp(engine, draws, encoded)
    began, made = time.perf_counter(), Compilations()
    images = list(warm.combinations())
    with guarded(), told_if_exhausted():
        for combination in track(images, "Warming up", len(images), show=show_progress):
            warm.run(combination)
        if text_only:
            for batch in track(buckets.batch, "Text alone", len(buckets.batch), show=show_progress):
                warm.text(batch)
    programs: dict[str, int] = {}
    for name in made.programs:
        stage = name.removeprefix("jit(").removesuffix(")")
        programs[stage] = programs.get(stage, 0) + 1
    return WarmUp(
        programs, warm.done, time.perf_counter() - began, made.seconds, peak_bytes(), buckets
    )


class _WarmUp:
    """Sends an engine empty requests of every size.

    Args:
        engine: what is to be warm.
        draws: greedy programs (True), those that draw (False), or both.
        encoded: images may have been encoded before.
    """

    def __init__(self, engine: Engine, draws: Sequence[bool], encoded: bool) -> None:
        self.engine, self.draws, self.encoded = engine, draws, encoded
        self.done = 0
        self._encoded: dict[ImageShape, Encoded] = {}
        self._seen: set[Any] = set()

    def combinations(self) -> Iterator[Images]:
        """Everything up to the decoder."""
        shapes, buckets = self.engine.shapes, self.engine.buckets
        for shape in shapes.every_image():
            for capacity, least in shapes.every_selection(shape).items():
                for row_images in buckets.row_images:
                    for batch in buckets.batch:
                        if shapes.reachable(shape.images, batch, row_images):
                            yield Images(batch, row_images, shape, capacity, least)

    def run(self, images: Images) -> None:
        """One combination from pixels to a token."""
        for width in self.engine.question_widths:
            seen = self.engine.select(
                self._empty(images.shape),
                batch=images.batch,
                row_images=images.row_images,
                question_width=width,
                capacity=images.capacity,
                clock=Clock(),
            )
        seen = dataclasses.replace(seen, room=_ONE_IMAGE._replace(capacity=images.capacity))
        rooms = self.engine.shapes.every_row(images.row_images, images.capacity, images.least)
        self._rows(images.batch, seen, rooms, images.least)

    def text(self, batch: int) -> None:
        """Prompts without an image."""
        self._rows(batch, NOTHING_SEEN, self.engine.shapes.every_row(0, 0, 0), 0)

    def _empty(self, shape: ImageShape) -> Encoded:
        if shape not in self._encoded:
            side = self.engine.config.tower.tile_size
            pixels = np.zeros((0, side, side, 3), np.float32)
            # Only the newest stays in memory.
            self._encoded = {shape: self.engine.encode(pixels, (), shape, Clock())}
            if self.encoded:
                one = self.engine.shapes.of_images(1, shape.tiles)
                part = self.engine.encode(pixels, (), one, Clock()).vision
                self.engine.joined([part], (), shape, Clock())
        return self._encoded[shape]

    def _rows(self, batch: int, seen: Seen, rooms: Sequence[RowRoom], least: int) -> None:
        """The decoder's part, for every room that rows of `least` visual tokens may need."""
        texts = self.engine.buckets.text
        for room in rooms:
            place = texts.index(room.text)
            # The longest text and the largest image may be in different rows.
            shortest = max(texts[place - 1] if place else 0, least)
            if shortest < self.engine.config.text_config.context_length:
                self._decode(batch, room, seen)

    def _decode(self, batch: int, room: RowRoom, seen: Seen) -> None:
        row = Row([[1, 1]], []) if seen.selection is None else Row([[1], [1]], [0])
        for new_slots in self.engine.buckets.new_tokens:
            prompt = self.engine.lay_out([row], seen, room, batch=batch, new_slots=new_slots)
            shape = sharding = None
            if seen.selection is not None:  # on a mesh, programs differ by where arguments are
                shape, sharding = seen.selection.tokens.shape, seen.selection.tokens.sharding
            key = (batch, room.slots, prompt.schedule, sharding)
            if (key, new_slots, shape) in self._seen:
                continue
            known = (key, new_slots) in self._seen
            self._seen |= {(key, new_slots), (key, new_slots, shape)}
            if known:  # the decoder does not ask what makes up its rows
                self.engine.embed(prompt, seen)
                continue
            for greedy in self.draws:
                self._answer(prompt, seen, greedy)

    def _answer(self, prompt: Prompt, seen: Seen, greedy: bool) -> None:
        own = self.engine.processor.defaults  # which may ask for more than the likeliest token
        ask = Ask(**own) if greedy else Ask(**own, temperature=1.0)
        sampling = self.engine.sampling([ask], [], batch=prompt.batch)
        state = self.engine.read(prompt, seen, sampling, clock=Clock()).state
        until = np.ones(prompt.batch, int)
        for _ in range(2):  # on a mesh, its own result may lie otherwise than prefill's
            state = self.engine.write(state, until, sampling, Clock())
        to_host((state.step, state.tokens, state.lengths, state.done))  # as a request does
        self.done += 1


_ONE_IMAGE = ImageRoom(np.ones(1, int), np.ones(1, int), np.zeros(1, int), 1)
