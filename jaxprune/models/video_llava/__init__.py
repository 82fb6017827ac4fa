"""Video-LLaVA: a CLIP for images and one for videos, in front of one LLaMA decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jaxprune.models.family import ModelFiles, VideoForm
from jaxprune.models.video_llava import images
from jaxprune.models.video_llava.config import NUM_FRAMES, PRESETS, VideoLlavaConfig
from jaxprune.models.video_llava.modeling import VideoLlavaStages
from jaxprune.models.video_llava.original import is_published, published_config
from jaxprune.models.video_llava.prompts import PROMPTS
from jaxprune.models.video_llava.weights import HUB, PUBLISHED
from jaxprune.models.weights import KeyTable
from jaxprune.ops.tiles import VisualSize


def frame_numbers(number: int) -> list[int]:
    """Which of a video's frames are seen: evenly spaced, from the first on."""
    return np.arange(0, number, number / NUM_FRAMES).astype(int).tolist()[:NUM_FRAMES]


class VideoLlava(VideoLlavaStages):
    """The family of Video-LLaVA; see `models.family.Family`."""

    name = VideoLlavaConfig.family
    config = VideoLlavaConfig
    prompts = PROMPTS
    presets: ClassVar = PRESETS
    videos = VideoForm(frame_numbers)
    image_processor = staticmethod(images.image_processor)
    processor_files = staticmethod(images.processor_files)

    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is Video-LLaVA's, of the Hub or the publisher's."""
        return is_published(fields) or fields.get("model_type") == self.name

    def read_config(self, files: ModelFiles) -> VideoLlavaConfig:
        """The config of a directory; see `Family.read_config`."""
        if is_published(files.fields):
            return published_config(files)
        return VideoLlavaConfig.from_hf(files.fields, dtype=files.dtype)

    def weights(self, config: VideoLlavaConfig) -> KeyTable:
        """How a model is stored."""
        return PUBLISHED if config.temporal_attention else HUB

    def image_arguments(self, config: VideoLlavaConfig, size: VisualSize) -> dict[str, Any]:
        """Nothing: the file says all."""
        del config, size
        return {}

    def hub_form(self, config: VideoLlavaConfig) -> bool:
        """Where there is no attention over frames, which transformers does not have."""
        return not config.temporal_attention


FAMILY = VideoLlava()

__all__ = ["FAMILY", "VideoLlavaConfig"]
