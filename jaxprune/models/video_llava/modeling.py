"""Video-LLaVA (arXiv 2311.10122) as pure functions: a tower for images, one for videos.

`params` has the keys "image_tower", "video_tower", "multi_modal_projector" and "language_model".
A video's frames are tiles. In the publisher's form every layer of the video tower first attends
over the frames, each place of the picture for itself; in that of the Hub frames are seen alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.clip.modeling import ClipLayer, ClipVisionTower, layer_norm
from jaxprune.models.family import Arrays
from jaxprune.models.llava.modeling import LlavaStages, projector_of
from jaxprune.models.stages import init_decoder
from jaxprune.models.video_llava.config import NUM_FRAMES, VideoLlavaConfig
from jaxprune.models.vit.modeling import Layer
from jaxprune.ops.tiles import STILL, Frames
from jaxprune.ops.visual import PROJECTED, Signal, VisionOutput


class TemporalAttention(nn.Module):
    """Attention over a video's frames, at every place for itself."""

    config: Any

    def setup(self) -> None:
        c = self.config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.dtype) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "F S C"], frames: Frames) -> Float[Array, "F S C"]:
        def heads(y: Array) -> Array:  # [F, S, C] -> [S, H, F, d]
            split = y.reshape(*y.shape[:2], self.config.num_attention_heads, -1)
            return split.transpose(1, 2, 0, 3)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        logits = jnp.einsum("shfd,shgd->shfg", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        # A mask and not a reshape: videos may stand anywhere among the tiles of a batch.
        video = jnp.asarray(frames.video)
        same = video[:, None] == video
        weights = jax.nn.softmax(jnp.where(same, logits, -jnp.inf), axis=-1).astype(x.dtype)
        out = jnp.einsum("shfg,shgd->shfd", weights, v)
        return self.out_proj(out.transpose(2, 0, 1, 3).reshape(x.shape))


class VideoLayer(ClipLayer):
    """A layer of CLIP behind attention over the frames."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.temporal_embedding = self.param(
            "temporal_embedding", nn.initializers.normal(c.hidden_size**-0.5),
            (NUM_FRAMES, c.hidden_size), c.dtype,
        )  # fmt: skip
        self.temporal_norm = layer_norm(c)
        self.temporal_attn = TemporalAttention(c)

    def over_frames(self, x: Float[Array, "F S C"], frames: Frames) -> Float[Array, "F S C"]:
        """The frames' own positions and what they see of each other, CLS tokens included."""
        number = jnp.clip(jnp.asarray(frames.number), 0, NUM_FRAMES - 1)
        x = x + self.temporal_embedding[number][:, None]
        return x + self.temporal_attn(self.temporal_norm(x), frames)


class InTime:
    """A layer together with the frames that it is to look over: a `Layer`."""

    def __init__(self, layer: VideoLayer, frames: Frames) -> None:
        self.layer, self.frames = layer, frames

    def __call__(self, x: Float[Array, "F S C"]) -> Float[Array, "F S C"]:
        return self.layer(self.layer.over_frames(x, self.frames))

    def queries_and_keys(
        self, x: Float[Array, "F S C"], *, everybody: bool
    ) -> tuple[Float[Array, "F Q C"], Float[Array, "F S C"]]:
        """Those of the attention within a frame."""
        x = self.layer.over_frames(x, self.frames)
        return self.layer.queries_and_keys(x, everybody=everybody)


class VideoTower(ClipVisionTower):
    """The publisher's tower for videos."""

    layer_class = VideoLayer

    def encode_frames(
        self, pixel_values: Float[Array, "F H W 3"], frames: Frames, **options: Any
    ) -> VisionOutput:
        """As `encode`, frames of a video looking at each other."""
        own: Sequence[Any] = self.layers  # of `VideoLayer`
        layers: Sequence[Layer] = [InTime(layer, frames) for layer in own]
        return self.encode(pixel_values, layers=layers, **options)

    def __call__(self, pixel_values: Float[Array, "F H W 3"]) -> tuple[list[Array], Array]:
        """For the parameters: all layers over frames of a single video."""
        number = jnp.arange(len(pixel_values), dtype=jnp.int32)
        found = self.encode_frames(pixel_values, Frames(0 * number, number), feature_layers=(-1,))
        return [found.features], self.post_layernorm(found.features[:, 0])


class VideoLlavaStages(LlavaStages):
    """The stages of a Video-LLaVA; see `models.family.Family`."""

    def encode(
        self,
        params: Arrays,
        config: Any,
        pixel_values: Float[Array, "F H W 3"],
        signals: frozenset[Signal] = frozenset(),
        frames: Frames | None = None,
    ) -> VisionOutput:
        """Pixels of images and of videos' frames -> features and the signals asked for.

        Each tower is run where the batch has something for it.
        """
        if frames is None:
            frames = Frames(*jnp.full((2, len(pixel_values)), STILL))
        options = {
            "feature_layers": config.feature_layers,
            "signals": signals - {PROJECTED},
        }
        video = jnp.asarray(frames.video)

        def of_images() -> Any:
            tower = ClipVisionTower(config.vision_config)
            own = {"params": params["image_tower"]}
            return tower.apply(own, pixel_values, method="encode", **options)

        def of_videos() -> Any:
            own = {"params": params["video_tower"]}
            tower = _video_tower(config)
            if config.temporal_attention:
                return tower.apply(own, pixel_values, frames, method="encode_frames", **options)
            return tower.apply(own, pixel_values, method="encode", **options)

        still = _where(jnp.any(video == STILL), of_images)
        moving = _where(jnp.any(video > STILL), of_videos)
        is_video = video > STILL

        def chosen(a: Array, b: Array) -> Array:
            return jnp.where(is_video.reshape(-1, *[1] * (a.ndim - 1)), b, a)

        vision = VisionOutput(*jax.tree.map(chosen, tuple(still), tuple(moving)))
        return self.with_projected(params, config, vision, signals)

    def init_params(self, config: Any, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        image, video, projector, text = jax.random.split(key, 4)
        size = config.vision_config.image_size
        pixels = jnp.zeros((1, size, size, 3))
        features = jnp.zeros((1, config.vision_config.hidden_size * len(config.feature_layers)))
        return {
            "image_tower": ClipVisionTower(config.vision_config).init(image, pixels)["params"],
            "video_tower": _video_tower(config).init(video, pixels)["params"],
            "multi_modal_projector": projector_of(config).init(projector, features)["params"],
            "language_model": init_decoder(config, text),
        }


def _video_tower(config: VideoLlavaConfig) -> ClipVisionTower:
    tower = VideoTower if config.temporal_attention else ClipVisionTower
    return tower(config.vision_config)


def _where(wanted: Array, make: Callable[[], Any]) -> Any:
    """What a function gives, or zeros without running it."""
    shapes = jax.eval_shape(make)
    return jax.lax.cond(
        wanted, make, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    )
