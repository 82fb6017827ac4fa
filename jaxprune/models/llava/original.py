"""LLaVA's original format, of before `transformers` had the model: a LLaMA with `mm_*` fields.

The vision tower is in a directory of its own, and no token stands for an image.
"""

from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import read_json
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.config import require
from jaxprune.models.family import NO_IMAGE_TOKEN, ModelFiles
from jaxprune.models.llama.config import LlamaConfig

_WHERE = "The original-format LLaVA config"


def is_original(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's original format: a LLaMA with `mm_*` fields."""
    return "mm_vision_tower" in fields and "text_config" not in fields


def has_tiles(fields: Mapping[str, Any]) -> bool:
    """Whether a model in the original format sees images in tiles, as LLaVA-NeXT does."""
    return fields.get("image_aspect_ratio") == "anyres"


# Settings of the original code base that say how it was trained, or choose among code
# paths that all give LLaVA-1.5's forward pass.
INERT = {
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "image_aspect_ratio",
    "image_crop_resolution",
    "image_grid_pinpoints",
    "image_split_resolution",
    "mm_hidden_size",
    "mm_patch_merge_type",
    "mm_vision_tower",
    "mm_vision_tower_lr",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
    "mm_projector_lr",
    "mm_use_im_patch_token",
    "use_mm_proj",
}


def original_arguments(files: ModelFiles) -> dict[str, Any]:
    """The arguments of the config of a model in the original format.

    Without a directory for it the vision tower is ViT-L/14 at 336 pixels.

    Raises:
        UserError: for settings that neither LLaVA-1.5 nor LLaVA-NeXT has.
    """
    fields, dtype, vision_tower = files.fields, files.dtype, files.vision_tower
    if fields.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise UserError(
            f"{_WHERE} has mm_projector_type={fields.get('mm_projector_type')!r}; supported: "
            "'mlp2x_gelu', the projector of LLaVA-1.5 and LLaVA-NeXT."
        )
    if fields.get("mm_use_im_start_end"):
        raise UserError(
            f"{_WHERE} has mm_use_im_start_end=true, which LLaVA-1.5 and LLaVA-NeXT do not use."
        )
    kinds = ("llava", "llava_llama", "llava_mistral", "llama", "mistral")
    kind = require(fields, "model_type", kinds, _WHERE, "llava")
    ratios = (None, "square", "pad", "anyres")
    require(fields, "image_aspect_ratio", ratios, _WHERE, None)
    if vision_tower is None:
        vision = ClipVisionConfig(dtype=dtype)
        tower = str(fields["mm_vision_tower"])
        if "clip-vit-large-patch14-336" not in tower:
            raise UserError(
                f"{_WHERE} names the vision tower {tower!r}; pass its directory as vision_tower."
            )
    else:
        tower_fields = read_json(vision_tower / "config.json")
        tower_fields = tower_fields.get("vision_config", tower_fields)
        vision = ClipVisionConfig.from_hf(tower_fields, dtype=dtype)
    handled = {"mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"}
    handled |= {"mm_use_im_start_end"}
    text = {k: v for k, v in fields.items() if k not in handled | INERT}
    text["model_type"] = "mistral" if "mistral" in kind else "llama"
    select = {"patch": "default", "cls_patch": "full"}
    feature = fields.get("mm_vision_select_feature", "patch")
    if feature not in select:
        raise UserError(f"{_WHERE} has mm_vision_select_feature={feature!r}; supported: {select}.")
    return {
        "vision_config": vision,
        "text_config": LlamaConfig.from_hf(text, dtype=dtype),
        "image_token_index": NO_IMAGE_TOKEN,
        "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": select[feature],
    }
