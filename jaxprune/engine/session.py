"""One request on its way through the engine: what belongs to it, and nothing else.

`begin` takes a request up to the first token of every row; `advance` takes it further.
"""

from collections.abc import Sequence

import numpy as np

from jaxprune.devices.mesh import to_host
from jaxprune.engine.engine import NOTHING_SEEN, Clock, Engine, Prompt, Read, Seen
from jaxprune.engine.running_text import RunningText
from jaxprune.engine.sampling import Ask, Sampling
from jaxprune.inputs.layout import row_length
from jaxprune.inputs.pixels import pixel_values, size_of
from jaxprune.inputs.request import Request
from jaxprune.ops.tiles import Tiling

STOP_CHECK_EVERY = 16  # tokens between looks for a stop string


class Session:
    """A request after its prefill; `begin` makes one.

    Attributes:
        engine: what runs it.
        request: the prompts and images.
        asks: what each row asks for.
        tilings: how each image is cut.
        seen: the images after pruning.
        prompt: the rows as the decoder read them.
        first_logits: float32 `[B, V]`, of the first tokens.
        survivors: who is left after each layer that drops tokens.
        state: where decoding is.
        limits: int `[B]`, new tokens of each row, at most.
        step: int `[rows]`, tokens generated so far, the end of sequence included.
        tokens: int32 `[rows, M]`, the answers so far.
        lengths: int `[rows]`, tokens of each answer.
        done: bool `[rows]`, whether a row said its end of sequence.
        texts: the rows' texts so far.
        clock: seconds by stage.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        asks: Sequence[Ask],
        *,
        tilings: Sequence[Tiling],
        seen: Seen,
        prompt: Prompt,
        limits: np.ndarray,
        sampling: Sampling,
        read: Read,
        clock: Clock,
    ) -> None:
        self.engine, self.request, self.asks, self.clock = engine, request, asks, clock
        self.tilings, self.seen, self.prompt, self.limits = tilings, seen, prompt, limits
        self.sampling, self.greedy = sampling, all(ask.greedy for ask in asks)
        self.first_logits, self.survivors, self.state = (
            read.first_logits,
            read.survivors,
            read.state,
        )
        self.texts = [RunningText(engine.processor, ask.stop) for ask in asks]
        self.step, self.lengths = np.ones(len(asks), int), np.zeros(len(asks), int)
        self.tokens, self.done = np.zeros((len(asks), 0), int), np.zeros(len(asks), bool)

    @property
    def resting(self) -> np.ndarray:
        """Whether a row's answer is complete: bool `[rows]`."""
        stopped = np.array([text.stopped for text in self.texts])
        resting: np.ndarray = self.done | stopped | (self.step >= self.limits[: len(self.asks)])
        return resting

    @property
    def finished(self) -> bool:
        return bool(self.resting.all())

    def advance(self, tokens: int) -> None:
        """Generate up to so many more tokens in every row that needs them: one dispatch."""
        until = np.zeros(self.prompt.batch, int)
        rows = len(self.asks)
        until[:rows] = np.where(self.resting, 0, np.minimum(self.step + tokens, self.limits[:rows]))
        if (until[:rows] > self.step).any():
            slots, room = sum(self.prompt.lengths), self.prompt.new_slots
            shape = {"batch": self.prompt.batch, "slots": slots, "new_tokens": room}
            self.state = self.engine.write(
                self.state, until, self.sampling, greedy=self.greedy, clock=self.clock, **shape
            )
        self.fetch()

    def fetch(self) -> None:
        """Bring what is generated so far to the host, and its text."""
        rows, state = len(self.asks), self.state
        with self.clock.stage("decode"):
            step, tokens, lengths, done = to_host(
                (state.step, state.tokens, state.lengths, state.done)
            )
        before = self.lengths
        self.step, self.tokens, self.done = step[:rows], tokens[:rows], done[:rows]
        self.lengths = np.minimum(lengths[:rows], self.limits[:rows])
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
    if engine.plan.vision is not None and engine.plan.vision.reads_question:
        request = request.with_own_images()
    rows, processor = request.rows, engine.processor
    tilings = [engine.config.tiling(size_of(image)) for image in request.images]
    if engine.plan.vision is not None and tilings:
        engine.plan.vision.check(min(tiling.num_patches for tiling in tilings))
    batch = engine.buckets.fit("batch", len(rows))
    # Before any work on an accelerator: the part of the length that is known now.
    unpruned = engine.unpruned(tilings)
    engine.check_context(rows, unpruned.counts * (engine.plan.vision is None))
    seen = NOTHING_SEEN
    if tilings:
        with clock.stage("preprocess"):
            pixels = pixel_values(processor, request.images, engine.config)
        shape = engine.shapes.of_images(len(tilings), max(tiling.tiles for tiling in tilings))
        seen = engine.select(
            engine.encode(pixels, tilings, shape, clock),
            batch=batch,
            row_images=max(len(row.images) for row in rows),
            questions=request.questions,
            clock=clock,
        )
        engine.check_context(rows, seen.room.counts)
    # Each row for itself: what a long one lacks, its neighbours still have.
    context = engine.config.text_config.context_length
    limits = np.zeros(batch, int)
    limits[: len(rows)] = [
        min(ask.max_new_tokens, context - row_length(row, seen.room.counts))
        for row, ask in zip(rows, asks, strict=True)
    ]
    new_slots = engine.buckets.fit("new_tokens", int(limits.max()))
    lengths = engine.lengths_of(rows, seen)
    prompt = engine.lay_out(rows, seen, lengths, batch=batch, new_slots=new_slots)
    sampling = engine.sampling(asks, batch)
    greedy = all(ask.greedy for ask in asks)
    return Session(
        engine,
        request,
        asks,
        tilings=tilings,
        seen=seen,
        prompt=prompt,
        limits=limits,
        sampling=sampling,
        read=engine.read(prompt, seen, sampling, greedy=greedy, clock=clock),
        clock=clock,
    )
