"""Accelerators to compile for, on any machine: what a chip reaches, and how to get its compiler.

A target is a chip and how many of them: "v5e:2x2" is a slice of four TPU chips, "h100:4" four
GPUs, "v6e" one chip. Their compilers come as wheels and need no hardware.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxprune.errors import UserError
from jaxprune.ops.axes import DATA_AXIS, MODEL_AXIS


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip reaches at most, by what its maker publishes.

    Attributes:
        platform: "tpu" or "cuda".
        flops: bfloat16, dense, a second.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        hertz: of a TPU's matrix units, by which its compiler's cycles become seconds; inferred
            from `flops` and the units' number. 0 where no compiler speaks of cycles.
        axes: of a slice's shape: 2 or 3 for a TPU; 1, a number, for GPUs.
    """

    platform: str
    flops: float
    bandwidth: float
    memory: int
    hertz: float = 0.0
    axes: int = 1


# TPUs: Google Cloud's pages of TPU v4, v5e, v5p and v6e. GPUs: NVIDIA's data sheets of A100 80GB
# SXM, H100 SXM, H200 SXM.
CHIPS = {
    "v4": Chip("tpu", 275e12, 1228e9, 32 * 2**30, 1.05e9, 3),
    "v5e": Chip("tpu", 197e12, 819e9, 16 * 2**30, 1.5e9, 2),
    "v5p": Chip("tpu", 459e12, 2765e9, 95 * 2**30, 1.75e9, 3),
    "v6e": Chip("tpu", 918e12, 1640e9, 32 * 2**30, 1.75e9, 2),
    "a100": Chip("cuda", 312e12, 2039e9, 80 * 10**9),
    "h100": Chip("cuda", 989e12, 3350e9, 80 * 10**9),
    "h200": Chip("cuda", 989e12, 4800e9, 141 * 10**9),
}

# What JAX calls the chips that it finds.
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "NVIDIA A100": "a100", "NVIDIA H100": "h100", "NVIDIA H200": "h200",
}  # fmt: skip


def peak_flops(device: jax.Device) -> float | None:
    """FLOPs a second that a device's maker publishes, bfloat16 and dense; None if unknown."""
    fitting = [kind for kind in _KINDS if device.device_kind.startswith(kind)]
    return CHIPS[_KINDS[max(fitting, key=len)]].flops if fitting else None


# What the TPU's compiler takes of a chip's memory for itself, as its own errors tell.
_RESERVED = {"tpu": 0.02, "cuda": 0.05}

# Slices that are offered, small ones first: what `smallest` goes through.
_SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    1: ("1", "2", "4", "8"),
}

_WHEELS = {
    "tpu": ("libtpu", "pip install 'jaxprune[tpu-compile]'"),
    "cuda": (
        "jax_plugins.xla_cuda12",
        "pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}",
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip and the shape of a slice of them."""

    name: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def usable(self) -> int:
        """Bytes of one chip that programs may take."""
        return int(self.chip.memory * (1 - _RESERVED[self.chip.platform]))

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    def bigger(self) -> list["Target"]:
        """The slices that are offered, from this one on."""
        every = (_parsed(self.name, text) for text in _SLICES[self.chip.axes])
        return [target for target in every if target.chips >= self.chips]


def parse_target(text: object) -> Target:
    """The target of a name.

    Raises:
        UserError: for an unknown chip, or a shape that is none.
    """
    if not isinstance(text, str):
        raise UserError(f"target is {text!r}; expected a text, e.g. 'v5e:2x2'.")
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise UserError(
            f"The target {text!r} is unknown; expected one of {', '.join(CHIPS)}, for several "
            "chips with their number or shape, e.g. v5e:2x2 or h100:4."
        )
    return _parsed(name, shape)


def _parsed(name: str, shape: str) -> Target:
    axes = CHIPS[name].axes
    readable = re.fullmatch(r"\d{1,3}(x\d{1,3})*", shape)
    sizes = tuple(map(int, shape.split("x"))) if readable else () if shape else (1,) * axes
    if len(sizes) != axes:
        kinds = {1: "a number, e.g. 4", 2: "two numbers, e.g. 2x2", 3: "three, e.g. 2x2x1"}
        raise UserError(f"The shape of {name} is {shape[:40]!r}; expected {kinds[axes]}.")
    if not 1 <= math.prod(sizes) <= 256:
        raise UserError(f"{name}:{shape} has {math.prod(sizes)} chips; expected 1 to 256.")
    return Target(name, sizes)


def topology_devices(target: Target) -> Sequence[Any]:
    """Devices that stand for the target's, known to its compiler alone.

    Raises:
        UserError: where the compiler's wheel is missing or cannot be used, or the target has
            no such slice.
    """
    module, install = _WHEELS[target.chip.platform]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that it is in
        found = None
    if found is None:
        raise UserError(
            f"{target} needs its compiler, which is not installed; "
            f"{install.format(version=jax.__version__)}."
        )
    try:
        return _topology(target)
    except Exception as error:  # of the compiler's library, whatever it throws
        said = " ".join(str(error).split())
        if "already in use" in said or "lockfile" in said or "libtpu_lockfile" in said:
            raise UserError(
                "Another process uses the TPU's library on this machine; wait for its end, or "
                f"compile on another machine ({said[:200]})."
            ) from None
        raise UserError(
            f"The compiler knows no {target} ({said[:200]}); slices that are offered: "
            f"{', '.join(f'{target.name}:{x}' for x in _SLICES[target.chip.axes])}."
        ) from None


@functools.cache
def _topology(target: Target) -> Sequence[Any]:
    if target.chip.platform == "tpu":
        # There is no metadata server to ask what machine this is.
        for variable, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
        ):
            os.environ.setdefault(variable, value)
        options: dict[str, Any] = {}
        name = f"{target.name}:{'x'.join(map(str, target.shape))}"
        if target.chips < 4:  # the library takes a host of four for granted
            options["chips_per_host_bounds"] = [*target.shape, *[1] * (3 - len(target.shape))]
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.name,
            topology=f"1x1x{target.chips}",
            target_config=_GPUS[target.name],
        )
    return tuple(found.devices)


def target_mesh(target: Target, data: int = 1) -> Mesh | None:
    """The mesh of a target's devices: rows over "data", all else over "model".

    Args:
        target: the slice.
        data: chips along "data"; must divide their number.

    Returns:
        None for a single chip.

    Raises:
        UserError: where `data` does not divide.
    """
    if target.chips % data:
        raise UserError(f"--data is {data}, which does not divide the {target.chips} of {target}.")
    if target.chips == 1:
        return None
    devices = np.array(topology_devices(target)).reshape(data, -1)
    return Mesh(devices, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)


_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 8 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{description}"
"""

_HOPPER = {
    "shared": 233472,
    "cores": 132,
    "units": 128,
    "cache": 52428800,
    "clock": 1.98,
    "optin": 232448,
    "major": 9,
}

# As XLA asks for a GPU that is not there (its `GpuTargetConfigProto`); what a device reports.
_GPUS = {
    "a100": _GPU.format(
        shared=167936, cores=108, units=64, cache=41943040, clock=1.41, optin=166912, major=8,
        bandwidth=2039000000000, memory=84974239744, description="NVIDIA A100-SXM4-80GB",
    ),
    "h100": _GPU.format(
        **_HOPPER, bandwidth=3352320000000, memory=84978434048,
        description="NVIDIA H100 80GB HBM3",
    ),
    "h200": _GPU.format(
        **_HOPPER, bandwidth=4814259200000, memory=150109880320, description="NVIDIA H200",
    ),
}  # fmt: skip
