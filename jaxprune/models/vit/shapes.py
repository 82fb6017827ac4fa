"""A tower's sizes from its stored tensors, where no config says them."""

import re
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models.weights import Shape

HEAD_WIDTH = 64
"""Of every published CLIP; no tensor tells it."""


def number_of(shapes: Mapping[str, Shape], pattern: str) -> int:
    """One more than the largest number that a pattern finds in keys; 0 for none."""
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


def clip_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The arguments of a `ClipVisionConfig`, from the tensors of a CLIP.

    Args:
        shapes: by key, with or without "vision_model." in front.

    Raises:
        UserError: where a tensor is missing that tells a size.
    """
    own = {key.removeprefix("vision_model."): shape for key, shape in shapes.items()}
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
             "encoder.layers.0.mlp.fc1.weight")  # fmt: skip
    missing = [name for name in names if name not in own]
    if missing:
        raise UserError(
            f"The vision tower's {missing[0]} is missing; check that the weights are complete."
        )
    patches, positions, mlp = (own[name] for name in names)
    grid = round((positions[0] - 1) ** 0.5)
    return {
        "hidden_size": patches[0],
        "intermediate_size": mlp[0],
        "num_hidden_layers": number_of(own, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, patches[0] // HEAD_WIDTH),
        "image_size": grid * patches[-1],
        "patch_size": patches[-1],
    }
