"""Shape buckets: every array that reaches a compiled program has one of these sizes.

XLA compiles a program per shape. Rounding every dynamic size up to a listed one bounds the
number of programs by the product of the lists, whatever users send; the excess is masked.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxprune.errors import UserError

_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes allowed for each dynamic dimension, ascending.

    Attributes:
        batch: rows of a request.
        images: images of a request, all rows together.
        tiles: tiles of these images, which the vision tower sees.
        image_tiles: tiles of one image.
        row_images: images of one row.
        visual: visual tokens of an image, before pruning where images differ and behind an
            adaptive method; and of a row.
        tile_patches: patches kept of one tile by an adaptive method that merges.
        text: text tokens of a row.
        new_tokens: tokens to be generated.
        schedule_lengths: how many different lengths a decoder's layers may have under a
            decoder-side method: each more saves padding and costs compile time. None takes
            every length as it is.
    """

    batch: tuple[int, ...] = _POWERS
    images: tuple[int, ...] = _POWERS
    tiles: tuple[int, ...] = (
        1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 320,
    )  # fmt: skip
    image_tiles: tuple[int, ...] = (1, 3, 5, 8, 13, 26, 40)
    row_images: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    visual: tuple[int, ...] = (
        16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096,
        6144, 8192, 12288, 16384, 32768, 65536,
    )  # fmt: skip
    tile_patches: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    text: tuple[int, ...] = (
        16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192,
        16384, 32768,
    )  # fmt: skip
    new_tokens: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096)
    schedule_lengths: int | None = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name == "schedule_lengths":
                continue
            sizes = getattr(self, field.name)
            listed = isinstance(sizes, tuple | list) and all(type(n) is int for n in sizes)
            if not listed or not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UserError(
                    f"The buckets for {field.name} are {sizes!r}; expected ascending positive "
                    "whole numbers in a tuple."
                )
            object.__setattr__(self, field.name, tuple(sizes))
        distinct = self.schedule_lengths
        if distinct is not None and (not isinstance(distinct, int) or distinct < 1):
            raise UserError(
                f"schedule_lengths is {distinct!r}; expected a whole number, 1 or more, or None."
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


def few_lengths(lengths: Sequence[int], distinct: int | None) -> tuple[int, ...]:
    """Falling lengths rounded up to at most `distinct` different ones, at the least total.

    Args:
        lengths: what each layer needs, not increasing.
        distinct: how many different ones may be left; None changes nothing.
    """
    if distinct is None or len(set(lengths)) <= distinct:
        return tuple(lengths)
    # Groups of neighbouring layers take their first one's length. best[g][l]: the least
    # total of the layers from l on in g groups, and where the first of these ends.
    L = len(lengths)
    best = [[(math.inf, L)] * L + [(0.0, L)]]
    for _ in range(distinct):
        best.append(
            [
                min((lengths[l] * (e - l) + best[-1][e][0], e) for e in range(l + 1, L + 1))
                for l in range(L)
            ]
            + [(0.0, L)]
        )
    rounded: list[int] = []
    for groups in range(distinct, 0, -1):
        if len(rounded) < L:
            end = best[groups][len(rounded)][1]
            rounded += [lengths[len(rounded)]] * (end - len(rounded))
    return tuple(rounded)


DEFAULT_BUCKETS = Buckets()
