"""Published model sizes by name, for counting costs without any weights."""

from collections.abc import Callable
from typing import Any

from jaxprune.models.llava import LlavaConfig
from jaxprune.models.llava_next import LlavaNextConfig

PRESETS: dict[str, Callable[..., Any]] = {
    "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
    "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
    "llava-1.6-vicuna-7b": LlavaNextConfig.llava_1_6_vicuna_7b,
    "llava-1.6-vicuna-13b": LlavaNextConfig.llava_1_6_vicuna_13b,
    "llava-1.6-mistral-7b": LlavaNextConfig.llava_1_6_mistral_7b,
    "llava-1.6-34b": LlavaNextConfig.llava_1_6_34b,
    "llava-next-llama3-8b": LlavaNextConfig.llava_next_llama3_8b,
}
