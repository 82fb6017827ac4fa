"""LLaVA-NeXT: LLaVA at any resolution, the image and the tiles of an enlarged one."""

from jaxprune.models.llava_next.config import LlavaNextConfig
from jaxprune.models.llava_next.modeling import (
    decode,
    embed,
    encode_image,
    init_params,
    logits,
    param_shapes,
    prefill,
    project,
    visual_embeddings,
)

__all__ = [
    "LlavaNextConfig",
    "decode",
    "embed",
    "encode_image",
    "init_params",
    "logits",
    "param_shapes",
    "prefill",
    "project",
    "visual_embeddings",
]
