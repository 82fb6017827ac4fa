"""A decoder-side method on one batch: static lengths from buckets, exact counts from rows."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.engine.shapes import RowRoom
from jaxprune.inputs.layout import Layout
from jaxprune.methods.base import DecoderMethod, removed_table
from jaxprune.ops.cuts import QUESTION, Depth, Schedule


@functools.lru_cache(maxsize=256)
def gather_schedule(
    method: DecoderMethod, depth: Depth, room: RowRoom, *, distinct: int | None, multiple: int = 1
) -> Schedule:
    """The schedule whose lengths hold whatever rows the room may hold.

    Args:
        method: the decoder-side method.
        depth: the model's.
        room: the batch's buckets.
        distinct: how many different lengths the layers may have; None for any number.
        multiple: that lengths are rounded up to, see `shapes.ALIGNED`.
    """
    table = removed_table(method, depth, room.visual)  # [visual + 1, L]
    # Not the largest row's: with rounding, fewer tokens may leave more behind. A row whose
    # last token is visual keeps that one, whatever the counts say.
    left = np.max(np.arange(room.visual + 1)[:, None] - table, axis=0)
    needed = room.text + left if room.visual else np.full(len(left), room.text)
    before = np.concatenate([np.zeros_like(table[:, :1]), table[:, :-1]], axis=1)
    return Schedule(
        layers=tuple(int(l) for l in np.nonzero((table > before).any(axis=0))[0]),
        lengths=few_lengths(
            [min(-(-int(n) // multiple) * multiple, room.slots) for n in needed], distinct
        ),
        **_kind_of(method, room),
    )


def few_lengths(lengths: Sequence[int], distinct: int | None) -> tuple[int, ...]:
    """Falling lengths rounded up to at most `distinct` different ones, at the least total.

    Args:
        lengths: what each layer needs, not increasing.
        distinct: how many different ones may be left; None changes nothing.
    """
    if distinct is None or len(set(lengths)) <= distinct:
        return tuple(lengths)
    # Groups of neighbouring layers take their first one's length. best[g][l]: the least
    # total of the layers from l on in g groups, and where the first of these ends.
    L = len(lengths)
    best = [[(math.inf, L)] * L + [(0.0, L)]]
    for _ in range(distinct):
        best.append(
            [
                min((lengths[l] * (e - l) + best[-1][e][0], e) for e in range(l + 1, L + 1))
                for l in range(L)
            ]
            + [(0.0, L)]
        )
    rounded: list[int] = []
    for groups in range(distinct, 0, -1):
        if len(rounded) < L:
            end = best[groups][len(rounded)][1]
            rounded += [lengths[len(rounded)]] * (end - len(rounded))
    return tuple(rounded)


def mask_schedule(method: DecoderMethod, depth: Depth, room: RowRoom) -> Schedule:
    """The schedule that evaluates any counts in one program: every layer may cut."""
    return Schedule(
        layers=tuple(range(depth.num_hidden_layers)),
        **_kind_of(method, room),
    )


def _kind_of(method: DecoderMethod, room: RowRoom) -> dict[str, Any]:
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
