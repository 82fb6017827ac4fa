"""Masked multi-head attention that never holds the whole attention matrix.

    attention           any mask, by chunks of queries: packed training rows
    full_attention      everything sees everything: the vision tower
    causal_attention    a prompt, and what pruning reads from it: how much attention every
                        key received from some of the queries
    cached_attention    one new token a row against a cache

A CPU is fastest where a few heads' weights fit into its cache; an accelerator is better off
with fewer and larger products. To be read in this order:

    definition    softmax attention over a mask, and the sums that a `Watch` asks for
    limits        how much of it is done at once
    parts         an axis of queries in equal parts
    by_chunks     chunks of queries of all rows and heads: GPUs, meshes, explicit masks
    by_heads      blocks of queries of a few heads of one row: CPUs
    fused         the kernels of a TPU, which are in `fused_tpu`
    dispatch      which of these runs, and the scratch memory that it takes
    cached        one query a row
"""

from jaxprune.ops.attention import limits
from jaxprune.ops.attention.by_chunks import attention
from jaxprune.ops.attention.cached import Cached, cached_attention
from jaxprune.ops.attention.definition import Watch, causal_mask
from jaxprune.ops.attention.dispatch import causal_attention, full_attention, scratch_bytes

__all__ = [
    "Cached",
    "Watch",
    "attention",
    "cached_attention",
    "causal_attention",
    "causal_mask",
    "full_attention",
    "limits",
    "scratch_bytes",
]
