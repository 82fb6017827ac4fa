"""A vision transformer, seen from outside: which layers are run, and what methods read of them.

Of any layer: attention of the CLS query and received by patches, keys, hidden states. A tower
derives from `VisionTransformer` and says how pixels are embedded, what a layer is, and how its
patches make up visual tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.ops.visual import Signal, VisionOutput


@runtime_checkable  # so that the tests can check it
class Layer(Protocol):
    """A pre-norm layer of a tower."""

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]: ...

    def queries_and_keys(
        self, x: Float[Array, "F S C"], *, everybody: bool
    ) -> tuple[Float[Array, "F Q C"], Float[Array, "F S C"]]:
        """The first token's query or everybody's, and all keys, as attention takes them."""


class VitMLP(nn.Module):
    """The MLP of a layer."""

    config: Any

    def setup(self) -> None:
        c = self.config
        self.fc1 = nn.Dense(c.intermediate_size, dtype=c.dtype, param_dtype=c.dtype)
        self.fc2 = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        return self.fc2(ACTIVATIONS[self.config.hidden_act](self.fc1(x)))


class VisionTransformer(nn.Module):
    """A tower over a CLS token and the patches of a tile."""

    config: Any

    def blocks(self) -> Sequence[Layer]:
        """The layers in order."""
        raise NotImplementedError

    def embed(self, pixel_values: Float[Array, "F H W 3"]) -> Float[Array, "F S C"]:
        """Pixels -> CLS and patches with positions, S = 1 + the patches."""
        raise NotImplementedError

    def as_tokens(self, patches: Float[Array, "F P C"]) -> Float[Array, "F N D"]:
        """What patches have, for the visual tokens that they make up."""
        return patches

    def encode(
        self,
        pixel_values: Float[Array, "F H W 3"],
        *,
        feature_layers: tuple[int, ...] = (-2,),
        signals: frozenset[Signal] = frozenset(),
        layers: Sequence[Layer] | None = None,
    ) -> VisionOutput:
        """Features of the chosen hidden states, and the signals asked for.

        Only the layers that somebody reads are run: for LLaVA's feature layer -2 the last
        layer's attention output and MLP never are.

        Args:
            pixel_values: normalised.
            feature_layers: indices into the hidden states (0 = embeddings), concatenated.
            signals: those of the tower itself; "features" among them.
            layers: what is run instead of the tower's own.
        """
        layers, L = self.blocks() if layers is None else layers, self.config.num_hidden_layers
        wanted = [index % (L + 1) for index in feature_layers]
        # Hidden state l + 1 is what layer l makes.
        maker = max(*wanted, 1) - 1
        at = {signal: signal.layer_of(layers=L, feature_layer=maker) for signal in signals}
        read = [_state_of(signal, at[signal]) for signal in signals if signal.kind != "features"]
        states = [self.embed(pixel_values)]
        for layer in layers[: max(*wanted, *read, 0)]:
            states.append(layer(states[-1]))

        whole = jnp.concatenate([states[index] for index in wanted], axis=-1)  # [F, S, C]
        features = self.as_tokens(whole[:, 1:])
        found = {
            signal: features
            if signal.kind == "features"
            else self._signal(layers[at[signal]], states[_state_of(signal, at[signal])], signal)
            for signal in sorted(signals)
        }
        merged = features.shape[-1] != whole.shape[-1]
        return VisionOutput(features, None if merged else whole[:, 0], found)

    def _signal(self, layer: Layer, x: Float[Array, "F S C"], signal: Signal) -> Array:
        if signal.kind == "hidden_states":
            return self.as_tokens(x[:, 1:])
        found = signal_of_layer(layer, x, signal, num_heads=self.config.num_attention_heads)
        return self.as_tokens(found) if signal.kind == "keys" else self._of_tokens(found)

    def _of_tokens(self, attention: Float[Array, "F P"]) -> Float[Array, "F N"]:
        """Attention to patches, as attention to the visual tokens that they make up."""
        return self.as_tokens(attention[..., None]).sum(axis=-1)


def signal_of_layer(
    layer: Layer, x: Float[Array, "F S C"], signal: Signal, *, num_heads: int, cls: bool = True
) -> Float[Array, "F P"] | Float[Array, "F P c"]:
    """Attention to the patches, or their keys, in a layer.

    Args:
        layer: the layer.
        x: its input.
        signal: which of both, and over which heads.
        num_heads: the layer's.
        cls: whether a CLS token stands in front of the patches.
    """
    everybody = signal.kind == "received_attention"
    q, k = layer.queries_and_keys(x, everybody=everybody)
    if everybody:
        return received_attention(q, k, num_heads=num_heads)[:, cls:]
    if signal.kind == "cls_attention":
        own = 1 if signal.heads == "joined" else num_heads
        mean = cls_attention(q, k, num_heads=own)
        return num_heads * mean if signal.heads == "sum" else mean
    keys = k[:, cls:]
    if signal.heads == "joined":
        return keys
    return keys.reshape(*keys.shape[:2], num_heads, -1).astype(jnp.float32).mean(axis=2)


def _state_of(signal: Signal, layer: int) -> int:
    """The hidden state that a signal of a layer is made of: the layer's input, or its output."""
    return layer + 1 if signal.kind == "hidden_states" else layer


def split_patches(
    pixel_values: Float[Array, "F H W 3"], *, grid: int, patch_size: int
) -> Float[Array, "F P p"]:
    """The pixels of each patch: a convolution with stride = kernel is a product over them."""
    g, p = grid, patch_size
    tiles = pixel_values.shape[0]
    cut = pixel_values[:, : g * p, : g * p].reshape(tiles, g, p, g, p, 3).swapaxes(2, 3)
    return cut.reshape(tiles, g * g, p * p * 3)


def with_cls(cls: Float[Array, " C"], patches: Float[Array, "F P C"]) -> Float[Array, "F S C"]:
    """The CLS token in front of every tile's patches."""
    first = jnp.broadcast_to(cls, (len(patches), 1, patches.shape[-1]))
    return jnp.concatenate([first, patches], axis=1)


def split_heads(x: Float[Array, "F S C"], num_heads: int) -> Float[Array, "F H S d"]:
    """The heads of every token, on an axis of their own."""
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def cls_attention(
    q_cls: Float[Array, "F 1 C"], keys: Float[Array, "F S C"], *, num_heads: int
) -> Float[Array, "F P"]:
    """Attention of the CLS query, softmaxed over CLS and patches, mean over heads.

    Args:
        q_cls: the CLS token's query.
        keys: CLS first.
        num_heads: 1 reads the full width as a single head, as PruMerge's code does.

    Returns:
        float32: the CLS entry is dropped after the softmax, so rows sum below 1.
    """
    return mean_attention(q_cls, keys, num_heads)[:, 0, 1:]


def received_attention(
    queries: Float[Array, "F S C"], keys: Float[Array, "F S C"], *, num_heads: int
) -> Float[Array, "F S"]:
    """Attention that each token receives: the mean over heads and all queries, CLS's included."""

    # Tile by tile: the weights of all of them at once would be a square matrix each.
    def tile(part: tuple[Array, Array]) -> Array:
        q, k = part
        return mean_attention(q[None], k[None], num_heads)[0].mean(axis=0)

    received: Array = jax.lax.map(tile, (queries, keys))
    return received


def mean_attention(
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
