"""How much memory there is, and how much a request will take."""

import resource
import sys

import jax


def peak_bytes() -> int:
    """The most memory in use so far: the first device's, on a CPU the process's."""
    found = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if found is not None:
        return int(found)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
