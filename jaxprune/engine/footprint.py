"""How much memory there is, and how much a request will take in the tower and the decoder.

What does not fit is refused before it is tried: out of memory, a device or the kernel would
end the process, and every request in it. The tower and the decoder are looked at one after
the other, each when its sizes are known.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.engine.cost import executed
from jaxprune.errors import UserError
from jaxprune.ops.attention import BLOCK, FULL_BLOCK, QUERY_CHUNK, heads_at_once
from jaxprune.ops.cuts import Schedule

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


def free_bytes(devices: Sequence[jax.Device] = ()) -> int | None:
    """What a program can still allocate on the fullest of some devices; None if nobody says.

    So it is on several hosts: one that refused what the others began would let them wait forever.

    Args:
        devices: of this host; none are its first one.
    """
    if jax.process_count() > 1:
        return None
    stats = [device.memory_stats() or {} for device in devices or jax.local_devices()[:1]]
    if all("bytes_limit" in of_one for of_one in stats):
        return min(int(s["bytes_limit"] - s.get("bytes_in_use", 0)) for s in stats)
    try:
        available = 1024 * _fields(pathlib.Path("/proc/meminfo"))["MemAvailable:"]
    except (OSError, KeyError):
        return None
    left = _left_by_container(pathlib.Path("/"))
    return available if left is None else min(available, left)


def _left_by_container(root: pathlib.Path) -> int | None:
    """What the limits of Linux's control groups leave, v2 or v1; None where there are none."""
    memory, left = root / "sys/fs/cgroup", []
    try:
        # "0::/a/b" is the process's group; what holds it may have a limit as well.
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next((line[4:] for line in lines if line.startswith("0::/")), "")
        groups = [memory / own, *(memory / own).parents][: len(pathlib.Path(own).parts) + 1]
        for group in [*groups, memory / "memory"]:
            for limit, used in (
                ("memory.max", "memory.current"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ):
                if (group / limit).exists() and (
                    most := (group / limit).read_text().strip()
                ) != "max":
                    # Files in memory count as used, but are given up when needed.
                    stat = _fields(group / "memory.stat")
                    files = stat.get("active_file", 0) + stat.get("inactive_file", 0)
                    left.append(int(most) - int((group / used).read_text()) + files)
    except (OSError, ValueError):
        return None
    return min(left, default=None)


def _fields(path: pathlib.Path) -> dict[str, int]:
    """The numbers of a file of lines "name number ..."."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def tower_bytes(config: Any, tiles: int) -> tuple[int, int]:
    """About what encoding tiles takes beside the weights: bytes that stay, and a layer at work."""
    c = config.vision_config
    slots, item = 1 + c.num_patches, 4 if c.dtype == "float32" else 2
    pixels = 4 * 3 * c.image_size**2
    features = slots * c.hidden_size * (len(config.feature_layers) + 1) * item  # and keys
    # The residual, its norm and the heads' inputs and output; or the MLP's inner layer.
    width = 2 * c.hidden_size + max(4 * c.hidden_size, 2 * c.intermediate_size)
    H = c.num_attention_heads
    weights = _weights_bytes(tiles, slots, heads=H, key_value_heads=H, block=FULL_BLOCK)
    return tiles * (pixels + features), tiles * slots * width * item + weights


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
    attention = batch * slots * (2 * c.hidden_size + 4 * heads) * item
    mlp = batch * slots * (2 * c.hidden_size + 2 * c.intermediate_size) * item
    H, K = c.num_attention_heads, c.num_key_value_heads
    weights = _weights_bytes(batch, slots, heads=H, key_value_heads=K, block=BLOCK)
    if schedule.score is not None and set(schedule.score.queries) <= {"last", "text"}:
        rows = 1 if schedule.score.queries == ("last",) else schedule.query_slots or slots
        weights = max(weights, 2 * batch * H * min(rows, slots) * slots * 4)  # once more
    logits = 2 * batch * c.vocab_size * 4
    return caches, max(attention + weights, mlp) + logits


def _weights_bytes(rows: int, slots: int, *, heads: int, key_value_heads: int, block: int) -> int:
    """Attention weights that are there at once, before and behind the softmax."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    if jax.default_backend() == "cpu" and not on_mesh:  # a few heads of a row at a time
        some = heads // key_value_heads * heads_at_once(key_value_heads)
        return 2 * some * min(block, slots) * slots * 4
    return 2 * rows * heads * min(QUERY_CHUNK, slots) * slots * 4


def check_tower_memory(
    config: Any,
    *,
    tiles: int,
    images: Sequence[int] = (),
    image_tiles: int = 1,
    devices: int = 1,
    free: int | None = None,
) -> None:
    """Raise `UserError` when tiles will not fit into what is free, and say what would.

    Args:
        config: the model's config.
        tiles: of all images.
        images: numbers of images that can be asked for instead.
        image_tiles: of each of these.
        devices: that share the tiles.
        free: bytes; None asks the device.
    """
    _check(
        lambda number: tower_bytes(config, number * image_tiles),
        tower_bytes(config, tiles),
        f"{tiles} tiles of images",
        numbers=images,
        unit="images",
        advice="dtype='bfloat16'",
        devices=devices,
        free=free,
    )


def check_memory(
    config: Any,
    *,
    batch: int,
    slots: int,
    schedule: Schedule,
    new_slots: int,
    batches: Sequence[int] = (),
    devices: int = 1,
    free: int | None = None,
) -> None:
    """Raise `UserError` when a prompt will not fit into what is free, and say what would.

    Args:
        config, batch, slots, schedule, new_slots: as for `request_bytes`.
        batches: numbers of rows that can be asked for instead.
        devices: that share the request.
        free: bytes; None asks the device.
    """
    needed = functools.partial(
        request_bytes, config, slots=slots, schedule=schedule, new_slots=new_slots
    )
    _check(
        lambda number: needed(batch=number),
        needed(batch=batch),
        f"{batch} rows of {slots} tokens, with room for {new_slots} new ones,",
        numbers=batches,
        unit="prompts",
        advice="fewer new tokens, a shorter prompt, a method that keeps less, or dtype='bfloat16'",
        devices=devices,
        free=free,
    )


def _check(
    needed: Callable[[int], tuple[int, int]],
    sizes: tuple[int, int],
    what: str,
    *,
    numbers: Sequence[int],
    unit: str,
    advice: str,
    devices: int,
    free: int | None,
) -> None:
    free = free_bytes() if free is None else free
    if free is None:
        return
    room = _SPARE * free * devices
    if sum(sizes) <= room:
        return
    fitting = max((number for number in numbers if sum(needed(number)) <= room), default=0)
    if fitting:
        advice = f"{fitting} {unit} at once, {advice}"
    raise UserError(
        f"{what} take about {_gib(sizes[0])} to keep and {_gib(sizes[1])} to compute, but "
        f"{_gib(free * devices)} are free. What may fit: {advice}."
    )


@contextlib.contextmanager
def told_if_exhausted() -> Iterator[None]:
    """Turn a device's being out of memory into a `UserError`: an estimate may be wrong."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise UserError(
            f"The device is out of memory ({first}); ask fewer prompts at once, for fewer new "
            "tokens, or with a method that keeps less."
        ) from None


def _gib(size: float) -> str:
    return f"{np.ceil(100 * size / 2**30) / 100:.2f} GiB"
