"""InternVL as pure functions: an InternViT, its merged patches through a projector, a decoder.

`params` has the keys "vision_tower", "multi_modal_projector" and "language_model". What a
vision-side method merges are the projector's inputs, whose first layer is a norm: it undoes a
merged token's length, and keeps its direction.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.family import Arrays
from jaxprune.models.internvit.modeling import InternVit
from jaxprune.models.internvl.config import InternVLConfig
from jaxprune.models.stages import DecoderStages, init_decoder
from jaxprune.ops.tiles import Frames
from jaxprune.ops.visual import PROJECTED, Signal, VisionOutput

NORM_EPS = 1e-5  # PyTorch's own, whatever the config says


class Projector(nn.Module):
    """A norm and two linear layers, from merged patches to the decoder's width."""

    config: InternVLConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*any C"]) -> Float[Array, "*any D"]:
        c = self.config
        own: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.dtype}

        def dense(name: str) -> nn.Dense:
            return nn.Dense(c.text_config.hidden_size, name=name, **own)

        x = nn.LayerNorm(epsilon=NORM_EPS, use_fast_variance=False, name="layer_norm", **own)(x)
        return dense("linear_2")(ACTIVATIONS[c.projector_hidden_act](dense("linear_1")(x)))


class InternVLStages(DecoderStages):
    """The stages of an InternVL; see `models.family.Family`."""

    def encode(
        self,
        params: Arrays,
        config: InternVLConfig,
        pixel_values: Float[Array, "F H W 3"],
        signals: frozenset[Signal] = frozenset(),
        frames: Frames | None = None,
    ) -> VisionOutput:
        """Pixels of tiles -> features and the signals asked for, of merged patches."""
        del frames  # every tile is seen by itself
        vision: Any = InternVit(config.vision_config, config.merged).apply(
            {"params": params["vision_tower"]},
            pixel_values,
            feature_layers=(config.vision_feature_layer,),
            signals=signals - {PROJECTED},
            method="encode",
        )
        return self.with_projected(params, config, VisionOutput(*vision), signals)

    def project(
        self, params: Arrays, config: InternVLConfig, features: Float[Array, "*any C"]
    ) -> Float[Array, "*any D"]:
        """Features -> the decoder's width."""
        projector = {"params": params["multi_modal_projector"]}
        visual: Any = Projector(config).apply(projector, features)
        projected: Array = visual
        return projected

    def init_params(self, config: InternVLConfig, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        vision, projector, text = jax.random.split(key, 3)
        size, side = config.vision_config.image_size, config.merged
        features = jnp.zeros((1, config.vision_config.hidden_size * side * side))
        tower, pixels = InternVit(config.vision_config, side), jnp.zeros((1, size, size, 3))
        return {
            "vision_tower": tower.init(vision, pixels)["params"],
            "multi_modal_projector": Projector(config).init(projector, features)["params"],
            "language_model": init_decoder(config, text),
        }
