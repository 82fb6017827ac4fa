"""ConvNeXt (arXiv 2201.03545): depthwise convolutions and MLPs, the map halved between stages.

There is no norm behind the last stage, and no head.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.activations import gelu
from jaxprune.models.convnext.config import HALVED, KERNEL, STEM, ConvNextConfig


def layer_norm(config: ConvNextConfig) -> nn.LayerNorm:
    """LayerNorm over the channels of a place."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.dtype,
        use_fast_variance=False,
    )


def depthwise(width: int, dtype: str) -> nn.Conv:
    """A convolution of every channel with a kernel of its own, the map's size kept."""
    return nn.Conv(
        width,
        (KERNEL, KERNEL),
        padding=KERNEL // 2,
        feature_group_count=width,
        dtype=dtype,
        param_dtype=dtype,
    )


def squares(x: Float[Array, "F H W C"], side: int) -> Float[Array, "F h w p"]:
    """Squares of `side` x `side` places side by side; what is left over at the ends falls away."""
    tiles, height, width, C = x.shape
    h, w = height // side, width // side
    cut = x[:, : h * side, : w * side].reshape(tiles, h, side, w, side, C)
    return cut.swapaxes(2, 3).reshape(tiles, h, w, side * side * C)


class ConvNextBlock(nn.Module):
    config: ConvNextConfig
    width: int

    def setup(self) -> None:
        c, width = self.config, self.width
        self.conv = depthwise(width, c.dtype)
        self.norm = layer_norm(c)
        self.fc1 = nn.Dense(4 * width, dtype=c.dtype, param_dtype=c.dtype)
        self.fc2 = nn.Dense(width, dtype=c.dtype, param_dtype=c.dtype)
        self.scale = self.param("scale", nn.initializers.constant(1e-6), (width,), c.dtype)

    def __call__(self, x: Float[Array, "F H W C"]) -> Float[Array, "F H W C"]:
        inner = self.fc2(gelu(self.fc1(self.norm(self.conv(x)))))
        return x + self.scale * inner


class ConvNext(nn.Module):
    """Pixels -> the map of the last stage."""

    config: ConvNextConfig

    def setup(self) -> None:
        c = self.config
        # A convolution with stride = kernel is one matrix product over flattened squares.
        self.stem = nn.Dense(c.widths[0], dtype=c.dtype, param_dtype=c.dtype)
        self.stem_norm = layer_norm(c)
        later = dict(enumerate(c.widths))
        del later[0]
        self.norm = {str(s): layer_norm(c) for s in later}
        self.down = {
            str(s): nn.Dense(width, dtype=c.dtype, param_dtype=c.dtype)
            for s, width in later.items()
        }
        self.blocks = [
            [ConvNextBlock(c, width) for _ in range(depth)]
            for depth, width in zip(c.depths, c.widths, strict=True)
        ]

    def __call__(self, pixel_values: Float[Array, "F H W 3"]) -> Float[Array, "F h w C"]:
        x = jnp.asarray(pixel_values, self.config.dtype)
        for s, blocks in enumerate(self.blocks):
            if s == 0:
                x = self.stem_norm(self.stem(squares(x, STEM)))
            else:
                x = self.down[str(s)](squares(self.norm[str(s)](x), HALVED))
            for block in blocks:
                x = block(x)
        return x
