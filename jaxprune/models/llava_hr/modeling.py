"""LLaVA-HR (arXiv 2403.03003) as pure functions: two towers that see an image at two sizes.

    pixels --ConvNext--> map ------------+-----------+-----------+------------+
    pixels, reduced --CLIP's first quarter-+-second-+--third-----+--fourth----+--> features

After each of the first three quarters an adapter adds the convolutional map to CLIP's tokens, and
at the end both are added once more. There is no CLS token: it is cut off before the first norm.
`params` has the keys "vision_tower" ("fast", "slow", "adapters_0" ..., "fast_proj", "slow_proj"),
"multi_modal_projector" and "language_model".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.models.activations import gelu
from jaxprune.models.clip.modeling import ClipVisionTower
from jaxprune.models.convnext.modeling import ConvNext, depthwise
from jaxprune.models.family import Arrays
from jaxprune.models.llava.modeling import Projector, project_with
from jaxprune.models.llava_hr.config import ADAPTERS, LlavaHrConfig
from jaxprune.models.stages import DecoderStages, init_decoder
from jaxprune.models.vit.modeling import signal_of_layer, split_patches
from jaxprune.ops.tiles import Frames
from jaxprune.ops.visual import PROJECTED, Signal, VisionOutput


def interpolation(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """Linear interpolation from so many points to others, the first and last staying.

    float32 places, as PyTorch has them: in float64 the result differs by 3e-4.
    """
    if before == after:
        return np.eye(before, dtype=np.float32)
    step = np.float32((before - 1) / max(after - 1, 1))
    places = np.arange(after, dtype=np.float32) * step
    low = np.minimum(places.astype(np.int64), before - 1)
    part = places - low.astype(np.float32)
    weights = np.zeros((after, before), np.float32)
    rows = np.arange(after)
    weights[rows, low] += 1 - part
    weights[rows, np.minimum(low + 1, before - 1)] += part
    return weights


def resized(x: Float[Array, "F H W C"], side: int) -> Float[Array, "F h w C"]:
    """A square map brought to another size, bilinear and with corners that stay."""
    if x.shape[1] == side:
        return x
    weights = jnp.asarray(interpolation(x.shape[1], side))
    # A rounded product would move pixels.
    rows = jnp.einsum("ab,fbwc->fawc", weights, x.astype(jnp.float32), precision="highest")
    both = jnp.einsum("ab,fhbc->fhac", weights, rows, precision="highest")
    return both.astype(x.dtype)


def fitted(x: Float[Array, "F H W C"], side: int) -> Float[Array, "F h w C"]:
    """A map on another grid: enlarged by `resized`, reduced by means."""
    before = x.shape[1]
    if before <= side:
        return resized(x, side)
    each = before // side
    return x.reshape(len(x), side, each, side, each, -1).mean(axis=(2, 4))


class FastTower(ClipVisionTower):
    """A CLIP at another size than it was trained for, layer by layer and without CLS."""

    def begin(self, pixel_values: Float[Array, "F H W 3"], grid: int) -> Float[Array, "F N C"]:
        """Pixels -> patches with positions, normed."""
        c = self.config
        pixels = split_patches(pixel_values.astype(c.dtype), grid=grid, patch_size=c.patch_size)
        positions = self.position_embedding[1:].reshape(c.grid_size, c.grid_size, -1)
        if grid != c.grid_size:  # as PyTorch's antialiased bicubic
            shape = (grid, grid, positions.shape[-1])
            positions = jax.image.resize(positions.astype(jnp.float32), shape, "cubic")
        x = self.patch_embedding(pixels)
        x = x + positions.reshape(grid * grid, -1).astype(x.dtype)
        normed: Array = self.pre_layernorm(x)
        return normed

    def layer(self, l: int, x: Float[Array, "F N C"]) -> Float[Array, "F N C"]:
        """The output of a layer."""
        y: Array = self.layers[l](x)
        return y

    def signal(self, l: int, x: Float[Array, "F N C"], signal: Signal) -> Array:
        """What a signal is in a layer whose input is given."""
        heads = self.config.num_attention_heads
        return signal_of_layer(self.layers[l], x, signal, num_heads=heads, cls=False)


class Adapter(nn.Module):
    """Adds the slow tower's map to the fast one's tokens, by a gate of one number an image."""

    config: LlavaHrConfig

    def setup(self) -> None:
        c = self.config
        width, slow = c.vision_config.hidden_size, c.slow_config.widths[-1]

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=c.dtype, param_dtype=c.dtype)

        self.slow_conv, self.slow_proj = dense(slow), dense(width)
        self.fast_conv, self.fast_proj = depthwise(width, c.dtype), dense(width)
        self.gate_in, self.gate_out = dense(width // 2), dense(1)

    def __call__(
        self, x: Float[Array, "F N C"], slow: Float[Array, "F h w S"]
    ) -> Float[Array, "F N C"]:
        grid = self.config.grid
        added = fitted(self.slow_proj(gelu(self.slow_conv(slow))), grid).reshape(x.shape)
        own = self.fast_conv(x.reshape(len(x), grid, grid, -1))
        x = x + self.fast_proj(gelu(own)).reshape(x.shape)
        both = jnp.concatenate([x, added], axis=-1).mean(axis=1)
        gate = jnp.tanh(self.gate_out(gelu(self.gate_in(both))))  # [F, 1]
        return x + gate[:, None] * added


class LlavaHrTower(nn.Module):
    """Both towers."""

    config: LlavaHrConfig

    def setup(self) -> None:
        c = self.config
        self.fast = FastTower(c.vision_config)
        self.slow = ConvNext(c.slow_config)
        if c.adapters:
            self.adapters = [Adapter(c) for _ in range(ADAPTERS)]
        width = c.vision_config.hidden_size
        self.fast_proj, self.slow_proj = (
            nn.Dense(width, dtype=c.dtype, param_dtype=c.dtype) for _ in range(2)
        )

    def __call__(self, pixel_values: Float[Array, "F H W 3"]) -> VisionOutput:
        """For the parameters: of CLIP those too that are stored and never used."""
        size = self.config.vision_config.image_size
        self.fast(jnp.zeros((1, size, size, 3)))
        return self.encode(pixel_values)

    def encode(
        self, pixel_values: Float[Array, "F H W 3"], *, signals: frozenset[Signal] = frozenset()
    ) -> VisionOutput:
        """Features, and the signals asked for: those of layers are of the fast tower's.

        All layers are run, whatever config.json says of a layer to select.
        """
        c, layers = self.config, self.config.vision_config.num_hidden_layers
        slow = self.slow(pixel_values)
        x = self.fast.begin(resized(pixel_values, c.fast_size), c.grid)
        quarter, inputs = layers // (ADAPTERS + 1), []
        for l in range(layers):
            inputs.append(x)
            x = self.fast.layer(l, x)
            if c.adapters and (l + 1) % quarter == 0 and l + 1 < layers:
                x = self.adapters[l // quarter](x, slow)
        added = fitted(self.slow_proj(slow), c.grid).reshape(x.shape)
        features = self.fast_proj(x) + added
        found: dict[Signal, Array] = {}
        for signal in sorted(signals):
            at = signal.layer_of(layers=layers, feature_layer=layers - 1)
            asked = c.tower.instead(signal)
            if signal.kind == "features":
                found[signal] = features
            elif signal.kind == "hidden_states":
                found[signal] = x if at == layers - 1 else inputs[at + 1]
            else:
                found[signal] = self.fast.signal(at, inputs[at], asked)
        return VisionOutput(features, None, found)


def _projector(config: LlavaHrConfig) -> Projector:
    return Projector(config.text_config.hidden_size, config.dtype)


class LlavaHrStages(DecoderStages):
    """The stages of a LLaVA-HR; see `models.family.Family`."""

    def encode(
        self,
        params: Arrays,
        config: LlavaHrConfig,
        pixel_values: Float[Array, "F H W 3"],
        signals: frozenset[Signal] = frozenset(),
        frames: Frames | None = None,
    ) -> VisionOutput:
        """Pixels of images -> features and the signals asked for."""
        del frames  # every tile is seen by itself
        vision: Any = LlavaHrTower(config).apply(
            {"params": params["vision_tower"]},
            pixel_values,
            signals=signals - {PROJECTED},
            method="encode",
        )
        return self.with_projected(params, config, VisionOutput(*vision), signals)

    def project(
        self, params: Arrays, config: LlavaHrConfig, features: Float[Array, "*any C"]
    ) -> Float[Array, "*any D"]:
        """Features -> the decoder's width."""
        return project_with(_projector(config), params, features)

    def init_params(self, config: LlavaHrConfig, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        vision, projector, text = jax.random.split(key, 3)
        pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
        features = jnp.zeros((1, config.vision_config.hidden_size))
        return {
            "vision_tower": LlavaHrTower(config).init(vision, pixels)["params"],
            "multi_modal_projector": _projector(config).init(projector, features)["params"],
            "language_model": init_decoder(config, text),
        }
