"""How a model and its requests are laid over a device mesh.

A mesh has the axes "data", over which the rows of a batch are spread, and "model", over
which every layer is: its heads, its MLP's width, the vocabulary. Either may be missing. XLA
propagates these placements through the programs and inserts the communication.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune.errors import UserError
from jaxprune.ops.axes import DATA_AXIS, MODEL_AXIS


def check_mesh(mesh: object, splits: Mapping[str, int]) -> Mesh:
    """The mesh in the form that programs take, if the model can be laid over it.

    Args:
        mesh: what a user passed as one.
        splits: the model's sizes that its "model" axis splits, by name.

    Raises:
        UserError: for no mesh, unknown axes, or an axis that does not divide what it splits.
    """
    if not isinstance(mesh, Mesh):
        raise UserError(f"mesh is a {type(mesh).__name__}; expected a jax.sharding.Mesh.")
    if not mesh.axis_names or set(mesh.axis_names) - {DATA_AXIS, MODEL_AXIS}:
        raise UserError(
            f"The mesh has the axes {mesh.axis_names}; expected {DATA_AXIS!r}, {MODEL_AXIS!r} or "
            'both, e.g. jax.make_mesh((2, 4), ("data", "model")).'
        )
    parts = mesh.shape.get(MODEL_AXIS, 1)
    for name, size in splits.items():
        if size % parts:
            raise UserError(
                f"The mesh's \"model\" axis has {parts} devices, which do not divide the model's "
                f"{size} {name}; choose a divisor of it."
            )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def sharding_of(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Iterable[tuple[str, int]]
) -> NamedSharding:
    """Where a parameter goes: split over the mesh's "model" axis, or whole on every device.

    A vocabulary that the axis does not divide stays whole; so does everything on a mesh
    without such an axis.

    Args:
        path: the parameter's.
        shape: the parameter's.
        mesh: as `check_mesh` gives it.
        rules: (regular expression for a whole path, axis that is split); the first that
            fits counts.
    """
    split = next((axis for pattern, axis in rules if re.fullmatch(pattern, path)), None)
    if split is None or MODEL_AXIS not in mesh.axis_names or shape[split] % mesh.shape[MODEL_AXIS]:
        return NamedSharding(mesh, PartitionSpec())
    axes = [MODEL_AXIS if axis == split else None for axis in range(len(shape))]
    return NamedSharding(mesh, PartitionSpec(*axes))


def mesh_of(arrays: dict[str, Any]) -> Mesh | None:
    """The mesh that parameters are laid over, or None for a single device."""
    sharding = getattr(jax.tree.leaves(arrays)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def with_auto_axes(arrays: dict[str, Any], splits: Mapping[str, int]) -> dict[str, Any]:
    """Parameters as they are; laid by hand over a mesh of other axis types, on one of Auto axes.

    `jax.make_mesh` makes Explicit axes, over which XLA does not propagate placements.

    Args:
        arrays: nested dicts of arrays.
        splits: as for `check_mesh`.

    Raises:
        UserError: as `check_mesh`.
    """
    mesh = mesh_of(arrays)
    if mesh is None or set(mesh.axis_types) == {AxisType.Auto}:
        return arrays
    mesh = check_mesh(mesh, splits)
    laid: dict[str, Any] = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), arrays
    )
    return laid


def to_host(tree: Any) -> Any:
    """Arrays of a request as NumPy's; on several hosts every host gets all of them."""
    if all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def devices_of(arrays: dict[str, Any]) -> list[jax.Device]:
    """This host's devices that hold parameters."""
    devices = getattr(jax.tree.leaves(arrays)[0], "devices", None)
    found = devices() if devices is not None else jax.local_devices()[:1]
    return [device for device in found if device.process_index == jax.process_index()]


def devices_sharing(mesh: Mesh | None, batch: int) -> int:
    """Over how many memories the rows and heads of a batch are spread."""
    if mesh is None or mesh.devices.flat[0].platform == "cpu":  # a host's devices share its memory
        return 1
    rows = mesh.shape.get(DATA_AXIS, 1)
    return int(mesh.shape.get(MODEL_AXIS, 1) * (rows if batch % rows == 0 else 1))


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are made for a mesh; for None, one that does nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def spread(tree: Any, mesh: Mesh | None, *, axis: int = 0) -> Any:
    """Arrays of a request over the mesh's "data" axis, as far as it divides their `axis`."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: placed(x, row_sharding(x.shape, mesh, axis)), tree)


def row_sharding(shape: tuple[int, ...], mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Where an array of a request goes, whose rows are counted by `axis`."""
    parts = mesh.shape.get(DATA_AXIS, 1)
    split = parts > 1 and len(shape) > axis and shape[axis] % parts == 0
    spec = PartitionSpec(*[None] * axis, DATA_AXIS) if split else PartitionSpec()
    return NamedSharding(mesh, spec)


def placed(array: Any, sharding: NamedSharding | None) -> jax.Array:
    """An array on its devices; None: the default one. A host of several gives its own shards."""
    if sharding is None or sharding.is_fully_addressable or not isinstance(array, np.ndarray):
        whole: jax.Array = jax.device_put(array, sharding)
        return whole
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
