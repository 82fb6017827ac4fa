"""Sizes of a CLIP vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import (
    MOST_PATCHES,
    refuse_unknown,
    require,
    require_types,
    without_nulls,
)
from jaxprune.models.vit.config import VitSizes, check_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(VitSizes):
    """A CLIP ViT; the defaults are ViT-L/14 at 336 pixels, the tower of LLaVA-1.5."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_types(self, "The CLIP vision config")
        check_sizes(self, "The CLIP vision config", most_patches=MOST_PATCHES)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "ClipVisionConfig":
        """From the dict of a `CLIPVisionConfig`; absent fields have that class's defaults.

        Raises:
            UserError: for a field or value that this port does not handle.
        """
        where, fields = "The CLIP vision config", without_nulls(fields)
        handled = {field.name for field in dataclasses.fields(cls)} | {"num_channels"}
        # Old releases wrote the flag into every config; a tower has no words to tie.
        refuse_unknown(fields, handled | {"tie_word_embeddings"}, where)
        require(fields, "num_channels", (3,), where, 3)
        require(fields, "hidden_act", tuple(ACTIVATIONS), where, "quick_gelu")
        # transformers' defaults, which it leaves out of the config.json it writes (ViT-B/32).
        defaults = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        }
        names = handled - {"num_channels", "dtype"}
        given = {name: fields[name] for name in names if name in fields}
        return cls(**{**defaults, **given, "dtype": dtype})

    def to_hf(self) -> dict[str, Any]:
        """The dict that `CLIPVisionConfig` reads back."""
        fields = dataclasses.asdict(self)
        del fields["dtype"]
        return {"model_type": "clip_vision_model", "num_channels": 3, **fields}
