"""The padded sizes of a request, from the buckets; and those of all requests there can be."""

import dataclasses
from typing import NamedTuple

from jaxprune.engine.buckets import Buckets
from jaxprune.methods.base import VisionMethod
from jaxprune.models.family import ModelConfig
from jaxprune.ops.tiles import Tiling, VisualSize

ALIGNED = 16
"""Rows of a tile in 16 bits: on an accelerator other lengths are copied from layout to layout."""


def tokens_left(config: ModelConfig, method: VisionMethod) -> int | None:
    """Visual tokens that a method leaves of an image of one tile, where images do not differ."""
    tiling = config.tiling(VisualSize(config.tower.tile_size, config.tower.tile_size))
    return tokens_left_of(tiling, method) if config.one_tile else None


def tokens_left_of(tiling: Tiling, method: VisionMethod) -> int | None:
    """Visual tokens that a method leaves of an image of one tile, or of a video, if it says so.

    Its patches, the method's extra tokens, and what is no patch: CLS tokens, say.
    """
    patches = None
    if tiling.video:
        patches = method.video_count(tiling.tiles, tiling.num_patches // tiling.tiles)
    elif tiling.tiles == 1:
        patches = method.fixed_count(tiling.num_patches)
    if patches is None:
        return None
    extra = tiling.tiles * method.extra_tokens.number
    return patches + extra + tiling.num_tokens - tiling.num_patches


class RowRoom(NamedTuple):
    """What a batch has room for: text tokens, and visual tokens of all images, of a row."""

    text: int
    visual: int

    @property
    def slots(self) -> int:
        return self.text + self.visual


class ImageShape(NamedTuple):
    """Room for the images of a batch: so many, of so many tiles and visual tokens each.

    The visual tokens are those before pruning.
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
        multiple: that the slots of rows with images are rounded up to, see `ALIGNED`.
    """

    buckets: Buckets
    config: ModelConfig
    method: VisionMethod | None
    multiple: int = 1

    def of_images(self, number: int, tiles: int) -> ImageShape:
        """Room for `number` images of up to `tiles` tiles."""
        images, tiles = self.buckets.fit("images", number), self.buckets.fit("image_tiles", tiles)
        return ImageShape(images, tiles, self.config.most_tokens(tiles))

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
        """Visual tokens that are left of an image of one tile, if known in advance."""
        if shape.tiles > 1:
            return None
        return shape.slots if self.method is None else tokens_left(self.config, self.method)

    def of_selection(self, shape: ImageShape, longest: int) -> int:
        """Slots of each image's visual tokens, of which the largest has `longest`."""
        return min(self.buckets.fit("visual", longest), self.most_left(shape))

    def most_left(self, shape: ImageShape) -> int:
        """The most visual tokens that can be left of an image, a method's own included."""
        extra = 0 if self.method is None else shape.tiles * self.method.extra_tokens.number
        return shape.slots + extra

    def of_rows(self, text: int, row_images: int, capacity: int, longest: int) -> RowRoom:
        """Room for rows of up to `text` text and `longest` visual tokens.

        Args:
            text: text tokens of the longest row.
            row_images: images of the row that has the most.
            capacity: slots of each image.
            longest: visual tokens of the row that has the most.
        """
        text = self.buckets.fit("text", text)
        if not row_images:
            return RowRoom(text, 0)
        whole = self.buckets.fit("row_images", row_images) * capacity
        visual = whole if longest == whole else min(self.buckets.fit("visual", longest), whole)
        return RowRoom(text, visual + -(text + visual) % self.multiple)

    def every_image(self) -> list[ImageShape]:
        """All that `of_images` can give."""
        fewest = self.config.fewest_tiles
        most = min(self.config.most_tiles, self.buckets.image_tiles[-1])
        tiles = sorted({self.buckets.fit("image_tiles", n) for n in range(fewest, most + 1)})
        return [self.of_images(n, t) for n in self.buckets.images for t in tiles]

    def every_selection(self, shape: ImageShape) -> dict[int, int]:
        """All that `of_selection` can give, each with the smallest number that leads to it."""
        fixed = self.fixed_capacity(shape)
        if fixed is not None:
            return {fixed: fixed}
        least = self.config.fewest_tokens if self.method is None else 1
        most = min(self.most_left(shape), self.buckets.visual[-1])
        numbers = range(most, least - 1, -1)
        return {self.of_selection(shape, n): n for n in numbers}

    def every_row(self, row_images: int, capacity: int, least: int) -> list[RowRoom]:
        """All that `of_rows` can give for images of a capacity, the largest with `least` or more.

        Args:
            row_images: a bucket; 0 for text alone.
            capacity: slots of each image.
            least: the smallest number of visual tokens that leads to the capacity.
        """
        whole, largest = row_images * capacity, self.buckets.visual[-1]
        visual = [n for n in range(least, whole + 1) if n == whole or n <= largest] or [0]
        rooms = {self.of_rows(1, row_images, capacity, n).visual for n in visual}
        return [RowRoom(text, room) for room in sorted(rooms) for text in self.buckets.text]
