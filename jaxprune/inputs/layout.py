"""Where every token of a batch goes: slots, kinds and positions, on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.inputs.request import Row
from jaxprune.models.family import Embedded
from jaxprune.ops.cuts import ANSWER, CONTEXT, LAST, LAST_VISUAL, QUESTION, VISUAL


class ImageRoom(NamedTuple):
    """What images take up in a batch's rows.

    Attributes:
        counts: int `[I]`, visual tokens in use of each image.
        extents: int `[I]`, positions that each takes up before the text after it.
        fixed: int `[I]`, those of its tokens that are never pruned.
        capacity: K, slots that each image has in the visual tokens.
    """

    counts: np.ndarray
    extents: np.ndarray
    fixed: np.ndarray
    capacity: int


_NONE = np.zeros(0, int)
NO_IMAGES = ImageRoom(_NONE, _NONE, _NONE, 0)


class Layout(NamedTuple):
    """Where every token of a batch goes; numpy arrays, padded to a bucket.

    Attributes:
        embedded: what the decoder's input is made of.
        next_position: int32 `[B]`, where a row's first new token goes.
        candidates: int `[B]`, visual tokens of each row that may be pruned.
        visual: int `[B]`, visual tokens of each row.
    """

    embedded: Embedded
    next_position: np.ndarray
    candidates: np.ndarray
    visual: np.ndarray


def text_length(row: Row) -> int:
    """Text tokens of a row, its answer included."""
    return sum(map(len, row.pieces)) + len(row.answer)


def visual_length(row: Row, counts: np.ndarray) -> int:
    """Visual tokens of a row with `counts[i]` of them for image i."""
    return sum(int(counts[i]) for i in row.images)


def row_length(row: Row, counts: np.ndarray) -> int:
    """Tokens of a row with `counts[i]` visual ones for image i."""
    return text_length(row) + visual_length(row, counts)


def text_room(row: Row, fixed: np.ndarray) -> int:
    """Slots of a row that no cut in the decoder frees.

    The last token of a row that ends with an image counts as text, and so do the tokens of
    images that are never pruned, `fixed[i]` of image i.
    """
    return text_length(row) + (not row.pieces[-1]) + visual_length(row, fixed)


def lay_out(
    rows: Sequence[Row],
    room: ImageRoom,
    *,
    batch: int,
    sequence: int,
    axes: tuple[int, ...] = (),
) -> Layout:
    """Text and visual tokens of every row in order, without gaps, padded on the right.

    Args:
        rows: the prompts.
        room: what their images take up.
        batch: rows to pad to; the padding rows are one token long.
        sequence: slots to pad to.
        axes: (A,) where positions have several axes: text is at the same place on each.
    """
    token_ids = np.zeros((batch, sequence), np.int32)
    visual_index = np.full((batch, sequence), -1, np.int32)
    kind = np.full((batch, sequence), CONTEXT, np.int32)
    positions = np.zeros((batch, sequence), np.int32)
    lengths, next_position = np.ones((2, batch), np.int32)
    for b, row in enumerate(rows):
        slot = position = 0
        for i, piece in enumerate(row.pieces):
            own = slice(slot, slot + len(piece))
            token_ids[b, own] = piece
            positions[b, own] = position + np.arange(len(piece))
            if row.images and i == len(row.images):
                kind[b, own] = QUESTION
            slot, position = slot + len(piece), position + len(piece)
            if i < len(row.images):
                image = row.images[i]
                count = int(room.counts[image])
                own = slice(slot, slot + count)
                visual_index[b, own] = image * room.capacity + np.arange(count)
                kind[b, own] = VISUAL
                positions[b, own] = position
                slot, position = slot + count, position + int(room.extents[image])
        kind[b, slot - 1] = LAST if visual_index[b, slot - 1] < 0 else LAST_VISUAL
        own = slice(slot, slot + len(row.answer))
        token_ids[b, own], kind[b, own] = row.answer, ANSWER
        positions[b, own] = position + np.arange(len(row.answer))
        lengths[b], next_position[b] = slot + len(row.answer), position + len(row.answer)
    fixed = np.zeros(batch, int)
    fixed[: len(rows)] = [visual_length(row, room.fixed) for row in rows]
    visual = (visual_index >= 0).sum(axis=1)
    positions = np.broadcast_to(positions, (*axes, *positions.shape))
    embedded = Embedded(token_ids, visual_index, kind, positions, lengths)
    return Layout(embedded, next_position, (kind == VISUAL).sum(axis=1) - fixed, visual)
