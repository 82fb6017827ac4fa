"""A decoder-side method on one batch: static lengths from buckets, exact counts from rows."""

import functools

import numpy as np

from jaxprune.engine.shapes import Lengths, few_lengths
from jaxprune.methods.base import DecoderMethod, Depth, removed_table
from jaxprune.ops.cuts import QUESTION, VISUAL, Schedule


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
        cut=method.cut,
        score=method.score,
        prune_text=method.prune_text,
        lengths=few_lengths([int(n) for n in needed], distinct),
        query_slots=room.text,
    )


def mask_schedule(method: DecoderMethod, depth: Depth, room: Lengths) -> Schedule:
    """The schedule that evaluates any counts in one program: every layer may cut."""
    return Schedule(
        layers=tuple(range(depth.num_hidden_layers)),
        cut=method.cut,
        score=method.score,
        prune_text=method.prune_text,
        query_slots=room.text,
    )


def candidates_left(
    method: DecoderMethod, depth: Depth, kind: np.ndarray, visual: np.ndarray
) -> np.ndarray:
    """How many candidates stay behind each layer: int32 `[L, B]`.

    Args:
        method: the decoder-side method.
        depth: the model's.
        kind: int32 `[B, S]`, the batch's tokens: see `ops.schedule`.
        visual: int `[B]`, visual tokens of each row.
    """
    candidates = (kind == VISUAL).sum(axis=1)
    if method.prune_text:
        candidates = candidates + (kind == QUESTION).sum(axis=1)
    removed = np.stack([method.removed(int(n), depth) for n in visual], axis=1)  # [L, B]
    return np.maximum(candidates - removed, 0).astype(np.int32)
