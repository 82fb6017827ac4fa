"""How parameters are laid over a device mesh: one table of rules."""

import re

from jax.sharding import Mesh, NamedSharding, PartitionSpec

MODEL_AXIS = "model"

# The first rule that fits a parameter's path; what no rule names is on every device whole.
_RULES = [
    (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel", PartitionSpec(None, MODEL_AXIS)),
    (r".*/(o_proj|out_proj|down_proj|fc2)/kernel", PartitionSpec(MODEL_AXIS, None)),
    (r".*/lm_head/kernel", PartitionSpec(None, MODEL_AXIS)),
    (r".*/embed_tokens/embedding", PartitionSpec(None, MODEL_AXIS)),
]


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a parameter goes: split over the mesh's "model" axis, or whole on every device.

    A parameter whose side the axis does not divide stays whole; so does everything on a
    mesh without such an axis.
    """
    if MODEL_AXIS in mesh.axis_names:
        parts = mesh.shape[MODEL_AXIS]
        for pattern, spec in _RULES:
            if re.fullmatch(pattern, path):
                split = next(i for i, name in enumerate(spec) if name == MODEL_AXIS)
                if shape[split] % parts == 0:
                    return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())
