"""How much memory devices have, and refusing what will not fit.

What does not fit is refused before it is tried: out of memory, a device or the kernel would
end the process, and every request in it.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxprune.errors import UserError

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


def check_fits(
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
    """Raise `UserError` when something will not fit into what is free, and say what would.

    Args:
        needed: for another number of the units, bytes that stay and bytes at work.
        sizes: the same for what is asked.
        what: is asked, for the message.
        numbers: of units that can be asked for instead.
        unit: what they are called.
        advice: what else may help.
        devices: that share it.
        free: bytes of each; None where that is not known.
    """
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
def told_if_exhausted(
    advice: str = "ask fewer prompts at once, for fewer new tokens, or keep fewer visual ones",
) -> Iterator[None]:
    """Turn a device's being out of memory into a `UserError`: an estimate may be wrong.

    Args:
        advice: what to do about it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"The device is out of memory ({first}); {advice}.") from None


def _gib(size: float) -> str:
    return f"{np.ceil(100 * size / 2**30) / 100:.2f} GiB"
