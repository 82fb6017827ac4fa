"""`generate_many`: a stream of requests, run in batches of those that share a shape."""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from typing import Any

from jaxprune.devices.compilation import NotWarm
from jaxprune.engine.session import Options, Run, make_options, seeds_of, text_room
from jaxprune.engine.shapes import DEFAULT_BUCKETS, Buckets
from jaxprune.errors import UserError
from jaxprune.generate import finish
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.request import Request, Row, make_request
from jaxprune.model import Params, complete
from jaxprune.progress import track

WINDOW = 16  # batches that are read ahead, to find requests that go together
IMAGE_BYTES = 1 << 30  # of decoded images, read ahead beyond a batch


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A request that is checked and tokenised.

    Attributes:
        index: its place among all.
        request: one row and its images.
        options: what it asks for, its new tokens rounded up to a bucket.
        limit: its new tokens, at most.
        seed: of its draws.
        shape: text bucket, images, and the bucket of their tiles.
    """

    index: int
    request: Request
    options: Options
    limit: int
    seed: int
    shape: tuple[int, int, int]


def generate_many(
    params: Params | Mapping[str, Any],
    requests: Iterable[Any],
    *,
    method: Any = "none",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | list[str] | tuple[str, ...] = (),
    chat: bool = True,
    batch_size: int = 8,
    return_details: bool = False,
    return_errors: bool = False,
    config: Any = None,
    processor: Processor | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    show_progress: bool | None = None,
    **method_options: Any,
) -> Iterator[Any]:
    """Answer many requests, in their order, each as soon as it and those before it are done.

    Requests run together that share their options, their number of images and the buckets of
    their text, tiles and new tokens. Up to 16 batches are read ahead, fewer where their images
    take more than 1 GiB, so `requests` may be endless.

    Args:
        params, config, processor, buckets: as for `generate`.
        requests: pairs (image, prompt), or dicts with "prompt", "image" and any of
            "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop" and "chat", which
            then go before the arguments of that name. An image is None, one, or a list for a
            prompt with several.
        method, method_options: as for `generate`, the same for all.
        max_new_tokens, temperature, top_k, top_p, seed, stop, chat: as for `generate`.
        batch_size: prompts that run together, at most.
        return_details: `Answer` objects instead of strings.
        return_errors: give the `UserError` of a request that cannot be served in its place
            and go on; without, it is raised when its turn comes.
        show_progress: a bar on stderr; None shows it in a terminal.

    Yields:
        A string, `Answer` or `UserError` for every request.

    Raises:
        jaxprune.UserError: for arguments that are wrong for all requests, at once; without
            `return_errors`, a request's own; under `no_compilation`, for a shape not covered.
        Exception: what `requests` itself raises, behind the answers before it.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; expected a whole number, 1 or more.")
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise UserError(
            f"requests is a {type(requests).__name__}; expected pairs (image, prompt) or dicts."
        )
    fields = {
        "method": method, "method_options": method_options, "max_new_tokens": max_new_tokens,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop,
        "chat": chat, "buckets": buckets,
    }  # fmt: skip
    model = complete(params, config, processor)
    options = make_options(model.config, **fields)  # a mistake shows before anything is read
    buckets.fit("batch", batch_size)
    total = len(requests) if isinstance(requests, Sized) else None
    results = _in_order(model, iter(requests), fields, options, batch_size, return_details)
    if total is not None:
        results = track(results, "Answering", total, show=show_progress)
    return _delivered(results, return_errors)


def _delivered(results: Generator[Any, None, None], return_errors: bool) -> Iterator[Any]:
    with contextlib.closing(results):  # takes the bar down
        for result in results:
            if isinstance(result, UserError) and not return_errors:
                raise result
            yield result


def _in_order(
    model: Params,
    requests: Iterator[Any],
    fields: dict[str, Any],
    options: Options,
    batch_size: int,
    details: bool,
) -> Generator[Any, None, None]:
    """The results of all requests, errors included."""
    numbered = enumerate(requests)
    waiting: list[_Waiting] = []
    ready: dict[int, Any] = {}
    broken: Exception | None = None  # of the caller's iterator: raised behind what came before
    for due in itertools.count():
        while due not in ready:
            # Errors count as well, or an endless stream of them would be read forever.
            while broken is None and _more(waiting, len(ready), batch_size):
                try:
                    index, request = next(numbered)
                except StopIteration:
                    break
                except Exception as error:  # the caller's own, whatever it is
                    broken = error
                    break
                try:
                    waiting.append(_check(model, index, request, fields, options))
                except UserError as error:
                    ready[index] = _bare(error)
            if not waiting:
                break
            first = waiting[0]
            same = [w for w in waiting if (w.options, w.shape) == (first.options, first.shape)]
            own = max(1, len(first.request.images))
            same = same[: max(1, min(batch_size, first.options.buckets.images[-1] // own))]
            taken = {w.index for w in same}
            waiting = [w for w in waiting if w.index not in taken]
            ready |= _run(model, same, details)
        if due not in ready:
            if broken is not None:
                raise broken
            return
        yield ready.pop(due)


def _check(
    model: Params, index: int, request: Any, fields: dict[str, Any], options: Options
) -> _Waiting:
    """One request, tokenised and its images loaded; `options` if it has none of its own."""
    if isinstance(request, Mapping):
        own = {"image": None, **request}
    elif isinstance(request, tuple | list) and len(request) == 2:
        own = {"image": request[0], "prompt": request[1]}
    else:
        raise UserError(
            f"Request {index + 1} is a {type(request).__name__}; expected (image, prompt) or a "
            "dict."
        )
    allowed = {"image", "prompt", *fields} - {"method", "method_options", "buckets"}
    unknown = sorted(set(own) - allowed)
    if unknown:
        raise UserError(
            f"Request {index + 1} has unknown {', '.join(map(str, unknown))}; expected some of: "
            f"{', '.join(sorted(allowed))}."
        )
    image, prompt = own.pop("image"), own.pop("prompt", None)
    assert model.processor is not None
    if own:
        fields = {**fields, **own}
        options = make_options(model.config, **fields)
    images = [image] if isinstance(image, list | tuple) else image
    prompts = [prompt] if images is not image else prompt
    made = make_request(model.processor, images, prompts, chat=options.chat)
    if len(made.rows) != 1:
        raise UserError(f"Request {index + 1} has {len(made.rows)} prompts; expected one.")
    seeds = seeds_of(fields["seed"], 1)
    if len(seeds) != 1:
        raise UserError(f"Request {index + 1} has {len(seeds)} seeds; expected one.")
    tilings = [model.config.tiling(image.height, image.width) for image in made.images]
    fit, row = options.buckets.fit, made.rows[0]
    tiles = fit("image_tiles", max((tiling.tiles for tiling in tilings), default=1))
    shape = (fit("text", text_room(row, model.config)), len(row.images), tiles)
    limit, sizes = options.max_new_tokens, options.buckets.new_tokens
    room = fit("new_tokens", limit) if limit <= sizes[-1] else limit
    options = dataclasses.replace(options, max_new_tokens=room)
    return _Waiting(index, made, options, limit, seeds[0], shape)


def _more(waiting: list[_Waiting], ready: int, batch_size: int) -> bool:
    """Whether to read another request ahead."""
    if len(waiting) < batch_size:
        return len(waiting) + ready < WINDOW * batch_size
    images = (image for one in waiting for image in one.request.images)
    held = sum(4 * image.height * image.width for image in images)
    return len(waiting) + ready < WINDOW * batch_size and held < IMAGE_BYTES


def _bare(error: UserError) -> UserError:
    """An error without what it came from, which would keep images and arrays alive."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _run(model: Params, batch: list[_Waiting], details: bool) -> dict[int, Any]:
    """The results of requests of one shape, by their place."""
    rows: list[Row] = []
    images: list[Any] = []
    for waiting in batch:
        row = waiting.request.rows[0]
        rows.append(Row(row.pieces, [i + len(images) for i in row.images]))
        images += waiting.request.images
    seeds = [waiting.seed for waiting in batch]
    limits = [waiting.limit for waiting in batch]
    asked = Request(rows, images, False)
    try:
        run = Run(model, batch[0].options, asked, seeds, limits=limits, timed=details)
        finish(run)
        answers = run.answers() if details else run.texts()
    except NotWarm:
        raise
    except UserError as error:
        if len(batch) == 1:
            return {batch[0].index: _bare(error)}
        answers = []
    if not answers:  # One of them is at fault; alone, the others get their answers.
        return {k: v for waiting in batch for k, v in _run(model, [waiting], details).items()}
    return {waiting.index: answer for waiting, answer in zip(batch, answers, strict=True)}
