"""What a user gets: texts, and everything that there is to know about an answer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.devices.mesh import to_host
from jaxprune.engine.cost import Cost, executed, prompt_cost
from jaxprune.engine.session import Session
from jaxprune.inputs.layout import row_length, text_length, visual_length
from jaxprune.ops.tiles import CLS


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's answer in detail.

    Attributes:
        text: the answer.
        token_ids: its tokens, the end-of-sequence token left out.
        finish_reason: "eos", "stop" (a stop string) or "length".
        prompt_tokens: tokens that entered the decoder, visual ones included.
        visual_tokens: for each image, how many of them were visual.
        unpruned_visual_tokens: for each image, how many there are without pruning.
        kept_indices: for each image, the patches that stayed, int32, in the decoder's
            order; -1 for a token that stands for several, -2 for a newline. Of an image of
            several tiles a patch is tile * (patches of a tile) + its place in the tile.
        kept_by_layer: for each decoder layer that drops tokens, for each image, the patches
            that are left after it.
        cost: tokens, multiply-adds and cache bytes in every decoder layer, exact and as
            executed in padded shapes.
        seconds: wall time of the whole batch by stage: "preprocess", "encode", "select",
            "prefill", "decode". A first call includes compilation.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    visual_tokens: list[int]
    unpruned_visual_tokens: list[int]
    kept_indices: list[np.ndarray]
    kept_by_layer: dict[int, list[np.ndarray]]
    cost: Cost
    seconds: dict[str, float]


def texts_of(session: Session) -> list[str]:
    """The answers so far."""
    return [text.text for text in session.texts]


def answers_of(session: Session) -> list[Answer]:
    """The answers so far in detail; a row that is not finished has the finish reason "length"."""
    selection = session.seen.selection
    indices, survivors = to_host(
        (None if selection is None else selection.indices, session.survivors)
    )
    return [_answer(session, b, indices, survivors) for b in range(len(session.asks))]


def _answer(session: Session, b: int, indices: np.ndarray | None, survivors: Any) -> Answer:
    row, counts = session.request.rows[b], session.seen.room.counts
    unpruned = [session.tilings[i].num_tokens for i in row.images]
    kept = [] if indices is None else [_patches(indices[i, : counts[i]]) for i in row.images]
    return Answer(
        text=session.texts[b].text,
        token_ids=session.tokens[b, : session.lengths[b]].tolist(),
        finish_reason=_finish_reason(session, b),
        prompt_tokens=row_length(row, counts),
        visual_tokens=[int(counts[i]) for i in row.images],
        unpruned_visual_tokens=unpruned,
        kept_indices=kept,
        kept_by_layer={} if indices is None else _kept_by_layer(session, b, indices, survivors),
        cost=_cost(session, b, sum(unpruned)),
        seconds=dict(session.clock.seconds),
    )


def _patches(indices: np.ndarray) -> np.ndarray:
    """Indices without those of CLS tokens."""
    return indices[indices > CLS]


def _finish_reason(session: Session, b: int) -> str:
    if session.texts[b].stopped:
        return "stop"
    return "eos" if session.done[b] and session.lengths[b] < session.limits[b] else "length"


def _kept_by_layer(
    session: Session, b: int, indices: np.ndarray, survivors: Sequence[tuple[np.ndarray, ...]]
) -> dict[int, list[np.ndarray]]:
    """For each layer that drops tokens, the patches of each image that are left."""
    room, images = session.seen.room, session.request.rows[b].images
    index = session.prompt.layout.embedded.visual_index[b]
    # An image may stand in a prompt twice, so what counts is which of its images it is.
    ends = np.cumsum(room.counts[images])
    found: dict[int, list[np.ndarray]] = {}
    for layer, (slots, valid) in zip(session.prompt.schedule.layers, survivors, strict=True):
        here = slots[b][valid[b]]
        here = here[index[here] >= 0]
        place = index[here] % max(room.capacity, 1)
        which = np.searchsorted(ends, np.cumsum(index >= 0)[here] - 1, side="right")
        found[layer] = [_patches(indices[i, place[which == n]]) for n, i in enumerate(images)]
    return found


def _cost(session: Session, b: int, unpruned: int) -> Cost:
    engine, prompt, row = session.engine, session.prompt, session.request.rows[b]
    found = prompt_cost(
        engine.config,
        engine.plan,
        text_tokens=text_length(row),
        unpruned_visual_tokens=unpruned,
        visual_tokens=visual_length(row, session.seen.room.counts),
    )
    slots, new = prompt.room.slots, prompt.new_slots
    run = executed(engine.config, slots, prompt.schedule, new_slots=new)
    return dataclasses.replace(found, executed=run)
