"""`generate`, `stream` and `generate_many`: from images and prompts to answers.

    inputs/     image + prompt -> rows of token ids, RGB images                   (host)
    engine/     encode, select, read, write: the stages, composed in one place    (jit)

Each makes a `Session` of its arguments and drives it to its end.
"""

import inspect
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
from PIL import Image

from jaxprune.engine.answer import Answer, answers_of, texts_of
from jaxprune.engine.batching import Queue
from jaxprune.engine.buckets import DEFAULT_BUCKETS, Buckets
from jaxprune.engine.engine import Clock, Engine
from jaxprune.engine.sampling import Ask, one_seed
from jaxprune.engine.session import begin
from jaxprune.errors import UserError, check_whole, is_whole
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.request import Request, make_request
from jaxprune.methods.base import Plan
from jaxprune.methods.resolve import draws_at_random, resolve
from jaxprune.model import Params, complete
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import depth_of

Arrays = Params | Mapping[str, Any]
OneImage = str | pathlib.Path | Image.Image | np.ndarray | None
OnePrompt = str | list[dict[str, Any]]
"""A question, or a conversation as messages of "role" and "content"."""
ManyImages = list[Any] | tuple[Any, ...]
ManyPrompts = list[str] | list[list[dict[str, Any]]] | tuple[str, ...]


@overload
def generate(
    params: Arrays,
    image: OneImage = None,
    prompt: OnePrompt = ...,
    *,
    return_details: Literal[False] = ...,
    **options: Any,
) -> str: ...
@overload
def generate(
    params: Arrays,
    image: OneImage = None,
    prompt: OnePrompt = ...,
    *,
    return_details: Literal[True],
    **options: Any,
) -> Answer: ...
@overload
def generate(
    params: Arrays,
    image: OneImage | ManyImages,
    prompt: ManyPrompts,
    *,
    return_details: Literal[False] = ...,
    **options: Any,
) -> list[str]: ...
@overload
def generate(
    params: Arrays,
    image: OneImage | ManyImages,
    prompt: ManyPrompts,
    *,
    return_details: Literal[True],
    **options: Any,
) -> list[Answer]: ...
@overload
def generate(params: Arrays, image: Any = None, prompt: Any = None, **options: Any) -> Any: ...
def generate(
    params: Arrays,
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
    config: ModelConfig | None = None,
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
            draw the same. The method "random" takes it too, if it is one number.
        stop: strings that end an answer; they are not part of it.
        chat: wrap prompts in the model's chat template; False takes them as they are.
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
    ask = Ask(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop
    )
    model = complete(params, config, processor)
    engine = Engine(model, plan_of(method, model.config, seed, method_options), buckets)
    clock = Clock(timed=return_details)
    with clock.stage("preprocess"):
        request = make_request(engine.processor, image, prompt, chat=chat)
    session = begin(engine, request, ask.of_rows(seed, len(request.rows)), clock)
    session.finish()
    answers: list[Any] = answers_of(session) if return_details else texts_of(session)
    return answers[0] if request.single else answers


def plan_of(method: Any, config: ModelConfig, seed: Any, options: dict[str, Any]) -> Plan:
    """The plan of a request; a named method that draws at random takes the request's seed."""
    if draws_at_random(method) and (is_whole(seed) or isinstance(seed, np.integer)):
        options = {"seed": int(seed), **options}
    elif draws_at_random(method) and "seed" not in options:
        raise UserError(
            'The method "random" draws once for all rows, but several seeds came; pass '
            "method=jaxprune.RandomPlaces(keep=..., seed=...)."
        )
    others = inspect.signature(generate).parameters
    return resolve(method, depth_of(config), others=others, **options)


def stream(
    params: Arrays,
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
    config: ModelConfig | None = None,
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
        jaxprune.UserError: as `generate`; for what its arguments tell at the call, for the
            rest at the first piece.
    """
    check_whole("chunk_tokens", chunk_tokens)
    ask = Ask(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop
    )
    model = complete(params, config, processor)
    engine = Engine(model, plan_of(method, model.config, seed, method_options), buckets)
    request = make_request(engine.processor, image, prompt, chat=chat)
    return _pieces(engine, request, ask.of_rows(seed, len(request.rows)), chunk_tokens)


def _pieces(
    engine: Engine, request: Request, asks: Sequence[Ask], chunk_tokens: int
) -> Iterator[Any]:
    session = begin(engine, request, asks, Clock())
    session.fetch()
    while True:
        pieces = [text.take() for text in session.texts]
        if any(pieces):
            yield pieces[0] if request.single else pieces
        if session.finished:
            return
        session.advance(chunk_tokens)


def generate_many(
    params: Arrays,
    requests: Iterable[Any],
    *,
    method: Any = "none",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = True,
    batch_size: int = 8,
    return_details: bool = False,
    return_errors: bool = False,
    config: ModelConfig | None = None,
    processor: Processor | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    show_progress: bool | None = None,
    **method_options: Any,
) -> Iterator[Any]:
    """Answer many requests, in their order, each as soon as it and those before it are done.

    Requests run together that have the same buckets of text, images, tiles and new tokens,
    whatever else they ask for. Up to 16 batches are read ahead, fewer where their images
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
        Exception: what `requests` itself raises, after the answers before it.
    """
    check_whole("batch_size", batch_size)
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise UserError(
            f"requests is a {type(requests).__name__}; expected pairs (image, prompt) or dicts."
        )
    ask = Ask(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=one_seed(seed), stop=stop,
    )  # fmt: skip
    model = complete(params, config, processor)
    engine = Engine(model, plan_of(method, model.config, seed, method_options), buckets)
    buckets.fit("batch", batch_size)
    queue = Queue(engine, ask, chat=chat, batch_size=batch_size, details=return_details)
    return queue.answers(requests, return_errors=return_errors, show_progress=show_progress)
