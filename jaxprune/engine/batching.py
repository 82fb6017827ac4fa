"""A queue of requests, run in batches of those that share a shape."""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from jaxprune.devices.compilation import NotWarm
from jaxprune.engine.answer import answers_of, texts_of
from jaxprune.engine.engine import Clock, Engine
from jaxprune.engine.sampling import Ask, one_seed
from jaxprune.engine.session import begin
from jaxprune.errors import UserError
from jaxprune.inputs.layout import text_room
from jaxprune.inputs.pixels import size_of
from jaxprune.inputs.request import Request, Row, make_request
from jaxprune.progress import track

WINDOW = 16  # batches that are read ahead, to find requests that go together
IMAGE_BYTES = 1 << 30  # of decoded images, read ahead beyond a batch


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A request that is checked and tokenised.

    Attributes:
        index: its place among all.
        request: one row and its images.
        ask: what it asks for.
        shape: the buckets of its text, its images, their tiles and new tokens.
    """

    index: int
    request: Request
    ask: Ask
    shape: tuple[int, ...]


class Queue:
    """Requests to one engine.

    Args:
        engine: what answers them.
        ask: what they ask for unless they say otherwise.
        chat: whether they are wrapped in the chat template unless they say otherwise.
        neutralise: whether special tokens in them are text.
        batch_size: requests that run together, at most.
        details: `Answer` objects instead of strings.
    """

    def __init__(
        self,
        engine: Engine,
        ask: Ask,
        *,
        chat: bool,
        neutralise: bool,
        batch_size: int,
        details: bool,
    ) -> None:
        self.engine, self.ask, self.chat, self.neutralise = engine, ask, chat, neutralise
        self.batch_size, self.details = batch_size, details

    def answers(
        self, requests: Iterable[Any], *, return_errors: bool, show_progress: bool | None
    ) -> Iterator[Any]:
        """The result of every request, in their order; see `generate_many`."""
        results = self._in_order(iter(requests))
        if isinstance(requests, Sized):
            results = track(results, "Answering", len(requests), show=show_progress)
        with contextlib.closing(results):  # takes the bar down
            for result in results:
                if isinstance(result, UserError) and not return_errors:
                    raise result
                yield result

    def _in_order(self, requests: Iterator[Any]) -> Generator[Any, None, None]:
        """The results of all requests, errors included."""
        numbered = enumerate(requests)
        waiting: list[Waiting] = []
        ready: dict[int, Any] = {}
        broken: Exception | None = None  # of the caller's iterator: raised after what came before
        for due in itertools.count():
            while due not in ready:
                # Errors count as well, or an endless stream of them would be read forever.
                while broken is None and self._more(waiting, len(ready)):
                    try:
                        index, request = next(numbered)
                    except StopIteration:
                        break
                    except Exception as error:  # the caller's own, whatever it is
                        broken = error
                        break
                    try:
                        waiting.append(self._check(index, request))
                    except UserError as error:
                        ready[index] = _bare(error)
                if not waiting:
                    break
                batch = self._next_batch(waiting)
                taken = {one.index for one in batch}
                waiting = [one for one in waiting if one.index not in taken]
                ready |= self._run(batch)
            if due not in ready:
                if broken is not None:
                    raise broken
                return
            yield ready.pop(due)

    def _next_batch(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """The first request, and those that can run with it."""
        first = waiting[0]
        same = [one for one in waiting if one.shape == first.shape]
        images = itertools.accumulate(len(one.request.images) for one in same)
        fit = sum(number <= self.engine.buckets.images[-1] for number in images)
        return same[: max(1, min(self.batch_size, fit))]

    def _check(self, index: int, request: Any) -> Waiting:
        """One request, tokenised and its images loaded."""
        image, prompt, own = _parts(index, request)
        chat = own.pop("chat", self.chat)
        if "seed" in own:
            own["seed"] = _seed(index, own["seed"])
        ask = dataclasses.replace(self.ask, **own)
        images = [image] if isinstance(image, list | tuple) else image
        prompts = [prompt] if images is not image else prompt
        made = make_request(
            self.engine.processor, images, prompts, chat=chat, neutralise=self.neutralise
        )
        if len(made.rows) != 1:
            raise UserError(f"Request {index + 1} has {len(made.rows)} prompts; expected one.")
        config, fit, row = self.engine.config, self.engine.buckets.fit, made.rows[0]
        tilings = [config.tiling(size_of(picture)) for picture in made.images]
        text = fit("text", text_room(row, self.engine.unpruned(tilings).fixed))
        tiles = fit("image_tiles", max((tiling.tiles for tiling in tilings), default=1))
        # What the context cuts off may be over the largest bucket.
        new = min(ask.max_new_tokens, self.engine.buckets.new_tokens[-1])
        images = fit("row_images", len(row.images)) if row.images else 0
        return Waiting(index, made, ask, (text, images, tiles, fit("new_tokens", new)))

    def _more(self, waiting: Sequence[Waiting], ready: int) -> bool:
        """Whether to read another request ahead."""
        room = len(waiting) + ready < WINDOW * self.batch_size
        if len(waiting) < self.batch_size:
            return room
        images = (image for one in waiting for image in one.request.images)
        held = sum(4 * image.height * image.width for image in images)
        return room and held < IMAGE_BYTES

    def _run(self, batch: Sequence[Waiting]) -> dict[int, Any]:
        """The results of requests of one shape, by their place."""
        try:
            session = begin(
                self.engine, _together(batch), [one.ask for one in batch], Clock(timed=self.details)
            )
            session.finish()
            answers: list[Any] = answers_of(session) if self.details else list(texts_of(session))
        except NotWarm:
            raise
        except UserError as error:
            if len(batch) == 1:
                return {batch[0].index: _bare(error)}
            # One of them is at fault; alone, the others get their answers.
            return {k: v for one in batch for k, v in self._run([one]).items()}
        return {one.index: answer for one, answer in zip(batch, answers, strict=True)}


def _parts(index: int, request: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Image, prompt and own options of a request."""
    if isinstance(request, Mapping):
        own = {"image": None, "prompt": None, **request}
    elif isinstance(request, tuple | list) and len(request) == 2:
        own = {"image": request[0], "prompt": request[1]}
    else:
        raise UserError(
            f"Request {index + 1} is a {type(request).__name__}; expected (image, prompt) or a "
            "dict."
        )
    allowed = {"image", "prompt", "chat", *(field.name for field in dataclasses.fields(Ask))}
    unknown = sorted(set(own) - allowed)
    if unknown:
        raise UserError(
            f"Request {index + 1} has unknown {', '.join(map(str, unknown))}; expected some of: "
            f"{', '.join(sorted(allowed))}."
        )
    return own.pop("image"), own.pop("prompt"), own


def _seed(index: int, seed: Any) -> Any:
    if not isinstance(seed, list | tuple):
        return one_seed(seed)
    if len(seed) != 1:
        raise UserError(f"Request {index + 1} has {len(seed)} seeds; expected one.")
    return seed[0]


def _together(batch: Sequence[Waiting]) -> Request:
    """Requests of one row each as one of several."""
    rows: list[Row] = []
    images: list[Any] = []
    for one in batch:
        row = one.request.rows[0]
        rows.append(dataclasses.replace(row, images=[i + len(images) for i in row.images]))
        images += one.request.images
    return Request(rows, images, False)


def _bare(error: UserError) -> UserError:
    """An error without what it came from, which would keep images and arrays alive."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
