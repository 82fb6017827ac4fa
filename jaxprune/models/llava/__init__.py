"""LLaVA-1.5: a CLIP tower, a two-layer projector and a LLaMA decoder."""

from typing import ClassVar

from jaxprune.models.llava import images
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.llava.modeling import LlavaStages
from jaxprune.models.llava.prompts import PROMPTS
from jaxprune.models.llava.weights import LLAVA


class Llava(LlavaStages):
    """The family of LLaVA-1.5; see `models.family.Family`."""

    name = LlavaConfig.family
    config = LlavaConfig
    weights = LLAVA
    prompts = PROMPTS
    presets: ClassVar = {
        "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
        "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    }
    image_processor = staticmethod(images.image_processor)
    processor_files = staticmethod(images.processor_files)


FAMILY = Llava()

__all__ = ["FAMILY", "Llava", "LlavaConfig"]
