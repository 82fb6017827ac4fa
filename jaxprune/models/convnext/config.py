"""Sizes of a ConvNeXt."""

import dataclasses
from collections.abc import Sequence

from jaxprune.errors import UserError
from jaxprune.models.config import require_types

_WHERE = "The ConvNeXt config"
STEM, HALVED = 4, 2  # pixels that the stem and each downsampling put together along a side
KERNEL = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNextConfig:
    """A ConvNeXt without its head (arXiv 2201.03545); the defaults are ConvNeXt-L."""

    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (192, 384, 768, 1536)
    layer_norm_eps: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_types(self, _WHERE)
        for name in ("depths", "widths"):
            if not _are_sizes(getattr(self, name)):
                raise UserError(f"{_WHERE} has {name}={getattr(self, name)!r}; expected sizes.")
        if len(self.depths) != len(self.widths):
            raise UserError(
                f"{_WHERE} has {len(self.depths)} depths and {len(self.widths)} widths; expected "
                "one of each for every stage."
            )

    @property
    def stride(self) -> int:
        """Pixels along a side of a place of the last map."""
        stride: int = STEM * HALVED ** (len(self.widths) - 1)
        return stride

    def macs(self, size: int) -> int:
        """Multiply-adds for an image of `size` x `size` pixels."""
        side, total = size // STEM, 0
        before = 3 * STEM**2 // HALVED**2  # so that the stem counts as another downsampling
        for depth, width in zip(self.depths, self.widths, strict=True):
            block = width * KERNEL**2 + 8 * width**2
            total += side**2 * (HALVED**2 * before * width + depth * block)
            side, before = side // HALVED, width
        return total


def _are_sizes(values: Sequence[object]) -> bool:
    return bool(values) and all(type(n) is int and 1 <= n <= 10**5 for n in values)
