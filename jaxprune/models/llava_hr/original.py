"""The config of a LLaVA-HR: a LLaMA's config.json with names of towers, and the stored shapes.

The towers' sizes are nowhere but in their tensors. A name that is a published tower's has to fit.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxprune.errors import UserError
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.config import require
from jaxprune.models.convnext.config import ConvNextConfig
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.original import INERT
from jaxprune.models.llava_hr.config import XXL, LlavaHrConfig
from jaxprune.models.llava_hr.weights import FAST, SLOW
from jaxprune.models.vit.shapes import clip_sizes, number_of
from jaxprune.models.weights import Shape

Sizes = TypeVar("Sizes")

_WHERE = "The LLaVA-HR config"
_HANDLED = {
    "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature",
    "mm_use_im_start_end", "vision_tower_slow", "is_multipath_encoder", "freeze_vision",
    "input_image_size", "image_size",
}  # fmt: skip
_CLIP_L = "clip-vit-large-patch14-336"
_PUBLISHED: dict[str, dict[str, Any]] = {"convnext_large_mlp": {}, "convnext_xxlarge": XXL}


def published_config(
    fields: Mapping[str, Any], shapes: Mapping[str, Shape], *, dtype: str
) -> LlavaHrConfig:
    """The config of a directory.

    Args:
        fields: its config.json.
        shapes: the stored tensors' by key; without any the towers are those that are named.
        dtype: of the parameters.

    Raises:
        UserError: for a field or value that this port does not handle, and for towers that are
            not those that are named.
    """
    require(fields, "mm_projector_type", ("mlp2x_gelu",), _WHERE, "linear")
    require(fields, "mm_use_im_start_end", (False, None), _WHERE, False)
    require(fields, "model_type", ("llava", "llava_llama", "llama"), _WHERE, "llava")
    fast_name, slow_name = (
        require_name(fields, name) for name in ("mm_vision_tower", "vision_tower_slow")
    )
    text = {k: v for k, v in fields.items() if k not in _HANDLED | INERT}
    text["model_type"] = "llama"
    adapters = any(".align_stages_latent." in key for key in shapes)
    frozen = fields.get("freeze_vision")
    if not shapes or (frozen is False and not adapters):  # then they are missing, not absent
        adapters = not frozen
    return LlavaHrConfig(
        vision_config=_fast(fast_name, shapes, dtype),
        slow_config=_slow(slow_name, shapes, dtype),
        text_config=LlamaConfig.from_hf(text, dtype=dtype),
        image_size=fields.get("input_image_size") or 1024,
        adapters=adapters,
        pad=fields.get("image_aspect_ratio") == "pad",
        fast_name=fast_name,
        slow_name=slow_name,
    )


def require_name(fields: Mapping[str, Any], name: str) -> str:
    """The name of a tower."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise UserError(f"{_WHERE} has {name}={value!r}; expected the name of a tower.")
    return value


def _fast(name: str, shapes: Mapping[str, Shape], dtype: str) -> ClipVisionConfig:
    """The CLIP's sizes."""
    published = ClipVisionConfig(dtype=dtype)
    own = {key.removeprefix(FAST): shape for key, shape in shapes.items() if key.startswith(FAST)}
    if not own:  # told as missing later
        return _known(name, _CLIP_L in name, published)
    found = ClipVisionConfig(**clip_sizes(own), dtype=dtype)
    return _checked(name, _CLIP_L in name, published, found)


def _slow(name: str, shapes: Mapping[str, Shape], dtype: str) -> ConvNextConfig:
    """The ConvNeXt's sizes; how its norms round is known by its name alone."""
    kind = next((kind for kind in _PUBLISHED if kind in name), None)
    published = ConvNextConfig(**_PUBLISHED.get(kind or "", {}), dtype=dtype)
    own = {key.removeprefix(SLOW): shape for key, shape in shapes.items() if key.startswith(SLOW)}
    stages = number_of(own, r"stages\.(\d+)\.")
    if not stages:
        return _known(name, kind is not None, published)
    widths = [own.get(f"stages.{s}.blocks.0.norm.weight", (0,))[0] for s in range(stages)]
    found = ConvNextConfig(
        depths=tuple(number_of(own, rf"stages\.{s}\.blocks\.(\d+)\.") for s in range(stages)),
        widths=tuple(widths),
        layer_norm_eps=published.layer_norm_eps,
        dtype=dtype,
    )
    return _checked(name, kind is not None, published, found)


def _known(name: str, known: bool, published: Sizes) -> Sizes:
    if not known:
        raise UserError(f"{_WHERE} names the tower {name!r}, whose sizes are not known here.")
    return published


def _checked(name: str, known: bool, published: Sizes, found: Sizes) -> Sizes:
    if known and found != published:
        raise UserError(
            f"{_WHERE} names the tower {name!r}, but the stored one has other sizes ({found}); "
            "check that the weights are of this model."
        )
    return found
