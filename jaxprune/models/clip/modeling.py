"""CLIP (arXiv 2103.00020): a tower of pre-LN blocks for images, another one for texts.

The vision tower sees a CLS token and non-overlapping patches. The text tower is causal, and the
state of a text's last token stands for it; both are compared in a space of one width.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.clip.config import ClipTextConfig, ClipVisionConfig
from jaxprune.models.vit.modeling import (
    Layer,
    VisionTransformer,
    VitMLP,
    split_heads,
    split_patches,
    with_cls,
)
from jaxprune.ops.attention import causal_attention, full_attention
from jaxprune.ops.axes import AnyArray
from jaxprune.ops.greedy import unit

ClipConfig = ClipVisionConfig | ClipTextConfig


class ClipAttention(nn.Module):
    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.k_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.v_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.out_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        H = self.config.num_attention_heads
        q, k, v = (split_heads(y, H) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return self.out_proj(self.attend(q, k, v).swapaxes(1, 2).reshape(x.shape))

    def attend(
        self, q: Float[Array, "F H S d"], k: Float[Array, "F H S d"], v: Float[Array, "F H S d"]
    ) -> Float[Array, "F H S d"]:
        """Every token sees all."""
        return full_attention(q, k, v)


def layer_norm(config: ClipConfig, epsilon: float | None = None) -> nn.LayerNorm:
    """LayerNorm as CLIP has it; with another epsilon than the tower's where one is given."""
    # The two-pass variance: Flax's one-pass default loses digits that PyTorch keeps.
    return nn.LayerNorm(
        epsilon=epsilon or config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.dtype,
        use_fast_variance=False,
    )


class ClipLayer(nn.Module):
    config: ClipConfig
    attention_class: ClassVar[type[ClipAttention]] = ClipAttention

    def setup(self) -> None:
        self.layer_norm1 = layer_norm(self.config)
        self.self_attn = self.attention_class(self.config)
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


class CausalAttention(ClipAttention):
    def attend(
        self, q: Float[Array, "F H S d"], k: Float[Array, "F H S d"], v: Float[Array, "F H S d"]
    ) -> Float[Array, "F H S d"]:
        """Every token sees those up to itself."""
        out, _ = causal_attention(q, k, v, jnp.ones((len(q), q.shape[2]), bool))
        return out


class CausalLayer(ClipLayer):
    attention_class: ClassVar[type[ClipAttention]] = CausalAttention


class ClipTextTower(nn.Module):
    """The text tower, and both towers' projections to the space where texts meet images."""

    config: ClipTextConfig

    def setup(self) -> None:
        c = self.config

        def projection() -> nn.Dense:
            return nn.Dense(c.projection_dim, use_bias=False, dtype=c.dtype, param_dtype=c.dtype)

        self.token_embedding = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.dtype
        )
        shape = (c.max_position_embeddings, c.hidden_size)
        normal = nn.initializers.normal(0.01)
        self.position_embedding = self.param("position_embedding", normal, shape, c.dtype)
        self.layers = [CausalLayer(c) for _ in range(c.num_hidden_layers)]
        self.final_layer_norm = layer_norm(c)
        self.text_projection, self.visual_projection = projection(), projection()
        self.post_layernorm = layer_norm(c, c.vision_layer_norm_eps)

    def __call__(
        self, token_ids: Int[Array, "B S"], features: Float[Array, "F N C"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "F N E"]]:
        """Texts and patches in the common space."""
        return self.texts(token_ids), self.patches(features)

    def texts(self, token_ids: Int[Array, "B S"]) -> Float[Array, "B E"]:
        """Texts in the common space; what stands after the end of one does not matter."""
        x = self.token_embedding(token_ids) + self.position_embedding[: token_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        old = self.config.eos_token_id == 2
        ends = token_ids if old else token_ids == self.config.eos_token_id
        end = jnp.argmax(ends, axis=1)[:, None, None]
        last = jnp.take_along_axis(self.final_layer_norm(x), end, axis=1)[:, 0]
        text: Array = self.text_projection(last)
        return text

    def patches(self, features: Float[Array, "F N C"]) -> Float[Array, "F N E"]:
        """Patches of the vision tower in the common space, as if each were the CLS token."""
        seen: Array = self.visual_projection(self.post_layernorm(features))
        return seen


def similar_to_texts(
    params: dict[str, Any],
    config: ClipTextConfig,
    features: Float[Array, "F N C"],
    texts: Int[AnyArray, "I Q S"],
    image: Int[AnyArray, " F"],
) -> Float[Array, "F N"]:
    """Cosine of every patch and its image's texts, the mean over them, float32.

    Args:
        params, config: of the text tower.
        features: of tiles.
        texts: token ids; texts that begin with one below 0 are none.
        image: which image a tile is of.
    """
    tower, ids = ClipTextTower(config), jnp.asarray(texts)
    flat = jnp.maximum(ids, 0).reshape(-1, ids.shape[-1])
    towers: Any = tower.apply({"params": params}, flat, features)
    said, seen = (unit(x) for x in towers)
    own = said.reshape(*ids.shape[:2], -1)[image]  # [F, Q, E]
    there: Bool[Array, "F Q"] = (ids[..., 0] >= 0)[image]
    weight = there / jnp.maximum(1, there.sum(axis=1, keepdims=True))
    mean = jnp.einsum("fq,fqe->fe", weight, own, precision=jax.lax.Precision.HIGHEST)
    # The mean of cosines is that of the unit vectors, multiplied once.
    return jnp.einsum("fne,fe->fn", seen, mean, precision=jax.lax.Precision.HIGHEST)


def text_tower_shapes(config: ClipTextConfig) -> Any:
    """The shapes and dtypes of a text tower's parameters."""
    ids = jnp.zeros((1, config.max_position_embeddings), jnp.int32)
    features = jnp.zeros((1, 1, config.vision_width), config.dtype)
    made = jax.eval_shape(ClipTextTower(config).init, jax.random.key(0), ids, features)
    return made["params"]
