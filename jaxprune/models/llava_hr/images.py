"""How LLaVA-HR's images are prepared: as the original LLaVA-1.5's, at the larger size."""

from typing import Any

from jaxprune.models.llava_hr.config import LlavaHrConfig


def image_processor(config: LlavaHrConfig, *, pad: bool) -> Any:
    """The `transformers` image processor of a LLaVA-HR."""
    # Imported here because it takes seconds.
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side = config.image_size
    return LlavaImageProcessorPil(
        do_pad=pad, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
