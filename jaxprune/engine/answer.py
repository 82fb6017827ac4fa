"""What a user gets: texts, and everything that there is to know about an answer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.devices.mesh import to_host
from jaxprune.engine.cost import Cost, executed, prompt_cost
from jaxprune.engine.sampling import Ask, Noted
from jaxprune.engine.session import Session
from jaxprune.inputs.layout import row_length, text_length, visual_length
from jaxprune.ops.tiles import CLS, NO_PATCH


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's answer in detail.

    Attributes:
        text: the answer.
        token_ids: its tokens, the end-of-sequence token left out; of one that a stop string
            ended, those up to the one that completes it.
        finish_reason: "eos", "stop" (a stop string) or "length".
        prompt_tokens: tokens that entered the decoder, visual ones included.
        visual_tokens: for each image, how many of them were visual.
        unpruned_visual_tokens: for each image, how many there are without pruning.
        kept_indices: for each image, the patches that stayed, int32, in the decoder's
            order; -1 for a token that stands for several, -2 for a newline. Of an image of
            several tiles a patch is tile * (patches of a tile) + its place in the tile.
        kept_by_layer: for each decoder layer that drops tokens, for each image, the patches
            that are left after it; behind the last one's, -1 for each token that is made of
            dropped ones.
        cost: tokens, multiply-adds and cache bytes in every decoder layer, exact and as
            executed in padded shapes.
        seconds: wall time of the whole batch by stage: "preprocess", "encode", "select",
            "prefill", "decode". A first call includes compilation.
        batch: answers that were made together, in those seconds.
        compiled: XLA programs that were made in those seconds.
        logprobs: for each token its log-probability and the likeliest ones at its place, where
            they are asked for.
        logits: float32 `[tokens, V]`, where they are asked for.
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
    batch: int = 1
    compiled: int = 0
    logprobs: list["TokenLogprobs"] | None = None
    logits: np.ndarray | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields as what JSON can say; logits left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["logits"]
        if self.logprobs is None:
            del fields["logprobs"]
        else:
            fields["logprobs"] = [own._asdict() for own in self.logprobs]
        return {
            **fields,
            "kept_indices": [kept.tolist() for kept in self.kept_indices],
            "kept_by_layer": {
                layer: [kept.tolist() for kept in images]
                for layer, images in self.kept_by_layer.items()
            },
            "cost": self.cost.as_dict(),
            "seconds": {stage: round(value, 6) for stage, value in self.seconds.items()},
        }


class TokenLogprobs(NamedTuple):
    """A token's log-probability, in nats, and the likeliest tokens at its place with theirs."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def texts_of(session: Session) -> list[str]:
    """The answers so far."""
    return [text.text for text in session.texts]


def answers_of(session: Session) -> list[Answer]:
    """The answers so far in detail; a row that is not finished has the finish reason "length"."""
    selection = session.seen.selection
    wanted = any(ask.logits or ask.logprobs is not None for ask in session.asks)
    indices, survivors, notes = to_host(
        (
            None if selection is None else selection.indices,
            session.survivors,
            session.state.notes if wanted else None,
        )
    )
    rows = range(len(session.asks))
    return [_answer(session, b, indices, survivors, notes) for b in rows]


def _answer(
    session: Session, b: int, indices: np.ndarray | None, survivors: Any, notes: Noted | None
) -> Answer:
    row, counts = session.request.rows[b], session.seen.room.counts
    unpruned = [session.tilings[i].num_tokens for i in row.images]
    kept = [] if indices is None else [_patches(indices[i, : counts[i]]) for i in row.images]
    ids, ask = session.tokens[b, : session.texts[b].tokens].tolist(), session.asks[b]
    return Answer(
        text=session.texts[b].text,
        token_ids=ids,
        finish_reason=_finish_reason(session, b),
        prompt_tokens=row_length(row, counts),
        visual_tokens=[int(counts[i]) for i in row.images],
        unpruned_visual_tokens=unpruned,
        kept_indices=kept,
        kept_by_layer={} if indices is None else _kept_by_layer(session, b, indices, survivors),
        cost=_cost(session, b, sum(unpruned)),
        seconds=dict(session.clock.seconds),
        batch=len(session.asks),
        compiled=session.clock.compiled,
        logprobs=None if notes is None or ask.logprobs is None else _logprobs(ids, b, ask, notes),
        logits=None if notes is None or not ask.logits else np.asarray(notes.logits)[b, : len(ids)],
    )


def _logprobs(ids: Sequence[int], b: int, ask: Ask, notes: Noted) -> list[TokenLogprobs]:
    own, K = np.asarray(notes.logprob)[b], ask.logprobs
    top, values = (np.asarray(x)[b, :, :K].tolist() for x in (notes.top, notes.top_logprob))
    return [
        TokenLogprobs(token, float(own[i]), list(zip(top[i], values[i], strict=True)))
        for i, token in enumerate(ids)
    ]


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
        made = np.full(np.sum(here < 0), NO_PATCH, indices.dtype)  # of dropped tokens
        here = here[(here >= 0) & (index[here] >= 0)]
        place = index[here] % max(room.capacity, 1)
        which = np.searchsorted(ends, np.cumsum(index >= 0)[here] - 1, side="right")
        found[layer] = [_patches(indices[i, place[which == n]]) for n, i in enumerate(images)]
        if len(made):
            found[layer][-1] = np.append(found[layer][-1], made)
    return found


def _cost(session: Session, b: int, unpruned: int) -> Cost:
    engine, prompt, row = session.engine, session.prompt, session.request.rows[b]
    ends_with_image = bool(row.images) and not row.pieces[-1]
    found = prompt_cost(
        engine.config,
        engine.plan,
        text_tokens=text_length(row),
        unpruned_visual_tokens=unpruned,
        visual_tokens=visual_length(row, session.seen.room.counts),
        fixed=visual_length(row, session.seen.room.fixed) + ends_with_image,
    )
    slots, new = prompt.room.slots, prompt.new_slots
    run = executed(engine.config, slots, prompt.schedule, new_slots=new)
    return dataclasses.replace(found, executed=run)
