"""LLaVA-NeXT: LLaVA at any resolution, the image and the tiles of an enlarged one."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.models.family import ModelFiles
from jaxprune.models.llava.original import has_tiles, is_original
from jaxprune.models.llava_next import images
from jaxprune.models.llava_next.config import LlavaNextConfig
from jaxprune.models.llava_next.modeling import LlavaNextStages
from jaxprune.models.llava_next.original import original_config
from jaxprune.models.llava_next.prompts import PROMPTS
from jaxprune.models.llava_next.weights import llava_next_table
from jaxprune.models.weights import KeyTable
from jaxprune.ops.tiles import VisualSize


class LlavaNext(LlavaNextStages):
    """The family of LLaVA-NeXT; see `models.family.Family`."""

    name = LlavaNextConfig.family
    config = LlavaNextConfig
    prompts = PROMPTS
    videos = None
    presets: ClassVar = {
        "llava-1.6-vicuna-7b": LlavaNextConfig.llava_1_6_vicuna_7b,
        "llava-1.6-vicuna-13b": LlavaNextConfig.llava_1_6_vicuna_13b,
        "llava-1.6-mistral-7b": LlavaNextConfig.llava_1_6_mistral_7b,
        "llava-1.6-34b": LlavaNextConfig.llava_1_6_34b,
        "llava-next-llama3-8b": LlavaNextConfig.llava_next_llama3_8b,
    }
    image_processor = staticmethod(images.image_processor)
    processor_files = staticmethod(images.processor_files)

    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is LLaVA-NeXT's, of the Hub or original."""
        if is_original(fields):
            return has_tiles(fields)
        return fields.get("model_type") == self.name

    def read_config(self, files: ModelFiles) -> LlavaNextConfig:
        """The config of a directory; see `Family.read_config`."""
        if is_original(files.fields):
            return original_config(files)
        return LlavaNextConfig.from_hf(files.fields, dtype=files.dtype)

    def weights(self, config: LlavaNextConfig) -> KeyTable:
        """How a model is stored."""
        return llava_next_table(config.text_config.model_type)

    def image_arguments(self, config: LlavaNextConfig, size: VisualSize) -> dict[str, Any]:
        """Nothing: the file says all."""
        del config, size
        return {}

    def hub_form(self, config: LlavaNextConfig) -> bool:
        """Always."""
        del config
        return True


FAMILY = LlavaNext()

__all__ = ["FAMILY", "LlavaNextConfig"]
