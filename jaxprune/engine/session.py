"""One request on its way through the engine: what belongs to it, and nothing else.

`begin` takes a request up to the first token of every row; `advance` takes it further.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.devices.mesh import to_host
from jaxprune.engine.engine import NOTHING_SEEN, Clock, Engine, Prompt, Seen
from jaxprune.engine.running_text import RunningText
from jaxprune.engine.sampling import Ask, Sampling
from jaxprune.engine.stages import DecodeState
from jaxprune.errors import UserError
from jaxprune.inputs.images import EncodedImage
from jaxprune.inputs.pixels import pixel_values, size_of
from jaxprune.inputs.request import Request
from jaxprune.ops.tiles import Tiling

STOP_CHECK_EVERY = 16  # tokens between looks for a stop string


@dataclasses.dataclass(kw_only=True)
class Session:
    """A request after its prefill; `begin` makes one.

    Attributes:
        engine: what runs it.
        request: the prompts and images.
        asks: what each row asks for.
        tilings: how each image is cut.
        seen: the images after pruning.
        prompt: the rows as the decoder read them.
        limits: int `[rows]`, new tokens of each, at most.
        sampling: what the rows ask for, on the devices.
        clock: seconds by stage.
        first_logits: float32 `[B, V]`, of the first tokens.
        survivors: who is left after each layer that drops tokens.
        sound: bool `[B]`, whether the first logits are numbers.
        state: where decoding is.
        step: int `[rows]`, tokens generated so far, the end of sequence included.
        tokens: int32 `[rows, M]`, the answers so far.
        lengths: int `[rows]`, tokens of each answer.
        done: bool `[rows]`, whether a row said its end of sequence.
        texts: the rows' texts so far.
    """

    engine: Engine
    request: Request
    asks: Sequence[Ask]
    tilings: Sequence[Tiling]
    seen: Seen
    prompt: Prompt
    limits: np.ndarray
    sampling: Sampling | None
    clock: Clock
    first_logits: Float[Array, "B V"]
    survivors: tuple[tuple[Array, ...], ...]
    sound: Bool[Array, " B"]
    state: DecodeState

    def __post_init__(self) -> None:
        rows = len(self.asks)
        self.texts = [RunningText(self.engine.processor, ask.stop) for ask in self.asks]
        self.step, self.lengths = np.ones(rows, int), np.zeros(rows, int)
        self.tokens, self.done = np.zeros((rows, 0), int), np.zeros(rows, bool)

    @property
    def resting(self) -> np.ndarray:
        """Whether a row's answer is complete: bool `[rows]`."""
        stopped = np.array([text.stopped for text in self.texts])
        resting: np.ndarray = self.done | stopped | (self.step >= self.limits)
        return resting

    @property
    def finished(self) -> bool:
        return bool(self.resting.all())

    def advance(self, tokens: int) -> None:
        """Generate up to so many more tokens in every row that needs them: one dispatch."""
        until = np.zeros(self.prompt.batch, int)
        rows = len(self.asks)
        until[:rows] = np.where(self.resting, 0, np.minimum(self.step + tokens, self.limits))
        if (until[:rows] > self.step).any():
            self.state = self.engine.write(self.state, until, self.sampling, self.clock)
        self.fetch()

    def fetch(self) -> None:
        """Bring what is generated so far to the host, and its text.

        Raises:
            UserError: where the first logits were NaN or infinite.
        """
        rows, state = len(self.asks), self.state
        with self.clock.stage("decode"):
            step, tokens, lengths, done, sound = to_host(
                (state.step, state.tokens, state.lengths, state.done, self.sound)
            )
        if not sound[:rows].all():
            raise UserError(
                f"The model's logits for prompt {int(np.argmin(sound[:rows])) + 1} are NaN or "
                f"infinite in {self.engine.config.dtype}; try dtype='float32', or sound weights."
            )
        before = self.lengths
        self.step, self.tokens, self.done = step[:rows], tokens[:rows], done[:rows]
        self.lengths = np.minimum(lengths[:rows], self.limits)
        for b, text in enumerate(self.texts):
            last = bool(self.done[b] or self.step[b] >= self.limits[b])
            if last or self.lengths[b] > before[b]:
                text.add(self.tokens[b, before[b] : self.lengths[b]].tolist(), last=last)

    def finish(self) -> None:
        """Go on to the end; without stop strings in one dispatch after the prefill."""
        stops = any(ask.stop for ask in self.asks)
        chunk = STOP_CHECK_EVERY if stops else int(self.limits.max())
        self.advance(chunk)
        while not self.finished:
            self.advance(chunk)


def begin(engine: Engine, request: Request, asks: Sequence[Ask], clock: Clock) -> Session:
    """A request up to the first token of every row.

    Raises:
        UserError: for a request that the model, the buckets or the memory do not hold; under
            `no_compilation`, for a shape that is not covered.
    """
    if engine.reads_question:
        request = request.with_own_images()
    rows, processor = request.rows, engine.processor
    tilings = [engine.config.tiling(size_of(image)) for image in request.images]
    engine.check_images(request.images, tilings)
    batch = engine.buckets.fit("batch", len(rows))
    # Before any work on an accelerator: the part of the length that is known now.
    engine.check_ids(rows)
    engine.context_left(rows, engine.surely(tilings))
    seen = NOTHING_SEEN
    if tilings:
        shape = engine.shapes.of_images(len(tilings), max(tiling.tiles for tiling in tilings))
        if any(isinstance(image, EncodedImage) for image in request.images):
            encoded = engine.together(request.images, tilings, shape, clock)
        else:
            with clock.stage("preprocess"):
                pixels = pixel_values(processor, request.images, engine.config)
            encoded = engine.encode(pixels, tilings, shape, clock)
        seen = engine.select(
            encoded,
            batch=batch,
            row_images=max(len(row.images) for row in rows),
            questions=request.questions,
            clock=clock,
        )
    # Each row for itself: what a long one lacks, its neighbours still have.
    left = engine.context_left(rows, seen.room)
    limits = np.minimum([ask.max_new_tokens for ask in asks], left)
    new_slots = engine.buckets.fit("new_tokens", int(limits.max()))
    room = engine.room_of(rows, seen)
    prompt = engine.lay_out(rows, seen, room, batch=batch, new_slots=new_slots)
    sampling = engine.sampling(asks, rows, batch=batch)
    logits = any(ask.logits for ask in asks)
    read = engine.read(prompt, seen, sampling, logits=logits, clock=clock)
    return Session(
        engine=engine,
        request=request,
        asks=asks,
        tilings=tilings,
        seen=seen,
        prompt=prompt,
        limits=limits,
        sampling=sampling,
        clock=clock,
        **read._asdict(),
    )
