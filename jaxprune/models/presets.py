"""Published model sizes by name, for counting costs without any weights."""

from collections.abc import Callable
from typing import Any

from jaxprune.models.llava import LlavaConfig

PRESETS: dict[str, Callable[..., Any]] = {
    "llava-1.5-7b": LlavaConfig.llava_1_5_7b,
    "llava-1.5-13b": LlavaConfig.llava_1_5_13b,
}
