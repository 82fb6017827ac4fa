"""A decoder-side method on one batch: static lengths from buckets, exact counts from rows."""

import functools
from typing import Any

import numpy as np

from jaxprune.engine.shapes import Lengths, few_lengths
from jaxprune.inputs.layout import Layout
from jaxprune.methods.base import DecoderMethod, removed_table
from jaxprune.ops.cuts import QUESTION, Depth, Schedule


@functools.lru_cache(maxsize=256)
def gather_schedule(
    method: DecoderMethod, depth: Depth, room: Lengths, *, distinct: int | None
) -> Schedule:
    """The schedule whose lengths hold whatever rows the room may hold.

    Args:
        method: the decoder-side method.
        depth: the model's.
        room: the batch's buckets.
        distinct: how many different lengths the layers may have; None for any number.
    """
    table = removed_table(method, depth, room.visual)  # [visual + 1, L]
    # Not the largest row's: with rounding, fewer tokens may leave more behind. A row whose
    # last token is visual keeps that one, whatever the counts say.
    left = np.max(np.arange(room.visual + 1)[:, None] - table, axis=0)
    needed = room.text + left if room.visual else np.full(len(left), room.text)
    before = np.concatenate([np.zeros_like(table[:, :1]), table[:, :-1]], axis=1)
    return Schedule(
        layers=tuple(int(l) for l in np.nonzero((table > before).any(axis=0))[0]),
        lengths=few_lengths([int(n) for n in needed], distinct),
        **_kind_of(method, room),
    )


def mask_schedule(method: DecoderMethod, depth: Depth, room: Lengths) -> Schedule:
    """The schedule that evaluates any counts in one program: every layer may cut."""
    return Schedule(
        layers=tuple(range(depth.num_hidden_layers)),
        **_kind_of(method, room),
    )


def _kind_of(method: DecoderMethod, room: Lengths) -> dict[str, Any]:
    """What the two executions of a method have in common."""
    return {
        "cut": method.cut,
        "ranker": method.ranker,
        "prune_text": method.prune_text,
        "renumber": method.positions == "renumber",
        "query_slots": room.text,
    }


def candidates_left(method: DecoderMethod, depth: Depth, layout: Layout) -> np.ndarray:
    """How many candidates stay after each layer: int32 `[L, B]`.

    Args:
        method: the decoder-side method.
        depth: the model's.
        layout: the batch.
    """
    candidates = layout.candidates
    if method.prune_text:
        candidates = candidates + (layout.embedded.kind == QUESTION).sum(axis=1)
    removed = np.stack([method.removed(int(n), depth) for n in layout.visual], axis=1)  # [L, B]
    left: np.ndarray = np.maximum(candidates - removed, 0)
    return left.astype(np.int32)
