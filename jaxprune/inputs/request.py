"""What the user asked, as rows of token ids and images: all host-side checks are here."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxprune.errors import UserError
from jaxprune.inputs.images import load_image
from jaxprune.inputs.processor import (
    IMAGE_PLACEHOLDER,
    Processor,
    as_messages,
    message_text,
    render,
    tokenize,
)
from jaxprune.ops.cuts import ANSWER, CONTEXT, LAST, LAST_VISUAL, QUESTION, VISUAL


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt: the token ids between its images, which images those are, and a
    teacher-forced answer where one is to be scored."""

    pieces: list[list[int]]
    images: list[int]
    answer: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts.

    Attributes:
        rows: one a prompt.
        images: the distinct images of all rows, RGB.
        single: the user gave one prompt rather than a list, and gets one answer.
    """

    rows: list[Row]
    images: list[Image.Image]
    single: bool


def make_request(
    processor: Processor, image: Any, prompt: Any, *, chat: bool, answer: str | None = None
) -> Request:
    """Pair prompts with images, apply the chat template, tokenize.

    Args:
        answer: what is said to every prompt, to be scored; the end of sequence follows it.
        image: None, one image, or a list: an image (or a list of images) for each prompt.
        prompt: a string, a conversation (list of messages), or a list of either.
        chat: apply the chat template; False takes prompts as they stand.

    Raises:
        UserError: for prompts and images that do not fit together, or a broken image.
    """
    prompts, image_lists, single = _pair(image, prompt)
    distinct: dict[int, int] = {}  # the same object in several rows is encoded once
    loaded: list[Image.Image] = []
    rows = []
    for text, row_images in zip(prompts, image_lists, strict=True):
        for item in row_images:
            if id(item) not in distinct:
                distinct[id(item)] = len(loaded)
                loaded.append(load_image(item))
        number = len(row_images)
        if chat:
            text = render(processor, as_messages(text, number))
        elif not isinstance(text, str):
            raise UserError("chat=False takes prompts as they stand; expected a string.")
        elif not text.replace(IMAGE_PLACEHOLDER, "").strip():
            raise UserError("The prompt is empty; ask something about the image.")
        pieces = tokenize(processor, text, number)
        said = () if answer is None else _answer_ids(processor, text, answer, pieces)
        rows.append(Row(pieces, [distinct[id(item)] for item in row_images], said))
    return Request(rows, loaded, single)


def _answer_ids(processor: Processor, text: str, answer: str, pieces: list[list[int]]) -> list[int]:
    """Token ids of an answer behind a prompt, which may split it otherwise than alone."""
    space = "" if text[-1:].isspace() else " "
    *_, last = tokenize(processor, text + space + answer.strip(), len(pieces) - 1)
    known = pieces[-1]
    if last[: len(known)] == known:
        ids = last[len(known) :]
    else:  # its first letters join the prompt's last ones
        ids = processor.tokenizer(space + answer.strip(), add_special_tokens=False)["input_ids"]
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
        if _count_placeholders(prompt) > 1 and not any(isinstance(x, list | tuple) for x in images):
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


def _count_placeholders(prompt: Any) -> int:
    if isinstance(prompt, str):
        return prompt.count(IMAGE_PLACEHOLDER)
    return sum(message_text(message).count(IMAGE_PLACEHOLDER) for message in prompt)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every token of a batch goes; numpy arrays, padded to a bucket.

    Attributes:
        token_ids: int32 `[B, S]`.
        visual_index: int32 `[B, S]`: the slot's row in the batch's `[I * K]` visual
            tokens, -1 for text.
        kind: int32 `[B, S]`, what a token is to a schedule: see `ops.schedule`.
        lengths: int32 `[B]`.
    """

    token_ids: np.ndarray
    visual_index: np.ndarray
    kind: np.ndarray
    lengths: np.ndarray


def row_lengths(rows: Sequence[Row], counts: np.ndarray) -> list[int]:
    """Prompt tokens of each row with `counts[i]` visual tokens for image i."""
    return [text_length(row) + visual_length(row, counts) for row in rows]


def text_length(row: Row) -> int:
    """Text tokens of a row, its answer included."""
    return sum(map(len, row.pieces)) + len(row.answer)


def visual_length(row: Row, counts: np.ndarray) -> int:
    """Visual tokens of a row with `counts[i]` of them for image i."""
    return sum(int(counts[i]) for i in row.images)


def lay_out(
    rows: Sequence[Row],
    counts: np.ndarray,
    capacity: int,
    *,
    batch: int,
    sequence: int,
    fixed: int = 0,
) -> Layout:
    """Text and visual tokens of every row in order, without gaps, padded on the right.

    Args:
        rows: the prompts.
        counts: int `[I]`, visual tokens in use of each image.
        capacity: slots that each image has in the visual tokens, K.
        batch: rows to pad to; the padding rows are one token long.
        sequence: slots to pad to.
        fixed: visual tokens at the beginning of every image that are never pruned.
    """
    token_ids = np.zeros((batch, sequence), np.int32)
    visual_index = np.full((batch, sequence), -1, np.int32)
    kind = np.full((batch, sequence), CONTEXT, np.int32)
    lengths = np.ones(batch, np.int32)
    for b, row in enumerate(rows):
        slot = 0
        for i, piece in enumerate(row.pieces):
            token_ids[b, slot : slot + len(piece)] = piece
            if row.images and i == len(row.images):
                kind[b, slot : slot + len(piece)] = QUESTION
            slot += len(piece)
            if i < len(row.images):
                image, count = row.images[i], int(counts[row.images[i]])
                visual_index[b, slot : slot + count] = image * capacity + np.arange(count)
                kind[b, slot + fixed : slot + count] = VISUAL
                slot += count
        kind[b, slot - 1] = LAST if visual_index[b, slot - 1] < 0 else LAST_VISUAL
        token_ids[b, slot : slot + len(row.answer)] = row.answer
        kind[b, slot : slot + len(row.answer)] = ANSWER
        lengths[b] = slot + len(row.answer)
    return Layout(token_ids, visual_index, kind, lengths)
