"""CLIP ViT (arXiv 2103.00020): pre-LN blocks over a CLS token and non-overlapping patches."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.vit.modeling import (
    Layer,
    VisionTransformer,
    VitMLP,
    split_heads,
    split_patches,
    with_cls,
)
from jaxprune.ops.attention import full_attention


class ClipAttention(nn.Module):
    config: ClipVisionConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.k_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.v_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.out_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        H = self.config.num_attention_heads
        q, k, v = (split_heads(y, H) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return self.out_proj(full_attention(q, k, v).swapaxes(1, 2).reshape(x.shape))


def layer_norm(config: ClipVisionConfig) -> nn.LayerNorm:
    """LayerNorm as CLIP has it."""
    # The two-pass variance: Flax's one-pass default loses digits that PyTorch keeps.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.dtype,
        use_fast_variance=False,
    )


class ClipLayer(nn.Module):
    config: ClipVisionConfig

    def setup(self) -> None:
        self.layer_norm1 = layer_norm(self.config)
        self.self_attn = ClipAttention(self.config)
        self.layer_norm2 = layer_norm(self.config)
        self.mlp = VitMLP(self.config)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def queries_and_keys(
        self, x: Float[Array, "F S C"], *, everybody: bool
    ) -> tuple[Float[Array, "F Q C"], Float[Array, "F S C"]]:
        """The CLS query or everybody's, and all keys, biases included."""
        y = self.layer_norm1(x)
        return self.self_attn.q_proj(y if everybody else y[:, :1]), self.self_attn.k_proj(y)


class ClipVisionTower(VisionTransformer):
    """The vision tower: `__call__` runs it whole, `encode` gives what LLaVA and pruning read."""

    config: ClipVisionConfig
    layer_class: ClassVar[type[ClipLayer]] = ClipLayer

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.hidden_size**-0.5)
        self.class_embedding = self.param("class_embedding", normal, (c.hidden_size,), c.dtype)
        self.patch_embedding = nn.Dense(
            c.hidden_size, use_bias=False, dtype=c.dtype, param_dtype=c.dtype
        )
        shape = (1 + c.num_patches, c.hidden_size)
        self.position_embedding = self.param("position_embedding", normal, shape, c.dtype)
        self.pre_layernorm = layer_norm(c)
        self.layers = [self.layer_class(c) for _ in range(c.num_hidden_layers)]
        self.post_layernorm = layer_norm(c)

    def blocks(self) -> Sequence[Layer]:
        layers: Sequence[Layer] = self.layers
        return layers

    def embed(self, pixel_values: Float[Array, "F H W 3"]) -> Float[Array, "F S C"]:
        """Pixels -> CLS and patches with positions, S = 1 + N."""
        c = self.config
        pixels = split_patches(
            pixel_values.astype(c.dtype), grid=c.grid_size, patch_size=c.patch_size
        )
        x = with_cls(self.class_embedding, self.patch_embedding(pixels)) + self.position_embedding
        normed: Array = self.pre_layernorm(x)
        return normed

    def __call__(self, pixel_values: Float[Array, "F H W 3"]) -> tuple[list[Array], Array]:
        """All hidden states `[F, 1 + N, C]` (layers + 1 of them) and the pooled CLS `[F, C]`."""
        states = [self.embed(pixel_values)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states, self.post_layernorm(states[-1][:, 0])
