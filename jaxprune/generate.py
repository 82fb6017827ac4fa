"""`generate`, `stream` and `generate_many`: from images and prompts to answers.

    inputs/     image + prompt -> rows of token ids, RGB images                   (host)
    engine/     encode, select, read, write: the stages, composed in one place    (jit)

Each makes a `Session` of its arguments and drives it to its end.
"""

import dataclasses
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
from jaxprune.errors import UserError, check_flag, check_whole, is_whole
from jaxprune.inputs.images import EncodedImage
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.request import Request, make_request
from jaxprune.inputs.videos import Video, visual_of
from jaxprune.methods.base import Plan
from jaxprune.methods.resolve import draws_at_random, resolve
from jaxprune.model import Params, complete
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import depth_of

Arrays = Params | Mapping[str, Any]
OneImage = str | pathlib.Path | bytes | Image.Image | np.ndarray | EncodedImage | Video | None
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
    eos_token_id: int | Sequence[int] | None = None,
    min_new_tokens: int | None = None,
    repetition_penalty: float | None = None,
    suppress_tokens: Sequence[int] | None = None,
    num_return_sequences: int = 1,
    logprobs: int | None = None,
    return_logits: bool = False,
    chat: bool = True,
    neutralise: bool = False,
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
        eos_token_id: tokens that end an answer, instead of the model's own.
        min_new_tokens: before these no token ends an answer.
        repetition_penalty: above 1, makes tokens less likely that prompt or answer have already.
        suppress_tokens: ids that are never generated. For these three None takes what the
            model's generation_config.json says.
        num_return_sequences: answers to each prompt, drawn with seeds of their own.
        logprobs: note the log-probability of every token, and of so many likeliest ones at its
            place, by the model's own logits; for `return_details`.
        return_logits: note all logits; for `return_details`.
        chat: wrap prompts in the model's chat template; False takes them as they are.
        neutralise: special tokens that prompts have, such as "</s>", are text: a space of no
            width breaks them. Otherwise they are what the tokenizer makes of them.
        return_details: `Answer` objects instead of strings.
        config, processor: for bare params.
        buckets: the shapes that may be compiled.
        **method_options: hyperparameters of a named method, such as `keep=64`; for a recipe
            `fractions=True` takes one that was made for another model.

    Returns:
        A string (or `Answer`) for one prompt, a list of them for lists; with several
        `num_return_sequences` a list in the place of each.

    Raises:
        jaxprune.UserError: for a request that cannot be served; it says what to change.
    """
    check_flag("return_details", return_details)
    check_whole("num_return_sequences", num_return_sequences)
    model = _ending_with(complete(params, config, processor), eos_token_id)
    ask = _ask(
        model, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop=stop, min_new_tokens=min_new_tokens, repetition_penalty=repetition_penalty,
        suppress_tokens=suppress_tokens, logprobs=logprobs, logits=return_logits,
    )  # fmt: skip
    copies = num_return_sequences
    if copies > 1 and ask.temperature == 0:
        raise UserError(
            f"num_return_sequences is {copies}, but at temperature 0 all answers are the same; "
            "give a temperature."
        )
    if not ask.plain and not return_details and (ask.logits or ask.logprobs is not None):
        raise UserError("logprobs and return_logits are in the Answer; pass return_details=True.")
    engine = Engine(model, plan_of(method, model.config, seed, method_options), buckets)
    clock = Clock(timed=return_details)
    with clock.stage("preprocess"):
        request = make_request(engine.processor, image, prompt, chat=chat, neutralise=neutralise)
    asks = [own for one in ask.of_rows(seed, len(request.rows)) for own in one.copies(copies)]
    session = begin(engine, request.repeated(copies), asks, clock)
    session.finish()
    answers: list[Any] = answers_of(session) if return_details else texts_of(session)
    if copies > 1:
        answers = [answers[first : first + copies] for first in range(0, len(answers), copies)]
    return answers[0] if request.single else answers


_BY_MODEL = ("min_new_tokens", "repetition_penalty", "suppress_tokens")


def _ask(model: Params, **fields: Any) -> Ask:
    """What a row asks for; what the model has a default of its own for may be None."""
    assert model.processor is not None
    given = {name: x for name, x in fields.items() if x is not None or name not in _BY_MODEL}
    return Ask(**{**model.processor.defaults, **given})


def _ending_with(model: Params, eos_token_id: Any) -> Params:
    """The model, whose answers these tokens end; None: its own."""
    if eos_token_id is None or model.processor is None:
        return model
    ids = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    size = model.config.text_config.vocab_size
    if not all(is_whole(token) and 0 <= token < size for token in ids):
        raise UserError(
            f"eos_token_id is {eos_token_id!r}; expected the id of a token, 0 to {size - 1}, or "
            "several."
        )
    processor = dataclasses.replace(model.processor, eos_token_ids=tuple(ids))
    return dataclasses.replace(model, processor=processor)


def encode(
    params: Arrays,
    images: Any,
    *,
    method: Any = "none",
    config: ModelConfig | None = None,
    processor: Processor | None = None,
    buckets: Buckets = DEFAULT_BUCKETS,
    **method_options: Any,
) -> Any:
    """Run images through the tower once, to ask about them many times.

    Args:
        params, config, processor, buckets: as for `generate`.
        images: one, or a list of them, in any form that `generate` takes.
        method, method_options: what will prune them; others that go by no more of the tower
            may too.

    Returns:
        What `generate`, `stream` and `generate_many` take instead of an image; a list of them
        for a list. It stays on the devices as long as it is held.

    Raises:
        jaxprune.UserError: for a broken image, or a method that the model cannot follow.
    """
    model = complete(params, config, processor)
    engine = Engine(model, plan_of(method, model.config, 0, method_options), buckets)
    several = list(images) if isinstance(images, list | tuple) else [images]
    seen = [visual_of(image, engine.processor.videos) for image in several]
    found = [engine.encode_alone(image, Clock()) for image in seen]
    return found if isinstance(images, list | tuple) else found[0]


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
    eos_token_id: int | Sequence[int] | None = None,
    min_new_tokens: int | None = None,
    repetition_penalty: float | None = None,
    suppress_tokens: Sequence[int] | None = None,
    chat: bool = True,
    neutralise: bool = False,
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
    model = _ending_with(complete(params, config, processor), eos_token_id)
    ask = _ask(
        model, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop=stop, min_new_tokens=min_new_tokens, repetition_penalty=repetition_penalty,
        suppress_tokens=suppress_tokens,
    )  # fmt: skip
    engine = Engine(model, plan_of(method, model.config, seed, method_options), buckets)
    request = make_request(engine.processor, image, prompt, chat=chat, neutralise=neutralise)
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
    eos_token_id: int | Sequence[int] | None = None,
    min_new_tokens: int | None = None,
    repetition_penalty: float | None = None,
    suppress_tokens: Sequence[int] | None = None,
    logprobs: int | None = None,
    chat: bool = True,
    neutralise: bool = False,
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
            "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "min_new_tokens",
            "repetition_penalty" and "chat", which then go before the arguments of that name. An
            image is None, one, or a list for a prompt with several.
        method, method_options: as for `generate`, the same for all.
        max_new_tokens, temperature, top_k, top_p, seed, stop, eos_token_id, min_new_tokens,
            repetition_penalty, suppress_tokens, logprobs, chat, neutralise: as for `generate`.
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
    model = _ending_with(complete(params, config, processor), eos_token_id)
    ask = _ask(
        model, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=one_seed(seed), stop=stop, min_new_tokens=min_new_tokens,
        repetition_penalty=repetition_penalty, suppress_tokens=suppress_tokens, logprobs=logprobs,
    )  # fmt: skip
    engine = Engine(model, plan_of(method, model.config, seed, method_options), buckets)
    buckets.fit("batch", batch_size)
    if logprobs is not None and not return_details:
        raise UserError("logprobs are in the Answer; pass return_details=True.")
    queue = Queue(
        engine, ask, chat=chat, neutralise=neutralise, batch_size=batch_size, details=return_details
    )
    return queue.answers(requests, return_errors=return_errors, show_progress=show_progress)
