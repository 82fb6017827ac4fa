"""Sizes of an InternVL model, and how it cuts an image into tiles."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxprune.errors import LARGEST, UserError, is_number
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import mapping, refuse_unknown, require, without_nulls
from jaxprune.models.internvit.config import InternVitConfig
from jaxprune.models.llama.config import MODEL_TYPES, LlamaConfig, RopeScaling
from jaxprune.models.vit.config import VitTower
from jaxprune.ops.tiles import Tiling, VisualSize, map_of_tiles

_WHERE = "The InternVL config"
MOST_TILES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVLConfig:
    """InternVL2, 2.5, 3 or 3.5 with a dense decoder; the defaults are InternVL2-8B.

    Attributes:
        vision_feature_layer: the hidden state of the tower that is projected; -1 is the last.
        merged: patches along a side of the square that makes up a visual token.
        min_tiles, max_tiles: how many tiles an image is cut into, its thumbnail apart.
    """

    family: ClassVar[str] = "internvl"

    vision_config: InternVitConfig = InternVitConfig(attention_bias=True)  # noqa: RUF009  frozen
    text_config: LlamaConfig = LlamaConfig(  # noqa: RUF009  frozen
        vocab_size=92553,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling=RopeScaling(kind="dynamic", factor=2.0),
    )
    image_token_index: int = 92546
    vision_feature_layer: int = -1
    merged: int = 2
    projector_hidden_act: str = "gelu"
    min_tiles: int = 1
    max_tiles: int = 12

    def __post_init__(self) -> None:
        index = self.image_token_index
        if type(index) is not int or abs(index) > LARGEST:
            raise UserError(f"{_WHERE} has image_token_id={index!r}; expected a whole number.")
        layers, layer = self.vision_config.num_hidden_layers, self.vision_feature_layer
        if type(layer) is not int or not -layers - 1 <= layer <= layers:
            raise UserError(
                f"{_WHERE} has vision_feature_layer={layer!r}; the tower has {layers} layers, so "
                f"expected {-layers - 1} to {layers}."
            )
        grid = self.vision_config.grid_size
        if grid % self.merged:
            raise UserError(
                f"{_WHERE} merges squares of {self.merged} patches, which do not divide the "
                f"{grid} along a side of a tile."
            )
        fewest, most = self.min_tiles, self.max_tiles
        if not (type(fewest) is type(most) is int and 1 <= fewest <= most <= MOST_TILES):
            raise UserError(
                f"{_WHERE} cuts images into {fewest!r} to {most!r} tiles; expected numbers from 1 "
                f"to {MOST_TILES}."
            )

    @property
    def tower(self) -> VitTower:
        return VitTower(self.vision_config, (self.vision_feature_layer,), self.merged)

    @property
    def dtype(self) -> str:
        return self.text_config.dtype

    @property
    def position_axes(self) -> tuple[int, ...]:
        return ()

    @property
    def one_tile(self) -> bool:
        return self.max_tiles == 1

    @property
    def most_tiles(self) -> int:
        return self._with_thumbnail(self.max_tiles)

    def _with_thumbnail(self, tiles: int) -> int:
        return tiles + 1 if tiles > 1 else tiles

    @property
    def fewest_tiles(self) -> int:
        return 1  # a video's frame, whatever images have

    @property
    def fewest_tokens(self) -> int:
        return self.tower.tokens_per_tile

    def most_tokens(self, tiles: int) -> int:
        """The most visual tokens that an image of up to so many tiles has before pruning."""
        return min(tiles, self.most_tiles) * self.tower.tokens_per_tile

    def tiling(self, size: VisualSize) -> Tiling:
        """The tiles of an image row by row, and behind several of them the whole as one more."""
        most = self.max_tiles if size.most_tiles is None else size.most_tiles
        wide, tall = best_grid(size.width, size.height, self.vision_config.image_size,
                               min(self.min_tiles, most), most)  # fmt: skip
        tiles = self._with_thumbnail(tall * wide)
        tokens = np.arange(tiles * self.tower.tokens_per_tile, dtype=np.int32)
        grid, _ = self.tower.grid
        whole = map_of_tiles(1, 1, grid, first=tall * wide)
        maps = (whole, map_of_tiles(tall, wide, grid)) if tiles > 1 else ()
        return Tiling(tiles, tokens, np.zeros_like(tokens), maps=maps)

    def mesh_splits(self) -> dict[str, int]:
        """What a mesh's "model" axis has to divide."""
        return {**self.text_config.mesh_splits(), **self.vision_config.mesh_splits()}

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "InternVLConfig":
        """From the dict of a `transformers` `InternVLConfig`.

        Its image processor's `min_patches` and `max_patches`, which are called tiles here, may
        stand among the fields.

        Raises:
            UserError: for a field, value or sub-model that this port does not handle.
        """
        fields = without_nulls(fields)
        handled = {"vision_config", "text_config", "image_token_id", "image_token_index"}
        handled |= {"image_seq_length", "downsample_ratio", "projector_hidden_act"}
        handled |= {"vision_feature_layer", "vision_feature_select_strategy"}
        handled |= {"tie_word_embeddings", "min_patches", "max_patches"}
        refuse_unknown(fields, handled, _WHERE)
        strategy = "vision_feature_select_strategy"
        require(fields, strategy, ("default",), _WHERE, "default")
        act = require(fields, "projector_hidden_act", tuple(ACTIVATIONS), _WHERE, "gelu")
        text = mapping(fields, "text_config", _WHERE)
        require(text, "model_type", MODEL_TYPES, "The text config", "qwen2")
        # The class ties words unless the whole model's config says otherwise.
        text = {"model_type": "qwen2", **text}
        text["tie_word_embeddings"] = fields.get("tie_word_embeddings", True)
        layer = fields.get("vision_feature_layer", -1)
        return cls(
            vision_config=InternVitConfig.from_hf(
                mapping(fields, "vision_config", _WHERE), dtype=dtype
            ),
            text_config=LlamaConfig.from_hf(text, dtype=dtype),
            image_token_index=fields.get("image_token_id", fields.get("image_token_index", 151667)),
            vision_feature_layer=layer,
            merged=merged_side(fields.get("downsample_ratio", 0.5)),
            projector_hidden_act=act,
            min_tiles=fields.get("min_patches", 1),
            max_tiles=fields.get("max_patches", 12),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict that `InternVLConfig` reads back."""
        return {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": self.family,
            "vision_config": self.vision_config.to_hf(),
            "text_config": self.text_config.to_hf(),
            "image_token_id": self.image_token_index,
            "image_seq_length": self.tower.tokens_per_tile,
            "downsample_ratio": 1 / self.merged,
            "projector_hidden_act": self.projector_hidden_act,
            "vision_feature_layer": self.vision_feature_layer,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
        }


def merged_side(ratio: Any) -> int:
    """Patches along a side of a visual token's square, as the publisher rounds it."""
    if not is_number(ratio) or not 1 / 64 <= ratio <= 1:
        raise UserError(f"{_WHERE} has downsample_ratio={ratio!r}; expected 1, 0.5, 0.25 ...")
    return int(1 / ratio)


@functools.lru_cache(maxsize=4096)
def best_grid(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows of the tiling whose aspect ratio is nearest to an image's.

    Of two that are equally near the larger one, if the image has more than half of its pixels.

    Args:
        width, height: the image's pixels.
        side: pixels along a side of a tile.
        fewest, most: how many tiles there may be.
    """
    ratio, best, nearest = width / height, (1, 1), float("inf")
    for columns, rows in _grids(fewest, most):
        away = abs(ratio - columns / rows)
        larger = away == nearest and width * height > 0.5 * side * side * columns * rows
        if away < nearest or larger:
            best, nearest = (columns, rows), away
    return best


@functools.cache
def _grids(fewest: int, most: int) -> list[tuple[int, int]]:
    every = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1)]
    return sorted((x for x in every if fewest <= x[0] * x[1] <= most), key=lambda x: x[0] * x[1])


# ---- published sizes

_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
_PHI3_FACTORS = 48  # of each list of Phi-3's, half of its heads' width


def _text(
    model_type: str, widths: tuple[int, int], layers: int, heads: tuple[int, int], **others: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": widths[0],
        "intermediate_size": widths[1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": widths[0] // heads[0],
        **others,
    }


def _qwen2(
    widths: tuple[int, int], layers: int, heads: tuple[int, int], **others: Any
) -> dict[str, Any]:
    own = {"attention_bias": True, "rope_theta": 1e6, **_QWEN, **others}
    return _text("qwen2", widths, layers, heads, **own)


def _qwen3(
    widths: tuple[int, int], layers: int, heads: tuple[int, int], **others: Any
) -> dict[str, Any]:
    own = {**_QWEN, "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 40960}
    return _text("qwen3", widths, layers, heads, **{**own, **others})


_INTERNLM2: dict[str, Any] = {
    "vocab_size": 92553,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_scaling": RopeScaling(kind="dynamic", factor=2.0),
}
# Long lists of one: the published factors are in the models' own files, and no size depends on
# them. They cannot be run with these.
_PHI3: dict[str, Any] = {
    "vocab_size": 32020,
    "max_position_embeddings": 131072,
    "rope_scaling": RopeScaling(
        kind="longrope",
        factor=32.0,
        original_max_position_embeddings=4096,
        short_factor=(1.0,) * _PHI3_FACTORS,
        long_factor=(1.0,) * _PHI3_FACTORS,
        attention_factor=1.1902380714238083,
    ),
}
_VIT_300M: dict[str, Any] = {"attention_bias": True}
_VIT_6B: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "norm_type": "rms_norm",
    "use_qk_norm": True,
}

_INTERNLM2_2B = _text("llama", (2048, 8192), 24, (16, 8), **_INTERNLM2)
_INTERNLM2_8B = _text("llama", (4096, 14336), 32, (32, 8), **_INTERNLM2)
_QWEN_05B, _QWEN_3B = ((896, 4864), 24, (14, 2)), ((2048, 11008), 36, (16, 2))

# Vision tower, decoder, the id of <IMG_CONTEXT>.
_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "internvl2-1b": (_VIT_300M, _qwen2(*_QWEN_05B, vocab_size=151655), 151648),
    "internvl2-2b": (_VIT_300M, _INTERNLM2_2B, 92546),
    "internvl2-4b": (_VIT_300M, _text("phi3", (3072, 8192), 32, (32, 32), **_PHI3), 32013),
    "internvl2-8b": (_VIT_300M, _INTERNLM2_8B, 92546),
    "internvl2.5-1b": (_VIT_300M, _qwen2(*_QWEN_05B, vocab_size=151674), 151667),
    "internvl2.5-2b": (_VIT_300M, _INTERNLM2_2B, 92546),
    "internvl2.5-4b": (_VIT_300M, _qwen2(*_QWEN_3B, vocab_size=151674), 151667),
    "internvl2.5-8b": (_VIT_300M, _INTERNLM2_8B, 92546),
    "internvl3-1b": (_VIT_300M, _qwen2(*_QWEN_05B, vocab_size=151674), 151667),
    "internvl3-2b": (_VIT_300M, _qwen2((1536, 8960), 28, (12, 2), vocab_size=151674), 151667),
    "internvl3-8b": (_VIT_300M, _qwen2((3584, 18944), 28, (28, 4), vocab_size=151674), 151667),
    "internvl3-14b": (_VIT_300M, _qwen2((5120, 13824), 48, (40, 8), vocab_size=151674), 151667),
    "internvl3-38b": (_VIT_6B, _qwen2((5120, 27648), 64, (40, 8), vocab_size=151674), 151667),
    "internvl3-78b": (_VIT_6B, _qwen2((8192, 29568), 80, (64, 8), vocab_size=151674), 151667),
    "internvl3.5-1b": (_VIT_300M, _qwen3((1024, 3072), 28, (16, 8)), 151671),
    "internvl3.5-2b": (_VIT_300M, _qwen3((2048, 6144), 28, (16, 8)), 151671),
    "internvl3.5-4b": (_VIT_300M, _qwen3((2560, 9728), 36, (32, 8)), 151671),
    "internvl3.5-8b": (_VIT_300M, _qwen3((4096, 12288), 36, (32, 8)), 151671),
    "internvl3.5-14b": (_VIT_300M, _qwen3((5120, 17408), 40, (40, 8)), 151671),
    "internvl3.5-38b": (_VIT_6B, _qwen3((5120, 25600), 64, (64, 8)), 151671),
}


def _preset(name: str, *, dtype: str = "float32") -> InternVLConfig:
    vision, text, image_token = _SIZES[name]
    return InternVLConfig(
        vision_config=InternVitConfig(**vision, dtype=dtype),
        text_config=LlamaConfig(**text, dtype=dtype),
        image_token_index=image_token,
    )


PRESETS: dict[str, Callable[..., InternVLConfig]] = {
    name: functools.partial(_preset, name) for name in _SIZES
}
