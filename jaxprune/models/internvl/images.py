"""How InternVL's images are prepared, where a directory has no files that say it."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxprune.files import read_json
from jaxprune.models.internvl.config import InternVLConfig
from jaxprune.ops.tiles import VisualSize

# Mean and deviation of the channels on ImageNet, which the tower was trained with.
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def _settings(config: InternVLConfig) -> dict[str, Any]:
    side = config.vision_config.image_size
    return {
        "size": {"height": side, "width": side},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        **_tiles(config, None),
    }


def image_arguments(config: InternVLConfig, size: VisualSize) -> dict[str, Any]:
    """How an image is cut, which `transformers` tells the image processor at each call."""
    return _tiles(config, size.most_tiles)


def _tiles(config: InternVLConfig, most: int | None) -> dict[str, Any]:
    most = config.max_tiles if most is None else most
    fewest = min(config.min_tiles, most)
    return {"crop_to_patches": True, "min_patches": fewest, "max_patches": most}


def image_processor(config: InternVLConfig, *, pad: bool) -> Any:
    """The `transformers` image processor of an InternVL, which never pads."""
    del pad
    # Imported here because it takes seconds.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    return GotOcr2ImageProcessorPil(**_settings(config))


def processor_files(config: InternVLConfig, *, do_pad: bool = False) -> dict[str, dict[str, Any]]:
    """The files from which `transformers` makes the processor of an InternVL.

    Returns:
        File names and what JSON they hold; of the tokenizer's what is particular.
    """
    del do_pad
    preprocessor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **_settings(config),
    }
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config.tower.tokens_per_tile,
    }
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return {
        "preprocessor_config.json": preprocessor,
        "processor_config.json": processor,
        "tokenizer_config.json": {"extra_special_tokens": tokens},
    }


def tiles_of(directory: pathlib.Path) -> Mapping[str, Any]:
    """`min_patches` and `max_patches`, where a directory's image processor says them."""
    found: dict[str, Any] = {}
    path = directory / "preprocessor_config.json"
    if path.is_file():
        found = read_json(path)
    path = directory / "processor_config.json"
    if path.is_file():
        nested = read_json(path).get("image_processor")
        found = nested if isinstance(nested, dict) else found
    names = ("min_patches", "max_patches")
    return {name: found[name] for name in names if found.get(name) is not None}
