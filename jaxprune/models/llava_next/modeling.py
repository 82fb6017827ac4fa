"""LLaVA-NeXT as pure functions: LLaVA-1.5's, with a learned newline among the visual tokens.

`params` has one key more than LLaVA's, "image_newline". The vision tower takes tiles; how
they make up an image is told by `LlavaNextConfig.tiling`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.family import Arrays
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.llava.modeling import LlavaStages
from jaxprune.ops.tiles import NEWLINE
from jaxprune.ops.visual import Selection


class LlavaNextStages(LlavaStages):
    """LLaVA's stages with newlines."""

    def visual_embeddings(
        self, params: Arrays, config: LlavaConfig, selection: Selection
    ) -> Float[Array, "I K D"]:
        """The selected visual tokens as the decoder takes them, newlines included."""
        visual = super().visual_embeddings(params, config, selection)
        newline = (selection.indices == NEWLINE)[..., None]
        return jnp.where(newline, params["image_newline"].astype(visual.dtype), visual)

    def init_params(self, config: LlavaConfig, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        rest, newline = jax.random.split(key)
        width = config.text_config.hidden_size
        drawn = jax.random.normal(newline, (width,), config.dtype) * width**-0.5
        newline_only = {"image_newline": drawn.astype(config.dtype)}
        return {**super().init_params(config, rest), **newline_only}
