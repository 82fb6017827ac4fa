"""A vision transformer's sizes, as the rest of the library asks for them."""

import dataclasses

import numpy as np

from jaxprune.errors import UserError
from jaxprune.ops.attention import limits, scratch_bytes
from jaxprune.ops.visual import Signal


class VitSizes:
    """What the configs of towers over patches have in common; they are dataclasses of these."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    dtype: str

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


@dataclasses.dataclass(frozen=True)
class VitTower:
    """A tower over CLS and patches: a `TowerSizes`.

    Attributes:
        config: its sizes.
        feature_layers: the hidden states that are read, 0 for the embeddings.
        merged: patches along a side of the square that makes up a visual token.
        spare_cls: whether every tile has a CLS token that could be a visual token and is none.
    """

    config: VitSizes
    feature_layers: tuple[int, ...]
    merged: int = 1
    spare_cls: bool = False

    @property
    def tile_size(self) -> int:
        return self.config.image_size

    @property
    def tokens_per_tile(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.grid_size // self.merged
        return side, side

    def instead(self, signal: Signal) -> Signal:
        """Every signal itself."""
        return signal

    def check(self, signals: frozenset[Signal]) -> None:
        """Raise `UserError` unless the tower can give these signals."""
        layers = self.config.num_hidden_layers
        for signal in signals:
            signal.check(layers)

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


def check_heads(hidden_size: int, num_attention_heads: int, where: str) -> None:
    """Raise `UserError` for heads that do not divide the width."""
    if hidden_size % num_attention_heads:
        raise UserError(
            f"{where} has hidden_size={hidden_size}, which its {num_attention_heads} attention "
            "heads do not divide."
        )


def check_sizes(config: VitSizes, where: str, *, most_patches: int) -> None:
    """Raise `UserError` for heads that do not divide the width, or patches that do not fit."""
    check_heads(config.hidden_size, config.num_attention_heads, where)
    if config.patch_size > config.image_size:
        raise UserError(
            f"{where} has patches of {config.patch_size} pixels in an image of {config.image_size}."
        )
    if config.num_patches > most_patches:
        raise UserError(
            f"{where} has {config.num_patches:,} patches in an image; expected at most "
            f"{most_patches:,}."
        )
