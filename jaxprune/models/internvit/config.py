"""Sizes of an InternViT."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import (
    MOST_PATCHES,
    refuse_unknown,
    require,
    require_types,
    without_nulls,
)
from jaxprune.models.vit.config import VitSizes, check_sizes

_WHERE = "The InternViT config"
NORMS = ("layer_norm", "rms_norm")

# The publisher's names, and transformers' for the same.
_RENAMED = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
# The defaults of the publisher's class, InternViT-6B.
_PUBLISHER = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVitConfig(VitSizes):
    """An InternViT; the defaults are those of `transformers`, InternViT-300M without biases."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    norm_type: str = "layer_norm"
    attention_bias: bool = False
    use_qk_norm: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_types(self, _WHERE)
        check_sizes(self, _WHERE, most_patches=MOST_PATCHES)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "InternVitConfig":
        """From the dict of a `transformers` `InternVLVisionConfig`.

        Raises:
            UserError: for a field or value that this port does not handle.
        """
        fields = without_nulls(fields)
        own = {field.name for field in dataclasses.fields(cls)} - {"dtype"}
        # How LayerScale begins, and what the pooled output would be.
        handled = {"num_channels", "layer_scale_init_value", "use_mean_pooling"}
        handled |= {"use_absolute_position_embeddings", "projection_dropout"}
        refuse_unknown(fields, own | handled, _WHERE)
        require(fields, "model_type", ("internvl_vision",), _WHERE, "internvl_vision")
        require(fields, "num_channels", (3,), _WHERE, 3)
        require(fields, "hidden_act", tuple(ACTIVATIONS), _WHERE, "gelu")
        require(fields, "norm_type", NORMS, _WHERE, "layer_norm")
        require(fields, "use_absolute_position_embeddings", (True,), _WHERE, True)
        require(fields, "use_mean_pooling", (True,), _WHERE, True)  # else there is a last norm
        given = {name: fields[name] for name in own if name in fields}
        for name in ("image_size", "patch_size"):
            if name in given:
                given[name] = _side(name, given[name])
        return cls(**given, dtype=dtype)

    @classmethod
    def from_publisher(
        cls, fields: Mapping[str, Any], *, dtype: str = "float32"
    ) -> "InternVitConfig":
        """From the publisher's `vision_config`, whose class has other names and defaults.

        Raises:
            UserError: for a field or value that this port does not handle.
        """
        fields = without_nulls(fields)
        require(fields, "model_type", ("intern_vit_6b",), _WHERE, "intern_vit_6b")
        renamed = {_RENAMED.get(name, name): x for name, x in fields.items()}
        for name in ("drop_path_rate", "model_type"):  # of training
            renamed.pop(name, None)
        return cls.from_hf({**_PUBLISHER, **renamed}, dtype=dtype)

    def to_hf(self) -> dict[str, Any]:
        """The dict that `InternVLVisionConfig` reads back."""
        fields = dataclasses.asdict(self)
        del fields["dtype"]
        sides = {name: [fields[name]] * 2 for name in ("image_size", "patch_size")}
        return {"model_type": "internvl_vision", "num_channels": 3, **fields, **sides}


def _side(name: str, value: Any) -> Any:
    """One side of what is said of two."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise UserError(f"{_WHERE} has {name}={value!r}; supported: squares.")
    return value[0]
