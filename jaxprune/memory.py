"""How much memory there is, and how much a request will take in the decoder.

What does not fit is refused before it is tried: out of memory, a device or the kernel would
end the process, and every request in it. The vision tower is not part of the estimate.
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from jaxprune.accounting import executed
from jaxprune.errors import UserError
from jaxprune.ops.attention import BLOCK, QUERY_CHUNK, heads_at_once
from jaxprune.ops.schedule import Schedule

_SPARE = 0.95  # of the free memory: estimates are no better than this


def peak_bytes() -> int:
    """The most memory in use so far: the first device's, on a CPU the process's; 0 if unknown."""
    found = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if found is not None:
        return int(found)
    if sys.platform == "win32":  # which has no such module
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free_bytes() -> int | None:
    """What a program can still allocate on a device; None where nobody says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def request_bytes(
    config: Any, *, batch: int, slots: int, schedule: Schedule, new_slots: int
) -> tuple[int, int]:
    """About what a prompt takes beside the weights: its caches, and a layer at work.

    Args:
        config: the model's config.
        batch: rows.
        slots: of the sequence that enters the decoder.
        schedule: what it drops.
        new_slots: room for tokens to be generated.

    Returns:
        Bytes of all caches, and of the most that is alive beside them.
    """
    c = config.text_config
    caches = batch * executed(config, slots, schedule, new_slots=new_slots)["cache_bytes"]
    item = 4 if c.dtype == "float32" else 2
    heads = c.num_attention_heads * c.head_dim
    # The residual, its norm and the heads' inputs; then the two halves of the MLP.
    attention = slots * (2 * c.hidden_size + 4 * heads) * item
    mlp = slots * (2 * c.hidden_size + 2 * c.intermediate_size) * item
    on_cpu = jax.default_backend() == "cpu"
    # A CPU takes a few heads of a row at a time; elsewhere it is all of them.
    H, K = c.num_attention_heads, c.num_key_value_heads
    block = H // K * heads_at_once(K) * BLOCK if on_cpu else H * min(QUERY_CHUNK, slots)
    if schedule.score is not None and set(schedule.score.queries) <= {"last", "text"}:
        rows = 1 if schedule.score.queries == ("last",) else schedule.query_slots or slots
        block = max(block, H * min(rows, slots))  # the text's rows, once more
    weights = 2 * block * slots * 4
    logits = 2 * c.vocab_size * 4
    return caches, batch * (max(attention + weights, mlp) + logits)


def check_memory(
    config: Any,
    *,
    batch: int,
    slots: int,
    schedule: Schedule,
    new_slots: int,
    devices: int = 1,
    free: int | None = None,
) -> None:
    """Raise `UserError` when a prompt will not fit into what is free, and say what would.

    Args:
        config, batch, slots, schedule, new_slots: as for `request_bytes`.
        devices: that share the request.
        free: bytes; None asks the device.
    """
    free = free_bytes() if free is None else free
    if free is None:
        return
    needed = functools.partial(
        request_bytes, config, slots=slots, schedule=schedule, new_slots=new_slots
    )
    caches, scratch = needed(batch=batch)
    if (caches + scratch) / devices <= _SPARE * free:
        return
    row = sum(needed(batch=1)) / devices
    fitting = int(_SPARE * free / row)
    advice = "fewer new tokens, a shorter prompt, a method that keeps less, or dtype='bfloat16'"
    if fitting:
        advice = f"about {fitting} prompts at once, {advice}"
    raise UserError(
        f"{batch} rows of {slots} tokens, with room for {new_slots} new ones, take about "
        f"{_gib(caches)} of caches and {_gib(scratch)} to compute, but {_gib(free * devices)} are "
        f"free. What may fit: {advice}."
    )


def _gib(size: float) -> str:
    return f"{np.ceil(100 * size / 2**30) / 100:.2f} GiB"
