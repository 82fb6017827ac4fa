"""`generate` and `stream`: from an image and a prompt to an answer.

    request.py     image + prompt -> rows of token ids, RGB images
    stages.py      the jitted stages: encode, select, embed, prefill, decode
    run.py         a request on its way through them

Both make a `Run` of their arguments and drive it to its end.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxprune.engine.session import Run, make_options, seeds_of
from jaxprune.engine.shapes import DEFAULT_BUCKETS, Buckets
from jaxprune.errors import UserError
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.request import make_request
from jaxprune.model import Params, complete

STOP_CHECK_EVERY = 16  # tokens between looks for a stop string


def generate(
    params: Params | Mapping[str, Any],
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
    config: Any = None,
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
        chat: wrap prompts in the model's chat template; False takes them as they stand.
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
    run = _prepare(
        complete(params, config, processor),
        image,
        prompt,
        seed,
        timed=return_details,
        method=method,
        method_options=method_options,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        chat=chat,
        buckets=buckets,
    )
    finish(run)
    answers: list[Any] = run.answers() if return_details else run.texts()
    return answers[0] if run.request.single else answers


def finish(run: Run) -> None:
    """Drive a run to its end; without stop strings in one dispatch behind the prefill."""
    run.start()
    chunk = STOP_CHECK_EVERY if run.options.stop else run.max_new_tokens
    run.advance(chunk)
    while not run.finished:
        run.advance(chunk)


def _prepare(
    params: Params,
    image: Any,
    prompt: Any,
    seed: int | Sequence[int],
    *,
    timed: bool = False,
    **fields: Any,
) -> Run:
    """Check everything, tokenise, load images."""
    options = make_options(params.config, seed=seed, **fields)
    began = time.perf_counter()
    assert params.processor is not None
    request = make_request(params.processor, image, prompt, chat=options.chat)
    spent = time.perf_counter() - began
    run = Run(params, options, request, seeds_of(seed, len(request.rows)), timed=timed)
    run.seconds["preprocess"] = spent
    return run


def stream(
    params: Params | Mapping[str, Any],
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
    config: Any = None,
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
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise UserError(f"chunk_tokens is {chunk_tokens!r}; expected a whole number, 1 or more.")
    run = _prepare(
        complete(params, config, processor),
        image,
        prompt,
        seed,
        method=method,
        method_options=method_options,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        chat=chat,
        buckets=buckets,
    )
    return _pieces(run, chunk_tokens)


def _pieces(run: Run, chunk_tokens: int) -> Iterator[Any]:
    run.start()
    run.fetch()
    sent = [""] * len(run.request.rows)
    while True:
        texts = run.texts()
        if not run.finished:
            texts = [run.safe_part(text) for text in texts]
        pieces = [new[len(old) :] for old, new in zip(sent, texts, strict=True)]
        sent = [old + piece for old, piece in zip(sent, pieces, strict=True)]
        if any(pieces):
            yield pieces[0] if run.request.single else pieces
        if run.finished:
            return
        run.advance(chunk_tokens)
