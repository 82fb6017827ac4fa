"""CLIP ViT (arXiv 2103.00020): pre-LN blocks over a CLS token and non-overlapping patches.

Besides its features the tower gives what the pruning methods read: the CLS query's
attention over the patches and the patches' keys, both from the *last* layer's projections.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.ops.attention import full_attention
from jaxprune.ops.visual import VisionOutput


class ClipAttention(nn.Module):
    config: ClipVisionConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.k_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.v_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.out_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:  # [I, S, C] -> [I, H, S, d]
            return y.reshape(*y.shape[:2], self.config.num_attention_heads, -1).swapaxes(1, 2)

        out = full_attention(heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)))
        return self.out_proj(out.swapaxes(1, 2).reshape(x.shape))


class ClipMLP(nn.Module):
    config: ClipVisionConfig

    def setup(self) -> None:
        c = self.config
        self.fc1 = nn.Dense(c.intermediate_size, dtype=c.dtype, param_dtype=c.dtype)
        self.fc2 = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.config.hidden_act](self.fc1(x)))


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
        self.mlp = ClipMLP(self.config)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def queries_and_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The CLS query `[I, 1, C]` and all keys `[I, 1 + N, C]`, biases included."""
        y = self.layer_norm1(x)
        return self.self_attn.q_proj(y[:, :1]), self.self_attn.k_proj(y)


class ClipVisionTower(nn.Module):
    """The vision tower: `__call__` runs it whole, `encode` gives what LLaVA and pruning read."""

    config: ClipVisionConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.hidden_size**-0.5)
        self.class_embedding = self.param("class_embedding", normal, (c.hidden_size,), c.dtype)
        # A convolution with stride = kernel is one matrix product over flattened patches.
        self.patch_embedding = nn.Dense(
            c.hidden_size, use_bias=False, dtype=c.dtype, param_dtype=c.dtype
        )
        shape = (1 + c.num_patches, c.hidden_size)
        self.position_embedding = self.param("position_embedding", normal, shape, c.dtype)
        self.pre_layernorm = layer_norm(c)
        self.layers = [ClipLayer(c) for _ in range(c.num_hidden_layers)]
        self.post_layernorm = layer_norm(c)

    def embed(self, pixel_values: jax.Array) -> jax.Array:
        """Pixels `[I, H, W, 3]` -> CLS and patches with positions `[I, 1 + N, C]`."""
        g, p = self.config.grid_size, self.config.patch_size
        pixel_values = pixel_values[:, : g * p, : g * p].astype(self.config.dtype)
        images = pixel_values.shape[0]
        patches = pixel_values.reshape(images, g, p, g, p, 3).swapaxes(2, 3)
        x = self.patch_embedding(patches.reshape(images, g * g, p * p * 3))
        cls = jnp.broadcast_to(self.class_embedding, (images, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding
        return self.pre_layernorm(x)

    def __call__(self, pixel_values: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """All hidden states `[I, 1 + N, C]` (layers + 1 of them) and the pooled CLS `[I, C]`."""
        states = [self.embed(pixel_values)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states, self.post_layernorm(states[-1][:, 0])

    def encode(
        self,
        pixel_values: jax.Array,
        *,
        feature_layers: tuple[int, ...] = (-2,),
        keep_cls: bool = False,
        signals: frozenset[str] = frozenset(),
    ) -> VisionOutput:
        """Features of the chosen hidden states, and the signals asked for.

        Only the layers that somebody reads are run: for LLaVA's feature layer -2 the last
        layer's attention output and MLP never are.

        Args:
            pixel_values: `[I, H, W, 3]`, normalised.
            feature_layers: indices into the hidden states (0 = embeddings), concatenated.
            keep_cls: the "full" select strategy: CLS stays in front of the features.
            signals: any of "cls_attention", "cls_attention_mean", "keys".
        """
        layers = self.config.num_hidden_layers
        wanted = [index % (layers + 1) for index in feature_layers]
        last_run = max(*wanted, layers - 1 if signals else 0, 0)
        states = [self.embed(pixel_values)]
        for layer in self.layers[:last_run]:
            states.append(layer(states[-1]))

        features = jnp.concatenate([states[index] for index in wanted], axis=-1)
        found = self._signals(states[layers - 1], signals) if signals else {}
        return VisionOutput(features if keep_cls else features[:, 1:], found)

    def _signals(self, x: jax.Array, signals: frozenset[str]) -> dict[str, jax.Array]:
        q, k = self.layers[-1].queries_and_keys(x)
        found = {}
        if "cls_attention" in signals:
            found["cls_attention"] = cls_attention(q, k, num_heads=1)
        if "cls_attention_mean" in signals:
            heads = self.config.num_attention_heads
            found["cls_attention_mean"] = cls_attention(q, k, num_heads=heads)
        if "keys" in signals:
            found["keys"] = k[:, 1:]
        return found


def cls_attention(q_cls: jax.Array, keys: jax.Array, *, num_heads: int) -> jax.Array:
    """Attention of the CLS query, softmaxed over CLS and patches, mean over heads.

    Args:
        q_cls: `[I, 1, C]`.
        keys: `[I, 1 + N, C]`, CLS first.
        num_heads: 1 reads the full width as a single head, as PruMerge's code does.

    Returns:
        float32 `[I, N]`: the CLS entry is dropped after the softmax, so rows sum below 1.
    """
    images, slots, width = keys.shape
    q = q_cls.reshape(images, num_heads, width // num_heads).astype(jnp.float32)
    k = keys.reshape(images, slots, num_heads, width // num_heads).astype(jnp.float32)
    # A rounded product would change who is an outlier.
    logits = jnp.einsum("ihd,ishd->ihs", q, k, precision=jax.lax.Precision.HIGHEST)
    logits = logits * (width // num_heads) ** -0.5
    return jax.nn.softmax(logits, axis=-1).mean(axis=1)[:, 1:]
