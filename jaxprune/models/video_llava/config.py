"""Sizes of a Video-LLaVA model, and how it sees images and videos."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxprune.errors import UserError
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.vit.config import VitTower
from jaxprune.ops.tiles import CLS, Tiling, VisualSize, one_tile

NUM_FRAMES = 8
_WHERE = "The Video-LLaVA config"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLlavaConfig(LlavaConfig):
    """Video-LLaVA (arXiv 2311.10122); the defaults are the 7B model of the Hub.

    Attributes:
        vision_config: of both towers.
        video_token_index: the token that stands for a video's visual tokens.
        temporal_attention: whether the video tower's layers attend over the frames, as the
            publisher's do and those on the Hub do not.
    """

    family: ClassVar[str] = "video_llava"

    vision_config: ClipVisionConfig = ClipVisionConfig(image_size=224)  # noqa: RUF009  frozen
    video_token_index: int = 32001
    temporal_attention: bool = False

    @property
    def tower(self) -> "VideoVitTower":
        return VideoVitTower(
            self.vision_config, self.feature_layers, temporal=self.temporal_attention
        )

    @property
    def one_tile(self) -> bool:
        return False

    @property
    def most_tiles(self) -> int:
        return NUM_FRAMES

    def most_tokens(self, tiles: int) -> int:
        """The most visual tokens that an image of up to so many tiles has, or a video."""
        N = self.vision_config.num_patches
        return NUM_FRAMES * (N + 1) if tiles >= NUM_FRAMES else N + self.keep_cls

    def tiling(self, size: VisualSize) -> Tiling:
        """An image is one square; a video one for each frame, with its CLS token in front."""
        N, side = self.vision_config.num_patches, self.vision_config.grid_size
        if size.frames == 1:
            return one_tile(N, cls=self.keep_cls)
        if size.frames != NUM_FRAMES:
            raise UserError(f"A video of {size.frames} frames came; expected {NUM_FRAMES}.")
        frame, place = np.divmod(np.arange(NUM_FRAMES * (N + 1), dtype=np.int32), N + 1)
        patch = frame * N + place - 1
        slots = np.where(place == 0, CLS - frame, patch)
        # CLS tokens are in rows of their own, and so never go with patches.
        rows = np.where(place == 0, frame, NUM_FRAMES + patch // side)
        maps = np.arange(NUM_FRAMES * N, dtype=np.int32).reshape(NUM_FRAMES, side, side)
        return Tiling(NUM_FRAMES, slots, rows, maps=tuple(maps), video=True)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "VideoLlavaConfig":
        """From the dict of a `transformers` `VideoLlavaConfig`; absent fields have its defaults.

        Raises:
            UserError: for a field, value or sub-model that this port does not handle.
        """
        rest = {name: x for name, x in fields.items() if name != "video_seq_length"}
        rest.setdefault("vision_config", ClipVisionConfig(image_size=224).to_hf())
        token = rest.pop("video_token_id", rest.get("video_token_index", 32001))
        rest.pop("video_token_index", None)
        if type(token) is not int:
            raise UserError(f"{_WHERE} has video_token_index={token!r}; expected a whole number.")
        return cls(**cls._read(rest, dtype=dtype), video_token_index=token)

    def to_hf(self) -> dict[str, Any]:
        """The dict that `VideoLlavaConfig` reads back, or the publisher's with its towers."""
        if self.temporal_attention:
            return published_fields(self)
        return {
            **super().to_hf(),
            "architectures": ["VideoLlavaForConditionalGeneration"],
            "video_token_index": self.video_token_index,
            "image_seq_length": self.vision_config.num_patches,
            "video_seq_length": self.most_tokens(NUM_FRAMES),
        }


def published_fields(config: VideoLlavaConfig) -> dict[str, Any]:
    """The publisher's config.json, which names the towers and does not give their sizes."""
    return {
        **config.text_config.to_hf(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_image_tower": "LanguageBind/LanguageBind_Image",
        "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.keep_cls else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }


@dataclasses.dataclass(frozen=True)
class VideoVitTower(VitTower):
    """Both towers; as many tiles as a video has frames are counted as a video's."""

    temporal: bool = False

    def macs(self, tiles: int) -> int:
        """Multiply-adds of so many tiles, those of attention over the frames among them."""
        total, c = super().macs(tiles), self.config
        if not self.temporal or tiles < NUM_FRAMES:
            return total
        run = max(index % (c.num_hidden_layers + 1) for index in self.feature_layers)
        slots, D = tiles * (c.num_patches + 1), c.hidden_size
        return total + run * (slots * 4 * D**2 + 2 * slots * NUM_FRAMES * D)


# ---- published sizes


def _hub(*, dtype: str = "float32") -> VideoLlavaConfig:
    """Video-LLaVA-7B on the Hub: without attention over the frames."""
    return VideoLlavaConfig(
        vision_config=ClipVisionConfig(image_size=224, dtype=dtype),
        text_config=LlamaConfig(dtype=dtype),
    )


def _published(*, dtype: str = "float32") -> VideoLlavaConfig:
    """Video-LLaVA-7B as its publisher has it."""
    return VideoLlavaConfig(
        vision_config=ClipVisionConfig(image_size=224, hidden_act="gelu", dtype=dtype),
        text_config=LlamaConfig(vocab_size=32000, dtype=dtype),
        temporal_attention=True,
    )


PRESETS: dict[str, Callable[..., VideoLlavaConfig]] = {
    "video-llava-7b": _published,
    "video-llava-7b-hf": _hub,
}
