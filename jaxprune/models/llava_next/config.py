"""Sizes of a LLaVA-NeXT model, and how it cuts an image into tiles."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxprune.errors import UserError
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.ops.tiles import NEWLINE, Tiling, VisualSize, map_of_tiles

_WHERE = "The LLaVA-NeXT config"
_DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

MOST_SIDES = 16  # of tiles that a tiling may have

Pinpoints = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaNextConfig(LlavaConfig):
    """LLaVA-NeXT, LLaVA-1.6; the defaults are the model with Vicuna-7B.

    Attributes:
        image_grid_pinpoints: (height, width) of the tilings to choose from, in pixels.
    """

    image_grid_pinpoints: Pinpoints = _DEFAULT_PINPOINTS

    family: ClassVar[str] = "llava_next"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_cls:
            raise UserError(
                f"{_WHERE} has vision_feature_select_strategy='full', with which tiles cannot "
                "be laid out; supported: 'default'."
            )
        side = self.vision_config.image_size
        for point in self.image_grid_pinpoints:
            if any(n < 1 or n % side or n > MOST_SIDES * side for n in point):
                raise UserError(
                    f"{_WHERE} has the tiling {list(point)} among its image_grid_pinpoints; "
                    f"expected multiples of the vision tower's {side} pixels, at most {MOST_SIDES} "
                    "times that."
                )

    @property
    def most_tiles(self) -> int:
        return max(tiling.tiles for tiling in self._fullest())

    @property
    def fewest_tiles(self) -> int:
        return min(tiling.tiles for tiling in self._fullest())

    @property
    def fewest_tokens(self) -> int:
        return self.vision_config.num_patches + 1  # the whole, and a line of something

    def most_tokens(self, tiles: int) -> int:
        """The most visual tokens that an image of up to so many tiles has before pruning."""
        fullest = self._fullest()
        tiles = max(tiles, self.fewest_tiles)
        return max(t.num_tokens for t in fullest if t.tiles <= tiles)

    def _fullest(self) -> list[Tiling]:
        """For each choice the tiling of an image that needs no padding there."""
        return [self.tiling(VisualSize(*point)) for point in self.image_grid_pinpoints]

    @property
    def one_tile(self) -> bool:
        return False

    def tiling(self, size: VisualSize) -> Tiling:
        """The tiles of an image, its padding and newlines."""
        c = self.vision_config
        return anyres(size.height, size.width, self.image_grid_pinpoints, c.image_size, c.grid_size)

    @classmethod
    def llava_1_6_vicuna_7b(cls, *, dtype: str = "float32") -> "LlavaNextConfig":
        """LLaVA-NeXT with Vicuna-7B."""
        return cls._preset(LlavaConfig.llava_1_5_7b(dtype=dtype).text_config, 32000)

    @classmethod
    def llava_1_6_vicuna_13b(cls, *, dtype: str = "float32") -> "LlavaNextConfig":
        """LLaVA-NeXT with Vicuna-13B."""
        return cls._preset(LlavaConfig.llava_1_5_13b(dtype=dtype).text_config, 32000)

    @classmethod
    def llava_1_6_mistral_7b(cls, *, dtype: str = "float32") -> "LlavaNextConfig":
        """LLaVA-NeXT with Mistral-7B-Instruct-v0.2."""
        text = LlamaConfig(
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            rope_theta=1e6,
            dtype=dtype,
        )
        return cls._preset(text, 32000)

    @classmethod
    def llava_1_6_34b(cls, *, dtype: str = "float32") -> "LlavaNextConfig":
        """LLaVA-NeXT with Nous-Hermes-2-Yi-34B."""
        text = LlamaConfig(
            vocab_size=64064,
            hidden_size=7168,
            intermediate_size=20480,
            num_hidden_layers=60,
            num_attention_heads=56,
            num_key_value_heads=8,
            rope_theta=5e6,
            dtype=dtype,
        )
        return cls._preset(text, 64000)

    @classmethod
    def llava_next_llama3_8b(cls, *, dtype: str = "float32") -> "LlavaNextConfig":
        """LLaVA-NeXT with Llama-3-8B-Instruct."""
        text = LlamaConfig(
            vocab_size=128320,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rope_theta=5e5,
            dtype=dtype,
        )
        return cls._preset(text, 128256)

    @classmethod
    def _preset(cls, text: LlamaConfig, image_token: int) -> "LlavaNextConfig":
        vision = ClipVisionConfig(dtype=text.dtype)
        return cls(vision_config=vision, text_config=text, image_token_index=image_token)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "LlavaNextConfig":
        """From the dict of a `transformers` `LlavaNextConfig`; absent fields have its defaults.

        Raises:
            UserError: for a field, value or sub-model that this port does not handle.
        """
        points = fields.get("image_grid_pinpoints")
        points = _DEFAULT_PINPOINTS if points is None else pinpoints(points)
        # A note of releases before 4.45 about the projector's place.
        rest = {
            name: value for name, value in fields.items() if name != "use_image_newline_parameter"
        }
        return cls(**cls._read(rest, dtype=dtype), image_grid_pinpoints=points)

    def to_hf(self) -> dict[str, Any]:
        """The dict that `LlavaNextConfig` of transformers 4 and 5 reads back."""
        return {
            **super().to_hf(),
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_seq_length": self.vision_config.num_patches,
            "image_grid_pinpoints": [list(point) for point in self.image_grid_pinpoints],
        }


def pinpoints(points: Any) -> Pinpoints:
    """The tilings of a config.json, pairs as they stand there.

    Raises:
        UserError: for anything but a list of pairs.
    """
    pairs = isinstance(points, list) and all(
        isinstance(point, list | tuple) and len(point) == 2 and all(type(n) is int for n in point)
        for point in points
    )
    if not pairs or not points:
        raise UserError(
            f"{_WHERE} has image_grid_pinpoints={points!r}; expected a list of [height, width]."
        )
    return tuple((point[0], point[1]) for point in points)


# ---- how an image is cut


def best_resolution(
    height: int, width: int, pinpoints: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The tiling that shows most of an image's pixels, and wastes least among such.

    Raises:
        UserError: for an image so thin that every tiling would scale it to nothing.
    """

    def shown_and_waste(point: tuple[int, int]) -> tuple[int, int]:
        scale = min(point[1] / width, point[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - point[0] * point[1]

    best = max(pinpoints, key=shown_and_waste)  # the first of equals
    if not shown_and_waste(best)[0]:
        raise UserError(
            f"An image of {width} x {height} pixels is too thin: scaled into any of the tilings "
            "it has no pixel left. Crop it."
        )
    return best


@functools.lru_cache(maxsize=1024)
def anyres(height: int, width: int, pinpoints: Pinpoints, side: int, grid: int) -> Tiling:
    """The whole image as one tile, then the tiles of a map of it, cut to its aspect ratio.

    Args:
        height, width: the image's pixels.
        pinpoints: (height, width) of the tilings to choose from.
        side: pixels along a side of a tile.
        grid: patches along a side of a tile.

    Returns:
        The patches of the whole image, and of every row of the map that is not padding,
        with a newline after each.
    """
    tall, wide = (n // side for n in best_resolution(height, width, pinpoints))
    patch = map_of_tiles(tall, wide, grid, first=1)
    patch = patch[unpadded(height, width, *patch.shape)]
    rows = len(patch)
    lines = np.concatenate([patch, np.full((rows, 1), NEWLINE)], axis=1)
    row = np.broadcast_to(1 + np.arange(rows)[:, None], lines.shape)
    whole = np.arange(grid**2)
    return Tiling(
        tiles=1 + tall * wide,
        slots=np.concatenate([whole, lines.ravel()]).astype(np.int32),
        rows=np.concatenate([np.zeros_like(whole), row.ravel()]).astype(np.int32),
        maps=(map_of_tiles(1, 1, grid), patch),
    )


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[slice, slice]:
    """The part of a map of `rows` x `columns` that an image fills, as transformers rounds it.

    It takes off the same on both sides, so an odd rest of the padding stays.
    """
    if width / height > columns / rows:
        filled = int(round(height * (columns / width), 7))
        margin = (rows - filled) // 2
        return slice(margin, rows - margin), slice(None)
    filled = int(round(width * (rows / height), 7))
    margin = (columns - filled) // 2
    return slice(None), slice(margin, columns - margin)
