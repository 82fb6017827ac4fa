"""LLaVA-1.5 as pure functions over a nested dict of arrays, one method a stage.

`params` has the keys "vision_tower", "multi_modal_projector" and "language_model".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.clip.modeling import ClipVisionTower
from jaxprune.models.family import Arrays
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.stages import DecoderStages, init_decoder
from jaxprune.ops.tiles import Frames
from jaxprune.ops.visual import PROJECTED, Signal, VisionOutput


class Projector(nn.Module):
    """Two linear layers from the tower's width to the decoder's."""

    width: int
    dtype: str
    act: str = "gelu"
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*any C"]) -> Float[Array, "*any D"]:
        def dense(name: str) -> nn.Dense:
            own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype}
            return nn.Dense(self.width, use_bias=self.bias, name=name, **own)

        return dense("linear_2")(ACTIVATIONS[self.act](dense("linear_1")(x)))


def project_with(
    projector: Projector, params: Arrays, features: Float[Array, "*any C"]
) -> Float[Array, "*any D"]:
    """Features through a model's projector."""
    projected: Any = projector.apply({"params": params["multi_modal_projector"]}, features)
    array: Array = projected
    return array


def projector_of(config: LlavaConfig) -> Projector:
    """The projector of a model."""
    return Projector(
        config.text_config.hidden_size,
        config.dtype,
        config.projector_hidden_act,
        config.multimodal_projector_bias,
    )


class LlavaStages(DecoderStages):
    """The stages of a LLaVA with a CLIP tower and a LLaMA decoder; see `models.family.Family`."""

    def encode(
        self,
        params: Arrays,
        config: LlavaConfig,
        pixel_values: Float[Array, "F H W 3"],
        signals: frozenset[Signal] = frozenset(),
        frames: Frames | None = None,
    ) -> VisionOutput:
        """Pixels of tiles -> features and the signals asked for."""
        del frames  # every tile is seen by itself
        vision: Any = ClipVisionTower(config.vision_config).apply(
            {"params": params["vision_tower"]},
            pixel_values,
            feature_layers=config.feature_layers,
            signals=signals - {PROJECTED},
            method="encode",
        )
        return self.with_projected(params, config, VisionOutput(*vision), signals)

    def project(
        self, params: Arrays, config: LlavaConfig, features: Float[Array, "*any C"]
    ) -> Float[Array, "*any D"]:
        """Features -> the decoder's width."""
        return project_with(projector_of(config), params, features)

    def init_params(self, config: LlavaConfig, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        vision, projector, text = jax.random.split(key, 3)
        size = config.vision_config.image_size
        width = config.vision_config.hidden_size * len(config.feature_layers)
        tower, pixels = ClipVisionTower(config.vision_config), jnp.zeros((1, size, size, 3))
        return {
            "vision_tower": tower.init(vision, pixels)["params"],
            "multi_modal_projector": projector_of(config).init(projector, jnp.zeros((1, width)))[
                "params"
            ],
            "language_model": init_decoder(config, text),
        }
