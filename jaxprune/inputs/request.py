"""What the user asked, as rows of token ids and images: all host-side checks are here."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.errors import UserError, check_flag
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.prompts import (
    AS_TEXT,
    as_it_stands,
    as_messages,
    num_places,
    question_of,
    render,
    tokenize,
    with_image_places,
    with_videos,
    with_videos_in_text,
)
from jaxprune.inputs.videos import Visual, seen_as
from jaxprune.models.family import IMAGE_PLACEHOLDER

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        pieces: the token ids between its images.
        images: which of the request's images those are.
        answer: a teacher-forced answer where one is to be scored.
        question: what the user asked last, the template's words and line breaks left out.
        labels: what is to be said where each of the answer's tokens stands, `NO_LABEL` where
            nothing is learned; None: those tokens themselves.
    """

    pieces: list[list[int]]
    images: list[int]
    answer: Sequence[int] = ()
    question: str = ""
    labels: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts.

    Attributes:
        rows: one a prompt.
        images: the distinct images of all rows, RGB or encoded.
        single: the user gave one prompt rather than a list, and gets one answer.
    """

    rows: list[Row]
    images: list[Visual]
    single: bool

    @property
    def questions(self) -> list[str]:
        """What is asked about each image, by the first row that has it."""
        asked: dict[int, str] = {}
        for row in self.rows:
            for image in row.images:
                asked.setdefault(image, row.question)
        return [asked.get(image, "") for image in range(len(self.images))]

    def repeated(self, number: int) -> "Request":
        """Every row so many times over."""
        rows = [row for row in self.rows for _ in range(number)]
        return dataclasses.replace(self, rows=rows)

    def with_own_images(self) -> "Request":
        """The same request, no image shared by two rows: for what is seen of it by the question."""
        rows: list[Row] = []
        images: list[Visual] = []
        for row in self.rows:
            own = [len(images) + n for n in range(len(row.images))]
            images += [self.images[image] for image in row.images]
            rows.append(dataclasses.replace(row, images=own))
        return Request(rows, images, self.single)


def make_request(
    processor: Processor,
    image: Any,
    prompt: Any,
    *,
    chat: bool,
    neutralise: bool = False,
    answers: Sequence[str] | None = None,
) -> Request:
    """Pair prompts with images, apply the chat template, tokenize.

    Args:
        processor: of the model.
        image: None, one image, or a list: an image (or a list of images) for each prompt.
        prompt: a string, a conversation (list of messages), or a list of either.
        chat: apply the chat template; False takes prompts as they stand.
        neutralise: special tokens in what is said are text.
        answers: what is said to each prompt, to be scored; the end of sequence follows it.

    Raises:
        UserError: for prompts and images that do not fit together, or a broken image.
    """
    check_flag("chat", chat)
    check_flag("neutralise", neutralise)
    if neutralise and not chat:
        raise UserError("neutralise is for what is said in a chat; chat=False takes all as it is.")
    broken = processor.special_tokens if neutralise else ()
    prompts, image_lists, single = _pair(image, with_image_places(prompt, image))
    distinct: dict[int, list[int]] = {}  # the same object in several rows is encoded once
    alive: list[Any] = []  # so that no two of them have one id
    loaded: list[Visual] = []
    rows = []
    if answers is not None and not (
        isinstance(answers, list | tuple) and all(isinstance(text, str) for text in answers)
    ):
        raise UserError(f"answers are {answers!r}; expected a text for each prompt.")
    if answers is not None and len(answers) != len(prompts):
        raise UserError(f"{len(answers)} answers came with {len(prompts)} prompts; give one each.")
    for i, (text, row_images) in enumerate(zip(prompts, image_lists, strict=True)):
        asked = question_of(text)
        if chat:
            messages, row_images = as_messages(text, row_images, special_tokens=broken)
            messages = with_videos(messages, row_images, processor.videos)
            text = render(processor, messages)
        else:
            text = with_videos_in_text(as_it_stands(text), row_images, processor.videos)
        own: list[int] = []
        for item in row_images:
            if id(item) not in distinct:
                seen = seen_as(item, processor.videos)
                distinct[id(item)] = [len(loaded) + n for n in range(len(seen))]
                alive.append(item)
                loaded += seen
            own += distinct[id(item)]
        pieces = tokenize(processor, text, len(own))
        said = () if answers is None else answer_ids(processor, text, answers[i], pieces)
        rows.append(Row(pieces, own, said, asked))
    return Request(rows, loaded, single)


def answer_ids(processor: Processor, text: str, answer: str, pieces: list[list[int]]) -> list[int]:
    """Token ids of an answer after a prompt, which may split it otherwise than alone.

    Args:
        processor: with the tokenizer.
        text: the prompt's.
        answer: what is said.
        pieces: what `tokenize` gives for the prompt.

    Returns:
        They and the end of the sequence, where the model has one.
    """
    space, answer = "" if text[-1:].isspace() else " ", answer.strip()
    said = answer.replace(IMAGE_PLACEHOLDER, AS_TEXT)
    *_, last = tokenize(processor, text + space + said, len(pieces) - 1)
    known = pieces[-1]
    # Its first letters may join the prompt's last ones.
    joined = last[: len(known)] != known
    ids = processor.ids_of(space + answer) if joined else last[len(known) :]
    ends = processor.eos_token_ids
    own = processor.tokenizer.eos_token_id
    return [*ids, *([own] if own in ends else ends[:1])]


def _pair(image: Any, prompt: Any) -> tuple[list[Any], list[list[Any]], bool]:
    """Prompts, the images of each, and whether there is a single one."""
    if prompt is None:
        raise UserError("There is no prompt; pass a question as a string.")
    one_prompt = _is_one_prompt(prompt)
    prompts: list[Any] = [prompt] if one_prompt else list(prompt)
    for item in prompts:
        if not isinstance(item, str | list | tuple):
            raise UserError(
                f"A prompt is a {type(item).__name__}; expected a string or a list of messages."
            )
    if not prompts:
        raise UserError("The list of prompts is empty; pass at least one.")

    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)
    if not isinstance(image, list | tuple):
        row = [] if image is None else [image]
        return prompts, [row] * len(prompts), one_prompt
    images = list(image)
    if not images:
        raise UserError("The list of images is empty; pass None for a text-only prompt.")
    nested = [list(item) if isinstance(item, list | tuple) else _row(item) for item in images]
    if one_prompt:
        if num_places(prompt) > 1 and not any(isinstance(x, list | tuple) for x in images):
            return prompts, [images], True  # several images in one prompt
        return prompts * len(images), nested, False
    if len(images) != len(prompts):
        raise UserError(
            f"{len(prompts)} prompts came with {len(images)} images; give one image (or list "
            "of images) for each prompt."
        )
    return prompts, nested, False


def _row(image: Any) -> list[Any]:
    return [] if image is None else [image]


def _is_one_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(
            f"prompt is a {type(prompt).__name__}; expected a string, a list of strings, or "
            "messages."
        )
    return bool(prompt) and isinstance(prompt[0], Mapping)
