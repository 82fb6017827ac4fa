"""How LLaVA-1.5's images are prepared, where a directory has no files that say it."""

from typing import Any

from jaxprune.models.family import IMAGE_PLACEHOLDER
from jaxprune.models.llava.config import LlavaConfig

# Mean and deviation of the channels that CLIP was trained with.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def sizes(config: LlavaConfig) -> dict[str, Any]:
    """What an image is resized and cropped to."""
    side = config.vision_config.image_size
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def image_processor(config: LlavaConfig, *, pad: bool) -> Any:
    """The `transformers` image processor of a LLaVA-1.5."""
    # Imported here because it takes seconds.
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(do_pad=pad, **sizes(config))


def processor_files(config: LlavaConfig, *, do_pad: bool = False) -> dict[str, dict[str, Any]]:
    """The files from which `transformers` makes the processor of a LLaVA-1.5.

    Args:
        config: the model's config.
        do_pad: images are padded to squares, instead of losing what sticks out.

    Returns:
        File names and what JSON they hold.
    """
    # CLIP's image processor is known to every release, LLaVA's is the one that can pad.
    own: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor"}
    if do_pad:
        own = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return described(config, own, "LlavaProcessor")


def described(
    config: LlavaConfig, image_processor: dict[str, Any], processor: str
) -> dict[str, dict[str, Any]]:
    """The files of a processor whose images are CLIP's, with what is particular to it."""
    preprocessor = {
        "do_convert_rgb": True,
        **image_processor,
        "do_resize": True,
        "resample": 3,
        "do_center_crop": True,
        **sizes(config),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    fields = {
        "processor_class": processor,
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLS, which the strategy "default" takes off again
    }
    return {"preprocessor_config.json": preprocessor, "processor_config.json": fields}
