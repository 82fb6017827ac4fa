"""How much a request will take in the tower and in the decoder, before it is tried.

What choosing patches takes is left out. It comes between the two and is below what prefill takes:
squares of float32 over an image's patches, at most `methods.counted.AT_ONCE` pairs at a time. XLA
gives `divprune`, `holov` and `mmtok` 90 to 110 MB for eight rows of LLaVA-1.5-7B and 640 to 810 MB
for eight of LLaVA-NeXT's. An unpruned prefill takes 3.5 and 14.5 GB there, one of the 64 and 160
tokens that are left 1.1 and 1.8 GB. SparseVLM's clusters take 85 MB for eight rows (all from the
compiler's `memory_analysis`, on a CPU); CLIP's text tower less than a layer of the vision tower.
"""

import functools
from collections.abc import Sequence

import numpy as np

from jaxprune.devices.memory import check_fits
from jaxprune.engine.cost import executed
from jaxprune.models.family import ModelConfig
from jaxprune.ops.attention import limits, scratch_bytes
from jaxprune.ops.cuts import Schedule
from jaxprune.ops.visual import PROJECTED, Signal


def request_bytes(
    config: ModelConfig,
    *,
    batch: int,
    slots: int,
    schedule: Schedule,
    new_slots: int,
    logits: bool = False,
) -> tuple[int, int]:
    """About what a prompt takes beside the weights: its caches, and a layer at work.

    Args:
        config: the model's config.
        batch: rows.
        slots: of the sequence that enters the decoder.
        schedule: what it drops.
        new_slots: room for tokens to be generated.
        logits: whether all their logits are kept.

    Returns:
        Bytes of all caches and notes, and of the most that is alive beside them.
    """
    c = config.text_config
    caches = batch * executed(config, slots, schedule, new_slots=new_slots)["cache_bytes"]
    caches += 4 * batch * new_slots * c.vocab_size * logits
    item = np.dtype(c.dtype).itemsize
    heads = c.num_attention_heads * c.head_dim
    # The residual, its norm and the heads' inputs; then the two halves of the MLP.
    attention = batch * slots * (2 * c.hidden_size + 4 * heads) * item
    mlp = batch * slots * (2 * c.hidden_size + 2 * c.intermediate_size) * item
    H, K = c.num_attention_heads, c.num_key_value_heads
    weights = scratch_bytes(batch, slots, heads=H, key_value_heads=K, block=limits.BLOCK)
    asks = schedule.ranker.asks
    if asks and set(asks) <= {"last", "text"}:
        rows = 1 if asks == ("last",) else schedule.query_slots or slots
        weights = max(weights, 2 * batch * H * min(rows, slots) * slots * 4)  # once more
    last = 2 * batch * c.vocab_size * 4
    return caches, max(attention + weights, mlp) + last


def tower_bytes(
    config: ModelConfig, tiles: int, signals: frozenset[Signal] = frozenset()
) -> tuple[int, int]:
    """About what encoding tiles takes beside the weights: what stays, and a layer at work.

    Args:
        config: the model's config.
        tiles: how many.
        signals: what is asked for besides features and keys.
    """
    stays, works = config.tower.bytes(tiles)
    if PROJECTED not in signals:
        return stays, works
    c = config.text_config
    projected = tiles * config.tower.tokens_per_tile * c.hidden_size * np.dtype(c.dtype).itemsize
    return stays + projected, max(works, 2 * projected)  # and the projector's inner layer


def check_tower_memory(
    config: ModelConfig,
    *,
    tiles: int,
    signals: frozenset[Signal] = frozenset(),
    images: Sequence[int] = (),
    image_tiles: int = 1,
    devices: int = 1,
    free: int | None,
) -> None:
    """Raise `UserError` when tiles will not fit into what is free, and say what would.

    Args:
        config: the model's config.
        tiles: of all images.
        signals: what the tower has to give besides features and keys.
        images: numbers of images that can be asked for instead.
        image_tiles: of each of these.
        devices: that share the tiles.
        free: bytes of each; None where that is not known.
    """
    check_fits(
        lambda number: tower_bytes(config, number * image_tiles, signals),
        tower_bytes(config, tiles, signals),
        f"{tiles} tiles of images",
        numbers=images,
        unit="images",
        advice="dtype='bfloat16'",
        devices=devices,
        free=free,
    )


def check_memory(
    config: ModelConfig,
    *,
    batch: int,
    slots: int,
    schedule: Schedule,
    new_slots: int,
    logits: bool = False,
    batches: Sequence[int] = (),
    devices: int = 1,
    free: int | None,
) -> None:
    """Raise `UserError` when a prompt will not fit into what is free, and say what would.

    Args:
        config, batch, slots, schedule, new_slots, logits: as for `request_bytes`.
        batches: numbers of rows that can be asked for instead.
        devices: that share the request.
        free: bytes of each; None where that is not known.
    """
    needed = functools.partial(
        request_bytes,
        config,
        slots=slots,
        schedule=schedule,
        new_slots=new_slots,
        logits=logits,
    )
    check_fits(
        lambda number: needed(batch=number),
        needed(batch=batch),
        f"{batch} rows of {slots} tokens, with room for {new_slots} new ones,",
        numbers=batches,
        unit="prompts",
        advice="fewer new tokens, a shorter prompt, a method that keeps less, or dtype='bfloat16'",
        devices=devices,
        free=free,
    )
