"""Sizes of a LLaVA-HR model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxprune.errors import UserError
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.convnext.config import STEM, ConvNextConfig
from jaxprune.models.family import NO_IMAGE_TOKEN
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.ops.attention import limits, scratch_bytes
from jaxprune.ops.tiles import Tiling, VisualSize, one_tile
from jaxprune.ops.visual import Signal

_WHERE = "The LLaVA-HR config"
ADAPTERS = 3
SMALLEST = 336  # pixels along a side of what the fast tower sees, at least
MOST_PIXELS = 4096  # along a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaHrConfig:
    """LLaVA-HR (arXiv 2403.03003); the defaults are the 7B model.

    Attributes:
        vision_config: the fast tower, a CLIP whose positions are brought to the image's size.
        slow_config: the slow one.
        image_size: pixels along a side of the image, which the slow tower sees whole.
        adapters: whether the slow tower's map is added within the fast one, not at its end alone.
        pad: images are padded to squares rather than cropped.
        fast_name, slow_name: what config.json calls the towers.
    """

    family: ClassVar[str] = "llava_hr"

    vision_config: ClipVisionConfig = ClipVisionConfig()  # noqa: RUF009  frozen
    slow_config: ConvNextConfig = ConvNextConfig()  # noqa: RUF009  frozen
    text_config: LlamaConfig = LlamaConfig(vocab_size=32000)  # noqa: RUF009  frozen
    image_token_index: int = NO_IMAGE_TOKEN
    image_size: int = 1024
    adapters: bool = True
    pad: bool = True
    fast_name: str = "openai/clip-vit-large-patch14-336"
    slow_name: str = "convnext_large_mlp.clip_laion2b_ft_320"

    def __post_init__(self) -> None:
        size, layers = self.image_size, self.vision_config.num_hidden_layers
        if type(size) is not int or not self.slow_config.stride <= size <= MOST_PIXELS:
            raise UserError(
                f"{_WHERE} has input_image_size={size!r}; expected {self.slow_config.stride} to "
                f"{MOST_PIXELS}."
            )
        if layers % (ADAPTERS + 1):
            raise UserError(
                f"{_WHERE} has a CLIP of {layers} layers; {ADAPTERS} adapters need a multiple of "
                f"{ADAPTERS + 1}."
            )
        if self.vision_config.patch_size > self.fast_size:
            raise UserError(
                f"{_WHERE} has patches of {self.vision_config.patch_size} pixels in an image that "
                f"is reduced to {self.fast_size}."
            )
        fast, slow = self.grid, self.slow_grid
        if fast % slow and slow % fast:
            raise UserError(
                f"{_WHERE} has input_image_size={size}, whose maps of {fast} x {fast} and "
                f"{slow} x {slow} places do not fit each other."
            )

    @property
    def fast_size(self) -> int:
        """Pixels along a side of what the fast tower sees."""
        return max(int(self.image_size / 32 * 14), SMALLEST)

    @property
    def grid(self) -> int:
        """Visual tokens along a side."""
        return self.fast_size // self.vision_config.patch_size

    @property
    def slow_grid(self) -> int:
        """Places along a side of the slow tower's map."""
        side = self.image_size // STEM
        for _ in self.slow_config.widths[1:]:
            side //= 2
        return side

    @property
    def tower(self) -> "TwoTowers":
        return TwoTowers(self)

    @property
    def dtype(self) -> str:
        return self.text_config.dtype

    @property
    def fewest_tiles(self) -> int:
        return 1

    @property
    def fewest_tokens(self) -> int:
        return self.grid**2

    @property
    def position_axes(self) -> tuple[int, ...]:
        return ()

    @property
    def one_tile(self) -> bool:
        return True

    @property
    def most_tiles(self) -> int:
        return 1

    def most_tokens(self, tiles: int) -> int:
        """The visual tokens of an image before pruning."""
        del tiles
        return self.grid**2

    def tiling(self, size: VisualSize) -> Tiling:
        """How an image is seen: as one square, whatever its shape."""
        del size
        return one_tile(self.grid**2)

    def mesh_splits(self) -> dict[str, int]:
        """What a mesh's "model" axis has to divide."""
        return {
            **self.text_config.mesh_splits(),
            **self.vision_config.mesh_splits(),
            "MLP features of the slow tower": 4 * self.slow_config.widths[0],
        }

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "LlavaHrConfig":
        """From a config.json alone, which names published towers; see `original.py`.

        Raises:
            UserError: for a field or value that this port does not handle, or other towers.
        """
        from jaxprune.models.llava_hr.original import published_config

        return published_config(fields, {}, dtype=dtype)

    def to_hf(self) -> dict[str, Any]:
        """The publisher's config.json; transformers has no class of this family."""
        text = self.text_config.to_hf()
        return {
            **text,
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "mm_vision_tower": self.fast_name,
            "vision_tower_slow": self.slow_name,
            "is_multipath_encoder": True,
            "freeze_vision": not self.adapters,
            "input_image_size": self.image_size,
            "image_aspect_ratio": "pad" if self.pad else "square",
            "mm_hidden_size": self.vision_config.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
        }


@dataclasses.dataclass(frozen=True)
class TwoTowers:
    """Both towers as the rest of the library sees them: a `TowerSizes`."""

    config: LlavaHrConfig

    @property
    def tile_size(self) -> int:
        return self.config.image_size

    @property
    def tokens_per_tile(self) -> int:
        return self.config.grid**2

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid, self.config.grid

    @property
    def spare_cls(self) -> bool:
        return False

    def instead(self, signal: Signal) -> Signal:
        """What is given for a signal: without CLS, the attention that patches receive."""
        if signal.kind != "cls_attention":
            return signal
        return Signal("received_attention", layer=signal.layer)

    def check(self, signals: frozenset[Signal]) -> None:
        """Raise `UserError` unless the towers can give these signals, of the fast one's layers."""
        layers = self.config.vision_config.num_hidden_layers
        for signal in signals:
            signal.check(layers)
            if signal.kind == "cls_attention" and signal.heads == "sum":
                raise UserError(
                    "The method asks for the CLS token's attention, summed over heads, but the "
                    "towers of LLaVA-HR have no CLS token."
                )

    def macs(self, tiles: int) -> int:
        """Multiply-adds of both towers, their adapters and the last sum."""
        c, fast, slow = self.config, self.config.vision_config, self.config.slow_config
        n, m, D, S = c.grid**2, c.slow_grid**2, fast.hidden_size, slow.widths[-1]
        layer = n * D * (4 * D + 2 * fast.intermediate_size) + 2 * n**2 * D
        total = fast.num_hidden_layers * layer + n * fast.patch_size**2 * 3 * D
        total += slow.macs(c.image_size) + n * D * D + m * D * S
        if c.adapters:
            total += ADAPTERS * (m * S * (S + D) + n * D * (D + 7 * 7) + D * D)
        return tiles * total

    def bytes(self, tiles: int) -> tuple[int, int]:
        """About what encoding tiles takes beside the weights: what stays, and a layer at work."""
        c, fast, slow = self.config, self.config.vision_config, self.config.slow_config
        n, item = c.grid**2, np.dtype(c.dtype).itemsize
        stays = 4 * 3 * c.image_size**2 + 2 * n * fast.hidden_size * item
        stays += c.slow_grid**2 * slow.widths[-1] * item
        H = fast.num_attention_heads
        scratch = scratch_bytes(tiles, n, heads=H, key_value_heads=H, block=limits.FULL_BLOCK)
        # The first stage's map and its MLP's inner layer, the largest of the slow tower.
        first = (c.image_size // STEM) ** 2 * slow.widths[0] * 9 * item
        return tiles * stays, tiles * first + scratch


# ---- published sizes

XXL: dict[str, Any] = {
    "depths": (3, 4, 30, 3),
    "widths": (384, 768, 1536, 3072),
    "layer_norm_eps": 1e-5,
}


def _llava_hr_7b(*, dtype: str = "float32") -> LlavaHrConfig:
    """LLaVA-HR-7B: CLIP-L, ConvNeXt-L, Vicuna-7B."""
    return LlavaHrConfig(
        vision_config=ClipVisionConfig(dtype=dtype),
        slow_config=ConvNextConfig(dtype=dtype),
        text_config=LlamaConfig(vocab_size=32000, dtype=dtype),
    )


def _llava_hr_x_13b(*, dtype: str = "float32") -> LlavaHrConfig:
    """LLaVA-HR-X-13B: CLIP-L, ConvNeXt-XXL, Vicuna-13B."""
    text = LlavaConfig.llava_1_5_13b(dtype=dtype).text_config
    return LlavaHrConfig(
        vision_config=ClipVisionConfig(dtype=dtype),
        slow_config=ConvNextConfig(**XXL, dtype=dtype),
        text_config=dataclasses.replace(text, vocab_size=32000),
        slow_name="convnext_xxlarge.clip_laion2b_soup",
    )


PRESETS: dict[str, Callable[..., LlavaHrConfig]] = {
    "llava-hr-7b": _llava_hr_7b,
    "llava-hr-x-13b": _llava_hr_x_13b,
}
