"""LLaVA-HR: CLIP and a ConvNeXt beside it, mixed by adapters, and a LLaMA decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.models.family import ModelFiles
from jaxprune.models.llava.prompts import PROMPTS
from jaxprune.models.llava_hr import images
from jaxprune.models.llava_hr.config import PRESETS, LlavaHrConfig
from jaxprune.models.llava_hr.modeling import LlavaHrStages
from jaxprune.models.llava_hr.original import published_config
from jaxprune.models.llava_hr.weights import LLAVA_HR
from jaxprune.models.weights import KeyTable
from jaxprune.ops.tiles import VisualSize


class LlavaHr(LlavaHrStages):
    """The family of LLaVA-HR; see `models.family.Family`."""

    name = LlavaHrConfig.family
    config = LlavaHrConfig
    prompts = PROMPTS
    videos = None
    presets: ClassVar = PRESETS
    image_processor = staticmethod(images.image_processor)

    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is LLaVA-HR's; there is one form."""
        return bool(fields.get("is_multipath_encoder")) or "vision_tower_slow" in fields

    def read_config(self, files: ModelFiles) -> LlavaHrConfig:
        """The config of a directory; see `Family.read_config`."""
        return published_config(files.fields, files.shapes(), dtype=files.dtype)

    def weights(self, config: LlavaHrConfig) -> KeyTable:
        """How a model is stored."""
        del config
        return LLAVA_HR

    def image_arguments(self, config: LlavaHrConfig, size: VisualSize) -> dict[str, Any]:
        """Nothing: the image processor is made for the config."""
        del config, size
        return {}

    def processor_files(
        self, config: LlavaHrConfig, *, do_pad: bool = True
    ) -> dict[str, dict[str, Any]]:
        """None: transformers does not know the family."""
        del config, do_pad
        return {}

    def hub_form(self, config: LlavaHrConfig) -> bool:
        """Never: it is written as its publisher stores it."""
        del config
        return False


FAMILY = LlavaHr()

__all__ = ["FAMILY", "LlavaHrConfig"]
