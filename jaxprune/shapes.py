"""Shape buckets: every array that reaches a compiled program has one of these sizes.

XLA compiles a program per shape. Rounding every dynamic size up to a listed one bounds the
number of programs by the product of the lists, whatever users send; the excess is masked.
"""

import dataclasses

from jaxprune.errors import UserError

_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes allowed for each dynamic dimension, ascending.

    Attributes:
        batch: rows of a request.
        images: images of a request, all rows together.
        visual: visual tokens kept of one image by an adaptive method.
        sequence: prompt tokens of a row, visual ones included.
        new_tokens: tokens to be generated.
    """

    batch: tuple[int, ...] = _POWERS
    images: tuple[int, ...] = _POWERS
    visual: tuple[int, ...] = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    sequence: tuple[int, ...] = (
        32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 896, 1024, 1280,
        1536, 1792, 2048, 2560, 3072, 3584, 4096, 6144, 8192, 16384, 32768,
    )  # fmt: skip
    new_tokens: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UserError(
                    f"The buckets for {field.name} are {sizes!r}; expected ascending positive "
                    "whole numbers."
                )

    def fit(self, dimension: str, size: int) -> int:
        """The smallest bucket of `dimension` that holds `size`.

        Raises:
            UserError: when even the largest does not.
        """
        sizes: tuple[int, ...] = getattr(self, dimension)
        for bucket in sizes:
            if bucket >= size:
                return bucket
        raise UserError(
            f"The request needs {dimension}={size}, over the largest bucket {sizes[-1]}; pass "
            f"buckets=Buckets({dimension}=(..., {size})) to allow it, at the price of one more "
            "compilation."
        )


DEFAULT_BUCKETS = Buckets()
