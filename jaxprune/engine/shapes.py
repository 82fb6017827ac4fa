"""Shape buckets: every array that reaches a compiled program has one of these sizes.

XLA compiles a program per shape. Rounding every dynamic size up to a listed one bounds the
number of programs by the product of the lists, whatever users send; the excess is masked.

    Buckets    the lists
    Shapes     the sizes of a request, for `generate`; of all requests, for `warmup`
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune.errors import UserError

_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes allowed for each dynamic dimension, ascending.

    Attributes:
        batch: rows of a request.
        images: images of a request, all rows together.
        image_tiles: tiles of one image, the same for all of a request.
        row_images: images of one row.
        visual: visual tokens of an image, before pruning where images differ and behind an
            adaptive method; and of a row of several images.
        text: text tokens of a row.
        new_tokens: tokens to be generated. Room for more costs little: decoding reads a longer
            cache, and stops where the answer ends.
        schedule_lengths: how many different lengths a decoder's layers may have under a
            decoder-side method: each more saves padding and costs compile time. None takes
            every length as it is.

    Raises:
        UserError: for lists that are not ascending positive whole numbers.
    """

    batch: tuple[int, ...] = _POWERS
    images: tuple[int, ...] = _POWERS
    image_tiles: tuple[int, ...] = (1, 3, 5, 8, 13, 26, 40)
    row_images: tuple[int, ...] = _POWERS
    visual: tuple[int, ...] = (
        32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384,
        32768, 65536,
    )  # fmt: skip
    text: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    new_tokens: tuple[int, ...] = (128, 512, 2048, 4096)
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

    def up_to(self, **most: int) -> "Buckets":
        """The same lists, each cut behind the first bucket that holds what is named.

        `Buckets().up_to(batch=8, text=512)` chooses the shapes of `Buckets()`, but refuses
        requests of more than 8 rows or 512 text tokens.

        Raises:
            UserError: for a dimension that there is not, or a size over its largest bucket.
        """
        names = [field.name for field in dataclasses.fields(self)][:-1]
        for name in most:
            if name not in names:
                raise UserError(f"{name!r} is no dimension; expected one of: {', '.join(names)}.")
        lists = {name: getattr(self, name) for name in most}
        cut = {
            name: sizes[: sizes.index(self.fit(name, most[name])) + 1]
            for name, sizes in lists.items()
        }
        return dataclasses.replace(self, **cut)

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


class Lengths(NamedTuple):
    """What a batch has room for: text tokens, and visual tokens of all images, of a row."""

    text: int
    visual: int


class ImageShape(NamedTuple):
    """Room for the images of a batch: so many, of so many tiles and visual tokens each.

    The visual tokens are those before pruning, CLS left out.
    """

    images: int
    tiles: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The padded sizes of requests to one model under one vision-side method.

    `of_*` gives the sizes of a request. `every_*` gives those of all requests there can be,
    by asking the same functions; see `warmup`.

    Attributes:
        buckets: the sizes that are allowed.
        config: the model's config.
        method: the vision-side method, or None.
    """

    buckets: Buckets
    config: Any
    method: Any

    def of_images(self, number: int, tiles: int) -> ImageShape:
        """Room for `number` images of up to `tiles` tiles."""
        images, tiles = self.buckets.fit("images", number), self.buckets.fit("image_tiles", tiles)
        return ImageShape(images, tiles, self.config.most_tokens(tiles) - self.config.keep_cls)

    def visual_slots(self, images: int, batch: int, row_images: int) -> int:
        """Images that the visual tokens of a batch have room for.

        With an image a row it is one for each, however many rows share one: so the decoder's
        input depends on the batch alone. With several, room for all would be too much.

        Args:
            images: their bucket.
            batch: rows, a bucket.
            row_images: images of the row that has the most.
        """
        several = self.buckets.fit("row_images", max(row_images, 1)) > 1
        return images if several else max(images, batch)

    def reachable(self, images: int, batch: int, row_images: int) -> bool:
        """Whether some batch of these buckets has a number of images of the bucket `images`."""
        place = self.buckets.images.index(images)
        fewest = 1 + (self.buckets.images[place - 1] if place else 0)
        return fewest <= batch * row_images

    def fixed_capacity(self, shape: ImageShape) -> int | None:
        """Visual tokens behind the method of an image of one tile, if known in advance."""
        if shape.tiles > 1 or self.method is None:
            return shape.slots + self.config.keep_cls if shape.tiles == 1 else None
        fixed = self.method.fixed_count(self.config.vision_config.num_patches)
        return None if fixed is None else int(fixed) + self.config.keep_cls

    def of_selection(self, shape: ImageShape, longest: int) -> int:
        """Slots of each image's visual tokens, of which the largest has `longest`."""
        return min(self.buckets.fit("visual", longest), self._most(shape))

    def _most(self, shape: ImageShape) -> int:
        extra = shape.tiles if self.method is not None and self.method.merges else 0
        return int(shape.slots + self.config.keep_cls + extra)

    def of_rows(self, text: int, row_images: int, capacity: int, longest: int) -> Lengths:
        """Room for rows of up to `text` text and `longest` visual tokens.

        Args:
            text: text tokens of the longest row.
            row_images: images of the row that has the most.
            capacity: slots of each image.
            longest: visual tokens of the row that has the most.
        """
        text = self.buckets.fit("text", text)
        if not row_images:
            return Lengths(text, 0)
        whole = self.buckets.fit("row_images", row_images) * capacity
        if longest == whole:
            return Lengths(text, whole)
        return Lengths(text, min(self.buckets.fit("visual", longest), whole))

    def every_image(self) -> list[ImageShape]:
        """All that `of_images` can give."""
        fewest = 1 if self.config.one_tile else 2
        most = min(self.config.most_tiles, self.buckets.image_tiles[-1])
        tiles = sorted({self.buckets.fit("image_tiles", n) for n in range(fewest, most + 1)})
        return [self.of_images(n, t) for n in self.buckets.images for t in tiles]

    def every_selection(self, shape: ImageShape) -> dict[int, int]:
        """All that `of_selection` can give, each with the smallest number that leads to it."""
        fixed = self.fixed_capacity(shape)
        if fixed is not None:
            return {fixed: fixed}
        # Without pruning an image of several tiles has more than those of its whole.
        tiled = self.method is None and not self.config.one_tile
        least = self.config.vision_config.num_patches + 1 if tiled else 1
        most = min(self._most(shape), self.buckets.visual[-1])
        numbers = range(most, least - 1, -1)
        return {self.of_selection(shape, n): n for n in numbers}

    def every_row(self, row_images: int, capacity: int, least: int) -> list[Lengths]:
        """All that `of_rows` can give for images of a capacity, the largest with `least` or more.

        Args:
            row_images: a bucket; 0 for text alone.
            capacity: slots of each image.
            least: the smallest number of visual tokens that leads to the capacity.
        """
        whole, largest = row_images * capacity, self.buckets.visual[-1]
        visual = [n for n in range(least, whole + 1) if n == whole or n <= largest] or [0]
        rooms = {self.of_rows(1, row_images, capacity, n).visual for n in visual}
        return [Lengths(text, room) for room in sorted(rooms) for text in self.buckets.text]


DEFAULT_BUCKETS = Buckets()
