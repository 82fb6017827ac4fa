"""Sizes of a CLIP vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.errors import UserError
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import (
    MOST_PATCHES,
    refuse_unknown,
    require,
    require_types,
    without_nulls,
)
from jaxprune.ops.attention import limits, scratch_bytes
from jaxprune.ops.visual import Signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
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
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"The CLIP vision config has hidden_size={self.hidden_size}, which its "
                f"{self.num_attention_heads} attention heads do not divide."
            )
        if self.patch_size > self.image_size:
            raise UserError(
                f"The CLIP vision config has patches of {self.patch_size} pixels in an image "
                f"of {self.image_size}."
            )
        if self.num_patches > MOST_PATCHES:
            raise UserError(
                f"The CLIP vision config has {self.num_patches:,} patches in an image; expected at "
                f"most {MOST_PATCHES:,}."
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    def mesh_splits(self) -> dict[str, int]:
        """What a mesh's "model" axis has to divide."""
        return {
            "attention heads of the vision tower": self.num_attention_heads,
            "MLP features of the vision tower": self.intermediate_size,
        }

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


@dataclasses.dataclass(frozen=True)
class ClipTower:
    """A CLIP tower as the rest of the library sees it: a `TowerSizes`.

    Attributes:
        config: its sizes.
        feature_layers: the hidden states that are read, 0 for the embeddings.
    """

    config: ClipVisionConfig
    feature_layers: tuple[int, ...]

    @property
    def tile_size(self) -> int:
        return self.config.image_size

    @property
    def tokens_per_tile(self) -> int:
        return self.config.num_patches

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid_size, self.config.grid_size

    def check(self, signals: frozenset[Signal]) -> None:
        """Raise `UserError` unless the tower can give these signals."""
        layers = self.config.num_hidden_layers
        for signal in signals:
            if not -layers <= signal.layer < layers:
                raise UserError(
                    f"The method asks for {signal}, but the CLIP tower has {layers} layers."
                )

    def macs(self, tiles: int) -> int:
        """Multiply-adds of the layers that are run for so many tiles, and of the embedding."""
        c = self.config
        run = max(index % (c.num_hidden_layers + 1) for index in self.feature_layers)
        n, D = c.num_patches + 1, c.hidden_size
        layer = n * D * (4 * D + 2 * c.intermediate_size) + 2 * n**2 * D
        return tiles * (run * layer + c.num_patches * c.patch_size**2 * 3 * D)

    def bytes(self, tiles: int) -> tuple[int, int]:
        """About what encoding tiles takes beside the weights: what stays, and a layer at work."""
        c = self.config
        slots, item = 1 + c.num_patches, np.dtype(c.dtype).itemsize
        pixels = 4 * 3 * c.image_size**2
        features = slots * c.hidden_size * (len(self.feature_layers) + 1) * item  # and keys
        # The residual, its norm and the heads' inputs and output; or the MLP's inner layer.
        width = 2 * c.hidden_size + max(4 * c.hidden_size, 2 * c.intermediate_size)
        H = c.num_attention_heads
        scratch = scratch_bytes(tiles, slots, heads=H, key_value_heads=H, block=limits.FULL_BLOCK)
        return tiles * (pixels + features), tiles * slots * width * item + scratch
