"""How LLaVA-NeXT's images are prepared, where a directory has no files that say it."""

from typing import Any

from jaxprune.models.llava.images import described, sizes
from jaxprune.models.llava_next.config import LlavaNextConfig


def image_processor(config: LlavaNextConfig, *, pad: bool) -> Any:
    """The `transformers` image processor of a LLaVA-NeXT, which pads as its tilings ask for."""
    del pad
    # Imported here because it takes seconds.
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    points = [list(point) for point in config.image_grid_pinpoints]
    return LlavaNextImageProcessorPil(image_grid_pinpoints=points, **sizes(config))


def processor_files(config: LlavaNextConfig, *, do_pad: bool = True) -> dict[str, dict[str, Any]]:
    """The files from which `transformers` makes the processor of a LLaVA-NeXT.

    Returns:
        File names and what JSON they hold.
    """
    del do_pad
    own = {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_pad": True,
        "image_grid_pinpoints": [list(point) for point in config.image_grid_pinpoints],
    }
    return described(config, own, "LlavaNextProcessor")
