"""Sizes of a LLaVA-1.5 model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.errors import LARGEST, UserError
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.config import mapping, refuse_unknown, require, without_nulls
from jaxprune.models.llama.config import MODEL_TYPES, LlamaConfig
from jaxprune.models.vit.config import VitTower
from jaxprune.ops.tiles import Tiling, VisualSize, one_tile

_WHERE = "The LLaVA config"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """LLaVA-1.5 (arXiv 2310.03744); the defaults are the 7B model."""

    family: ClassVar[str] = "llava"

    vision_config: ClipVisionConfig = ClipVisionConfig()  # noqa: RUF009  frozen
    text_config: LlamaConfig = LlamaConfig()  # noqa: RUF009  frozen
    image_token_index: int = 32000
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True

    def __post_init__(self) -> None:
        index = self.image_token_index
        if type(index) is not int or abs(index) > LARGEST:
            raise UserError(
                f"{_WHERE} has image_token_index={self.image_token_index!r}; expected a whole "
                "number."
            )
        if not isinstance(self.multimodal_projector_bias, bool):
            raise UserError(
                f"{_WHERE} has multimodal_projector_bias={self.multimodal_projector_bias!r}; "
                "expected true or false."
            )
        layers, own = self.vision_config.num_hidden_layers, self.vision_feature_layer
        if not all(type(index) is int for index in (own if isinstance(own, tuple) else (own,))):
            raise UserError(
                f"{_WHERE} has vision_feature_layer={own!r}; expected a whole number or several."
            )
        for index in self.feature_layers:
            if not -layers - 1 <= index <= layers:
                raise UserError(
                    f"{_WHERE} has vision_feature_layer={self.vision_feature_layer!r}; the tower "
                    f"has {layers} layers, so expected {-layers - 1} to {layers}."
                )

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states of the tower whose concatenation is projected."""
        index = self.vision_feature_layer
        return index if isinstance(index, tuple) else (index,)

    @property
    def keep_cls(self) -> bool:
        """Whether the CLS token is a feature like any other (select strategy "full")."""
        return self.vision_feature_select_strategy == "full"

    @property
    def tower(self) -> VitTower:
        return VitTower(self.vision_config, self.feature_layers, spare_cls=not self.keep_cls)

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of the image that has the most of them, before pruning."""
        return self.most_tokens(self.most_tiles)

    @property
    def most_tiles(self) -> int:
        return 1

    @property
    def fewest_tiles(self) -> int:
        return 1

    @property
    def fewest_tokens(self) -> int:
        return self.most_tokens(1)

    @property
    def position_axes(self) -> tuple[int, ...]:
        sections = self.text_config.rope_sections
        return () if sections is None else (len(sections),)

    def most_tokens(self, tiles: int) -> int:
        """The most visual tokens that an image of up to so many tiles has before pruning."""
        del tiles
        return self.vision_config.num_patches + self.keep_cls

    @property
    def one_tile(self) -> bool:
        return True

    def tiling(self, size: VisualSize) -> Tiling:
        """How an image is seen: here as one square, whatever its shape."""
        del size
        return one_tile(self.vision_config.num_patches, cls=self.keep_cls)

    def mesh_splits(self) -> dict[str, int]:
        """What a mesh's "model" axis has to divide."""
        return {**self.text_config.mesh_splits(), **self.vision_config.mesh_splits()}

    @property
    def dtype(self) -> str:
        return self.text_config.dtype

    @classmethod
    def llava_1_5_7b(cls, *, dtype: str = "float32") -> "LlavaConfig":
        """LLaVA-1.5-7B: ViT-L/14 at 336 pixels, Vicuna-7B."""
        return cls(
            vision_config=ClipVisionConfig(dtype=dtype), text_config=LlamaConfig(dtype=dtype)
        )

    @classmethod
    def llava_1_5_13b(cls, *, dtype: str = "float32") -> "LlavaConfig":
        """LLaVA-1.5-13B: ViT-L/14 at 336 pixels, Vicuna-13B."""
        text_config = LlamaConfig(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            dtype=dtype,
        )
        return cls(vision_config=ClipVisionConfig(dtype=dtype), text_config=text_config)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "LlavaConfig":
        """From the dict of a `transformers` `LlavaConfig`; absent fields have its defaults.

        Raises:
            UserError: for a field, value or sub-model that this port does not handle.
        """
        return cls(**cls._read(fields, dtype=dtype))

    @classmethod
    def _read(cls, fields: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
        """The arguments of LLaVA's own fields; those of a subclass are let through."""
        fields = without_nulls(fields)
        handled = {field.name for field in dataclasses.fields(cls)}
        handled |= {"image_seq_length", "ignore_index", "image_token_id", "tie_word_embeddings"}
        refuse_unknown(fields, handled, _WHERE)
        select = require(
            fields, "vision_feature_select_strategy", ("default", "full"), _WHERE, "default"
        )
        act = require(fields, "projector_hidden_act", tuple(ACTIVATIONS), _WHERE, "gelu")

        # Without a vision config LLaVA's tower is ViT-L/14 at 336 pixels; a size that is left
        # out of a given one has CLIP's own default, as in transformers.
        vision = mapping(fields, "vision_config", _WHERE)
        if "vision_config" not in fields:
            vision = ClipVisionConfig().to_hf()
        clip = "clip_vision_model"
        require(vision, "model_type", (clip,), "The vision config", clip)
        text = mapping(fields, "text_config", _WHERE)
        require(text, "model_type", MODEL_TYPES, "The text config", "llama")
        if fields.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = fields["tie_word_embeddings"]

        layer = fields.get("vision_feature_layer", -2)
        indices = layer if isinstance(layer, list) else [layer]
        if not indices or not all(type(index) is int for index in indices):
            raise UserError(
                f"{_WHERE} has vision_feature_layer={layer!r}; expected a whole number or a "
                "list of them."
            )
        return {
            "vision_config": ClipVisionConfig.from_hf(vision, dtype=dtype),
            "text_config": LlamaConfig.from_hf(text, dtype=dtype),
            "image_token_index": fields.get(
                "image_token_id", fields.get("image_token_index", 32000)
            ),
            "vision_feature_layer": tuple(layer) if isinstance(layer, list) else layer,
            "vision_feature_select_strategy": select,
            "projector_hidden_act": act,
            "multimodal_projector_bias": fields.get("multimodal_projector_bias", True),
        }

    def to_hf(self) -> dict[str, Any]:
        """The dict that `LlavaConfig` of transformers 4 and 5 reads back."""
        layer = self.vision_feature_layer
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": self.family,
            "vision_config": self.vision_config.to_hf(),
            "text_config": self.text_config.to_hf(),
            "image_token_index": self.image_token_index,
            "image_seq_length": self.num_image_tokens,
            "vision_feature_layer": list(layer) if isinstance(layer, tuple) else layer,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "projector_hidden_act": self.projector_hidden_act,
            "multimodal_projector_bias": self.multimodal_projector_bias,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
        }
