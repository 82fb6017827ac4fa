"""InternVL as its publisher stores it: `internvl_chat`, with code of its own beside the weights.

The code is not run. What it decides is here: which class the decoder is, defaults that differ from
those of `transformers`, names.
"""

from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models.config import mapping, refuse_unknown, require, without_nulls
from jaxprune.models.family import NO_IMAGE_TOKEN
from jaxprune.models.internvit.config import InternVitConfig
from jaxprune.models.internvl.config import InternVLConfig, merged_side
from jaxprune.models.llama.config import LlamaConfig

_WHERE = "The publisher's InternVL config"
MODEL_TYPE = "internvl_chat"

# By the class that llm_config names: it decides, whatever model_type says.
_DECODERS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_INERT = {"template", "system_message", "use_backbone_lora", "use_llm_lora", "hidden_size"}


def published_config(fields: Mapping[str, Any], *, dtype: str) -> InternVLConfig:
    """The config of a directory in the publisher's form.

    Raises:
        UserError: for a field, value or decoder that this port does not handle.
    """
    fields = without_nulls(fields)
    handled = {"downsample_ratio", "dynamic_image_size", "force_image_size", "llm_config"}
    handled |= {"max_dynamic_patch", "min_dynamic_patch", "ps_version", "select_layer"}
    handled |= {"use_thumbnail", "vision_config", "text_config", "tie_word_embeddings"}
    refuse_unknown(fields, handled | _INERT, _WHERE)
    require(fields, "ps_version", ("v2",), _WHERE, "v1")
    for name in ("use_backbone_lora", "use_llm_lora"):
        if fields.get(name):
            raise UserError(
                f"{_WHERE} has {name}={fields[name]!r}: the weights are an adapter's beside those "
                "of a base; merge them first."
            )
    vision = InternVitConfig.from_publisher(mapping(fields, "vision_config", _WHERE), dtype=dtype)
    size = fields.get("force_image_size", vision.image_size)
    if size != vision.image_size:
        raise UserError(
            f"{_WHERE} has force_image_size={size!r}, but the vision tower takes "
            f"{vision.image_size}."
        )
    tiles = _tiles(fields)
    # Some repackagings carry a stale llm_config beside a right text_config.
    name = "text_config" if "text_config" in fields else "llm_config"
    return InternVLConfig(
        vision_config=vision,
        text_config=_decoder(mapping(fields, name, _WHERE), name, dtype=dtype),
        image_token_index=NO_IMAGE_TOKEN,
        vision_feature_layer=fields.get("select_layer", -1),
        merged=merged_side(fields.get("downsample_ratio", 0.5)),
        min_tiles=tiles[0],
        max_tiles=tiles[1],
    )


def _tiles(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """How many tiles an image is cut into."""
    if not fields.get("dynamic_image_size", False):
        return 1, 1
    most = fields.get("max_dynamic_patch", 6)
    if most != 1 and not fields.get("use_thumbnail", False):
        raise UserError(f"{_WHERE} has use_thumbnail=false with tiles; supported: true.")
    return fields.get("min_dynamic_patch", 1), most


def _decoder(fields: Mapping[str, Any], name: str, *, dtype: str) -> LlamaConfig:
    """The decoder's config."""
    classes = fields.get("architectures") or [None]
    cls = classes[0] if isinstance(classes, list) else classes
    if not isinstance(cls, str) or cls not in _DECODERS:
        raise UserError(
            f"{_WHERE} has {name} of architectures={classes!r}; supported: {', '.join(_DECODERS)}."
        )
    own = {**fields, "model_type": _DECODERS[cls], "tie_word_embeddings": False}
    if cls == "InternLM2ForCausalLM":
        own["attention_bias"] = own.pop("bias", True)
    return LlamaConfig.from_hf(own, dtype=dtype)
