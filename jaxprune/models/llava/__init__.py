"""LLaVA-1.5: a CLIP tower, a two-layer projector and a LLaMA decoder."""

from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.llava.modeling import (
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
    "LlavaConfig",
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
