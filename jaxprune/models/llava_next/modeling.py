"""LLaVA-NeXT as pure functions: LLaVA-1.5's, with a learned newline among the visual tokens.

`params` has one key more than LLaVA's, "image_newline". The vision tower takes tiles; how
they make up an image is told by `LlavaNextConfig.tiling`.
"""

import jax
import jax.numpy as jnp

from jaxprune.models.llava import modeling as llava
from jaxprune.models.llava.modeling import (
    Params,
    decode,
    embed,
    encode_image,
    logits,
    prefill,
    project,
)
from jaxprune.models.llava_next.config import LlavaNextConfig
from jaxprune.ops.tiles import NEWLINE
from jaxprune.ops.visual import Selection


def visual_embeddings(params: Params, config: LlavaNextConfig, selection: Selection) -> jax.Array:
    """The selected visual tokens as the decoder takes them, newlines included: `[I, K, D]`."""
    visual = project(params, config, selection.tokens)
    newline = (selection.indices == NEWLINE)[..., None]
    return jnp.where(newline, params["image_newline"].astype(visual.dtype), visual)


def init_params(config: LlavaNextConfig, key: jax.Array) -> Params:
    """Random parameters, for training from scratch and for tests."""
    rest, newline = jax.random.split(key)
    width = config.text_config.hidden_size
    drawn = jax.random.normal(newline, (width,), config.dtype) * width**-0.5
    return {**llava.init_params(config, rest), "image_newline": drawn.astype(config.dtype)}


def param_shapes(config: LlavaNextConfig) -> Params:
    """The parameters' shapes and dtypes, without any memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


__all__ = [
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
