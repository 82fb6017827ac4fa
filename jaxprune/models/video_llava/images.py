"""How Video-LLaVA's images and frames are prepared: as LLaVA-1.5's, at 224 pixels."""

from typing import Any

from jaxprune.models.llava.images import described, sizes
from jaxprune.models.video_llava.config import VideoLlavaConfig


def image_processor(config: VideoLlavaConfig, *, pad: bool) -> Any:
    """The `transformers` image processor of a Video-LLaVA."""
    # Imported here because it takes seconds.
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(do_pad=pad, **sizes(config))


def processor_files(config: VideoLlavaConfig, *, do_pad: bool = False) -> dict[str, dict[str, Any]]:
    """The files from which `transformers` makes the processor of a Video-LLaVA.

    Returns:
        File names and what JSON they hold.
    """
    del do_pad
    own = {"image_processor_type": "VideoLlavaImageProcessor"}
    files = described(config, own, "VideoLlavaProcessor")
    video = {**files["preprocessor_config.json"], "processor_class": "VideoLlavaProcessor"}
    del video["image_processor_type"]
    video["video_processor_type"] = "VideoLlavaVideoProcessor"
    return {**files, "video_preprocessor_config.json": video}
