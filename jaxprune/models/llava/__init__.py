"""LLaVA-1.5: a CLIP tower, a two-layer projector and a LLaMA decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.models.family import ModelFiles
from jaxprune.models.llava import images
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.llava.modeling import LlavaStages
from jaxprune.models.llava.original import has_tiles, is_original, original_arguments
from jaxprune.models.llava.prompts import PROMPTS
from jaxprune.models.llava.weights import llava_table
from jaxprune.models.weights import KeyTable
from jaxprune.ops.tiles import VisualSize


class Llava(LlavaStages):
    """The family of LLaVA-1.5; see `models.family.Family`."""

    name = LlavaConfig.family
    config = LlavaConfig
    prompts = PROMPTS
    videos = None
    presets: ClassVar = {
        "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
        "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    }
    image_processor = staticmethod(images.image_processor)
    processor_files = staticmethod(images.processor_files)

    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is LLaVA-1.5's, of the Hub or original."""
        if is_original(fields):
            return not has_tiles(fields)
        return fields.get("model_type") == self.name

    def read_config(self, files: ModelFiles) -> LlavaConfig:
        """The config of a directory; see `Family.read_config`."""
        if is_original(files.fields):
            return LlavaConfig(**original_arguments(files))
        return LlavaConfig.from_hf(files.fields, dtype=files.dtype)

    def weights(self, config: LlavaConfig) -> KeyTable:
        """How a model is stored."""
        return llava_table(config.text_config.model_type)

    def image_arguments(self, config: LlavaConfig, size: VisualSize) -> dict[str, Any]:
        """Nothing: the file says all."""
        del config, size
        return {}

    def hub_form(self, config: LlavaConfig) -> bool:
        """Always."""
        del config
        return True


FAMILY = Llava()

__all__ = ["FAMILY", "Llava", "LlavaConfig"]
