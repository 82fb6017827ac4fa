"""Sizes of a CLIP's towers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import (
    MOST_PATCHES,
    mapping,
    refuse_unknown,
    require,
    require_types,
    without_nulls,
)
from jaxprune.models.vit.config import VitSizes, check_heads, check_sizes


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """A CLIP's text tower, and the step from both towers to their common space.

    The defaults are those of ViT-L/14 at 336 pixels.

    Attributes:
        projection_dim: width of the common space.
        vision_width: of the vision tower that belongs to it.
        eos_token_id: the token whose state stands for a text. 2, which old releases wrote
            everywhere, stands for the token of the largest id.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    projection_dim: int = 768
    vision_width: int = 1024
    eos_token_id: int = 49407
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vision_layer_norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_types(self, _TEXT)
        check_heads(self.hidden_size, self.num_attention_heads, _TEXT)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "ClipTextConfig":
        """From the dict of a `transformers` `CLIPConfig`; absent fields have its defaults.

        Raises:
            UserError: for another kind of model, or a value that this port does not handle.
        """
        kind = fields.get("model_type")
        if kind != "clip":
            raise UserError(
                f"text_tower names a model of type {kind!r}; expected a whole CLIP, with both of "
                "its towers, such as openai/clip-vit-large-patch14-336."
            )

        def of(part: str) -> dict[str, Any]:
            # What old releases wrote beside a part's config goes before it.
            own, before = (mapping(fields, name, _TEXT) for name in (part, f"{part}_dict"))
            return without_nulls({**own, **without_nulls(before)})

        text, vision = of("text_config"), of("vision_config")
        require(text, "hidden_act", tuple(ACTIVATIONS), _TEXT, "quick_gelu")
        defaults = {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
        }
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: x for name, x in text.items() if name in names}
        return cls(
            **{
                **defaults,
                **given,
                "projection_dim": fields.get("projection_dim", 512),
                "vision_width": vision.get("hidden_size", 768),
                "vision_layer_norm_eps": vision.get("layer_norm_eps", 1e-5),
                "dtype": dtype,
            }
        )


_TEXT = "The CLIP text config"
