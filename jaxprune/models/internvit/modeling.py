"""InternViT (InternVL, arXiv 2312.14238): pre-norm blocks with LayerScale, merged patches.

Nothing is normed before the first layer or after the last. The visual tokens are squares of
patches, whose channels are put side by side ("pixel shuffle", version 2).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxprune.models.internvit.config import InternVitConfig
from jaxprune.models.vit.modeling import (
    Layer,
    VisionTransformer,
    VitMLP,
    split_heads,
    split_patches,
    with_cls,
)
from jaxprune.ops.attention import full_attention

QK_NORM_EPS = 1e-6  # whatever the config says


def norm(config: InternVitConfig) -> nn.Module:
    """A layer's norm, of either kind."""
    own: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.dtype}
    own["epsilon"] = config.layer_norm_eps
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(**own)
    return nn.LayerNorm(**own, use_fast_variance=False)


class InternVitAttention(nn.Module):
    config: InternVitConfig

    def setup(self) -> None:
        c = self.config

        def dense(bias: bool) -> nn.Dense:
            return nn.Dense(c.hidden_size, use_bias=bias, dtype=c.dtype, param_dtype=c.dtype)

        self.q_proj, self.k_proj, self.v_proj = (dense(c.attention_bias) for _ in range(3))
        self.out_proj = dense(True)
        if c.use_qk_norm:
            self.q_norm, self.k_norm = (
                nn.RMSNorm(epsilon=QK_NORM_EPS, dtype=c.dtype, param_dtype=c.dtype)
                for _ in range(2)
            )

    def queries(self, x: Float[Array, "F Q C"]) -> Float[Array, "F Q C"]:
        """Normed over the whole width, before the heads are split."""
        q: Array = self.q_proj(x)
        return self.q_norm(q) if self.config.use_qk_norm else q

    def keys(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        """As `queries`."""
        k: Array = self.k_proj(x)
        return self.k_norm(k) if self.config.use_qk_norm else k

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        H = self.config.num_attention_heads
        q, k, v = (split_heads(y, H) for y in (self.queries(x), self.keys(x), self.v_proj(x)))
        return self.out_proj(full_attention(q, k, v).swapaxes(1, 2).reshape(x.shape))


class InternVitLayer(nn.Module):
    config: InternVitConfig

    def setup(self) -> None:
        c = self.config
        self.layer_norm1, self.layer_norm2 = norm(c), norm(c)
        self.self_attn = InternVitAttention(c)
        self.mlp = VitMLP(c)
        begin = nn.initializers.constant(0.1)
        self.scale1 = self.param("scale1", begin, (c.hidden_size,), c.dtype)
        self.scale2 = self.param("scale2", begin, (c.hidden_size,), c.dtype)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        x = x + self.scale1 * self.self_attn(self.layer_norm1(x))
        return x + self.scale2 * self.mlp(self.layer_norm2(x))

    def queries_and_keys(
        self, x: Float[Array, "F S C"], *, everybody: bool
    ) -> tuple[Float[Array, "F Q C"], Float[Array, "F S C"]]:
        """The CLS query or everybody's, and all keys, as attention takes them."""
        y = self.layer_norm1(x)
        return self.self_attn.queries(y if everybody else y[:, :1]), self.self_attn.keys(y)


class InternVit(VisionTransformer):
    """The tower; its visual tokens are squares of `merged` x `merged` patches."""

    config: InternVitConfig
    merged: int = 2

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.hidden_size**-0.5)
        self.class_embedding = self.param("class_embedding", normal, (c.hidden_size,), c.dtype)
        self.patch_embedding = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        shape = (1 + c.num_patches, c.hidden_size)
        self.position_embedding = self.param("position_embedding", normal, shape, c.dtype)
        self.layers = [InternVitLayer(c) for _ in range(c.num_hidden_layers)]

    def blocks(self) -> Sequence[Layer]:
        layers: Sequence[Layer] = self.layers
        return layers

    def embed(self, pixel_values: Float[Array, "F H W 3"]) -> Float[Array, "F S C"]:
        """Pixels -> CLS and patches with positions, S = 1 + the patches."""
        c = self.config
        pixels = split_patches(
            pixel_values.astype(c.dtype), grid=c.grid_size, patch_size=c.patch_size
        )
        x = with_cls(self.class_embedding, self.patch_embedding(pixels))
        return x + self.position_embedding

    def as_tokens(self, patches: Float[Array, "F P C"]) -> Float[Array, "F N D"]:
        """The channels of each square of patches side by side, row by row."""
        return merge_squares(patches, self.merged)

    def __call__(self, pixel_values: Float[Array, "F H W 3"]) -> Float[Array, "F S C"]:
        """The last hidden state."""
        x = self.embed(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return x


def merge_squares(patches: Float[Array, "F P C"], side: int) -> Float[Array, "F N D"]:
    """Squares of `side` x `side` patches of a square grid, as one token each.

    Token (I, J) has at channel `(side a + b) C + c` what patch `(side I + a, side J + b)` has at
    channel c.
    """
    tiles, number, C = patches.shape
    grid = round(number**0.5) // side
    squares = patches.reshape(tiles, grid, side, grid, side, C).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, grid * grid, side * side * C)
