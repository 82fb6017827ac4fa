"""LLaVA-NeXT: LLaVA at any resolution, the image and the tiles of an enlarged one."""

from typing import ClassVar

from jaxprune.models.llava_next import images
from jaxprune.models.llava_next.config import LlavaNextConfig
from jaxprune.models.llava_next.modeling import LlavaNextStages
from jaxprune.models.llava_next.prompts import PROMPTS
from jaxprune.models.llava_next.weights import LLAVA_NEXT


class LlavaNext(LlavaNextStages):
    """The family of LLaVA-NeXT; see `models.family.Family`."""

    name = LlavaNextConfig.family
    config = LlavaNextConfig
    weights = LLAVA_NEXT
    prompts = PROMPTS
    presets: ClassVar = {
        "llava-1.6-vicuna-7b": LlavaNextConfig.llava_1_6_vicuna_7b,
        "llava-1.6-vicuna-13b": LlavaNextConfig.llava_1_6_vicuna_13b,
        "llava-1.6-mistral-7b": LlavaNextConfig.llava_1_6_mistral_7b,
        "llava-1.6-34b": LlavaNextConfig.llava_1_6_34b,
        "llava-next-llama3-8b": LlavaNextConfig.llava_next_llama3_8b,
    }
    image_processor = staticmethod(images.image_processor)
    processor_files = staticmethod(images.processor_files)


FAMILY = LlavaNext()

__all__ = ["FAMILY", "LlavaNextConfig"]
