"""CLIP ViT (arXiv 2103.00020): pre-LN blocks over a CLS token and non-overlapping patches.

Besides its features the tower gives what the pruning methods read, of any layer: attention of
the CLS query and received by patches, keys, hidden states.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.ops.attention import full_attention
from jaxprune.ops.visual import Signal, VisionOutput


class ClipAttention(nn.Module):
    config: ClipVisionConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.k_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.v_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        self.out_proj = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        def heads(y: Array) -> Array:  # [F, S, C] -> [F, H, S, d]
            return y.reshape(*y.shape[:2], self.config.num_attention_heads, -1).swapaxes(1, 2)

        out = full_attention(heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)))
        return self.out_proj(out.swapaxes(1, 2).reshape(x.shape))


class ClipMLP(nn.Module):
    config: ClipVisionConfig

    def setup(self) -> None:
        c = self.config
        self.fc1 = nn.Dense(c.intermediate_size, dtype=c.dtype, param_dtype=c.dtype)
        self.fc2 = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
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

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def queries_and_keys(
        self, x: Float[Array, "F S C"], *, everybody: bool
    ) -> tuple[Float[Array, "F Q C"], Float[Array, "F S C"]]:
        """The CLS query or everybody's, and all keys, biases included."""
        y = self.layer_norm1(x)
        return self.self_attn.q_proj(y if everybody else y[:, :1]), self.self_attn.k_proj(y)


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

    def embed(self, pixel_values: Float[Array, "F H W 3"]) -> Float[Array, "F S C"]:
        """Pixels -> CLS and patches with positions, S = 1 + N."""
        g, p = self.config.grid_size, self.config.patch_size
        pixel_values = pixel_values[:, : g * p, : g * p].astype(self.config.dtype)
        images = pixel_values.shape[0]
        patches = pixel_values.reshape(images, g, p, g, p, 3).swapaxes(2, 3)
        x = self.patch_embedding(patches.reshape(images, g * g, p * p * 3))
        cls = jnp.broadcast_to(self.class_embedding, (images, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding
        normed: Array = self.pre_layernorm(x)
        return normed

    def __call__(self, pixel_values: Float[Array, "F H W 3"]) -> tuple[list[Array], Array]:
        """All hidden states `[F, 1 + N, C]` (layers + 1 of them) and the pooled CLS `[F, C]`."""
        states = [self.embed(pixel_values)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states, self.post_layernorm(states[-1][:, 0])

    def encode(
        self,
        pixel_values: Float[Array, "F H W 3"],
        *,
        feature_layers: tuple[int, ...] = (-2,),
        keep_cls: bool = False,
        signals: frozenset[Signal] = frozenset(),
    ) -> VisionOutput:
        """Features of the chosen hidden states, and the signals asked for.

        Only the layers that somebody reads are run: for LLaVA's feature layer -2 the last
        layer's attention output and MLP never are.

        Args:
            pixel_values: normalised.
            feature_layers: indices into the hidden states (0 = embeddings), concatenated.
            keep_cls: the "full" select strategy: CLS is a feature too.
            signals: those of the tower itself; "features" among them.
        """
        layers = self.config.num_hidden_layers
        wanted = [index % (layers + 1) for index in feature_layers]
        read = [_state_of(signal, layers) for signal in signals if signal.kind != "features"]
        states = [self.embed(pixel_values)]
        for layer in self.layers[: max(*wanted, *read, 0)]:
            states.append(layer(states[-1]))

        features = jnp.concatenate([states[index] for index in wanted], axis=-1)  # [F, 1 + N, C]
        found = {
            signal: features[:, 1:] if signal.kind == "features" else self._signal(states, signal)
            for signal in sorted(signals)
        }
        return VisionOutput(features[:, 1:], features[:, 0] if keep_cls else None, found)

    def _signal(self, states: list[Array], signal: Signal) -> Array:
        x = states[_state_of(signal, self.config.num_hidden_layers)]
        if signal.kind == "hidden_states":
            return x[:, 1:]
        heads = self.config.num_attention_heads
        everybody = signal.kind == "received_attention"
        q, k = self.layers[signal.layer].queries_and_keys(x, everybody=everybody)
        if everybody:
            return received_attention(q, k, num_heads=heads)
        if signal.kind == "cls_attention":
            return cls_attention(q, k, num_heads=heads if signal.heads == "mean" else 1)
        keys = k[:, 1:]
        if signal.heads == "joined":
            return keys
        return keys.reshape(*keys.shape[:2], heads, -1).astype(jnp.float32).mean(axis=2)


def _state_of(signal: Signal, layers: int) -> int:
    """The hidden state that a signal is made of: the layer's input, or its output."""
    layer = signal.layer % layers
    return layer + 1 if signal.kind == "hidden_states" else layer


def cls_attention(
    q_cls: Float[Array, "F 1 C"], keys: Float[Array, "F S C"], *, num_heads: int
) -> Float[Array, "F N"]:
    """Attention of the CLS query, softmaxed over CLS and patches, mean over heads.

    Args:
        q_cls: the CLS token's query.
        keys: CLS first.
        num_heads: 1 reads the full width as a single head, as PruMerge's code does.

    Returns:
        float32: the CLS entry is dropped after the softmax, so rows sum below 1.
    """
    return _mean_attention(q_cls, keys, num_heads)[:, 0, 1:]


def received_attention(
    queries: Float[Array, "F S C"], keys: Float[Array, "F S C"], *, num_heads: int
) -> Float[Array, "F N"]:
    """Attention that each patch receives: the mean over heads and all queries, CLS's included."""

    # Tile by tile: the weights of all of them at once would be a square matrix each.
    def tile(part: tuple[Array, Array]) -> Array:
        q, k = part
        return _mean_attention(q[None], k[None], num_heads)[0].mean(axis=0)

    received: Array = jax.lax.map(tile, (queries, keys))
    return received[:, 1:]


def _mean_attention(
    queries: Float[Array, "F Q C"], keys: Float[Array, "F S C"], num_heads: int
) -> Float[Array, "F Q S"]:
    """Softmaxed attention, mean over heads, float32."""
    images, slots, width = keys.shape
    q = queries.reshape(images, -1, num_heads, width // num_heads).astype(jnp.float32)
    k = keys.reshape(images, slots, num_heads, width // num_heads).astype(jnp.float32)
    # A rounded product would change who is an outlier.
    logits = jnp.einsum("fqhd,fshd->fhqs", q, k, precision=jax.lax.Precision.HIGHEST)
    logits = logits * (width // num_heads) ** -0.5
    return jax.nn.softmax(logits, axis=-1).mean(axis=1)
