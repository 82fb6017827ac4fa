"""Video-LLaVA as its publisher stores it: a LLaMA's config.json that names two towers.

Their sizes are nowhere but in their tensors, and how their neurons fire is known of the name.
"""

from collections.abc import Mapping
from typing import Any

from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.config import require
from jaxprune.models.family import NO_IMAGE_TOKEN, ModelFiles
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.original import INERT
from jaxprune.models.video_llava.config import VideoLlavaConfig
from jaxprune.models.video_llava.weights import VIDEO_TOWER
from jaxprune.models.vit.shapes import clip_sizes

_WHERE = "The publisher's Video-LLaVA config"
_HANDLED = {
    "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_image_tower",
    "mm_video_tower", "mm_use_im_start_end", "image_aspect_ratio", "X",
}  # fmt: skip
_SELECT = {"patch": "default", "cls_patch": "full"}


def is_published(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is the publisher's."""
    return bool(fields.get("mm_video_tower")) and "text_config" not in fields


def published_config(files: ModelFiles) -> VideoLlavaConfig:
    """The config of a directory in the publisher's form.

    Raises:
        UserError: for a field or value that this port does not handle.
    """
    fields, dtype = files.fields, files.dtype
    require(fields, "mm_projector_type", ("mlp2x_gelu",), _WHERE, "linear")
    require(fields, "mm_use_im_start_end", (False, None), _WHERE, False)
    require(fields, "model_type", ("llava", "llava_llama", "llama"), _WHERE, "llava")
    feature = require(fields, "mm_vision_select_feature", tuple(_SELECT), _WHERE, "patch")
    shapes = {
        key.removeprefix(VIDEO_TOWER): shape
        for key, shape in files.shapes().items()
        if key.startswith(VIDEO_TOWER)
    }
    text = {k: v for k, v in fields.items() if k not in _HANDLED | INERT}
    text["model_type"] = "llama"
    published: dict[str, Any] = {"image_size": 224}
    sizes = clip_sizes(shapes) if shapes else published
    return VideoLlavaConfig(
        vision_config=ClipVisionConfig(**sizes, hidden_act="gelu", dtype=dtype),
        text_config=LlamaConfig.from_hf(text, dtype=dtype),
        image_token_index=NO_IMAGE_TOKEN,
        video_token_index=NO_IMAGE_TOKEN,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_SELECT[feature],
        temporal_attention=True,
    )
