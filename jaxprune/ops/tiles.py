"""Images of one tile or of several: which patches the decoder reads, and in which order.

The vision tower sees each tile alone and gives N visual tokens of it, here called patches. An
image of several tiles is laid out again from their patches, some of which may be padding and
fall away. A patch of an image is numbered tile * N + place; what is no patch has a negative
number.

    Tiling     one image, on the host
    Packing    a batch of them, padded: arrays, so that all tilings share one program
    line_up    what is left of each image when some of its patches are pruned
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.ops.axes import AnyArray
from jaxprune.ops.ranking import best
from jaxprune.ops.visual import Signal

NO_PATCH = -1
"""A token that stands for several patches, or a slot not in use."""
NEWLINE = -2
"""The learned newline at the end of a row."""
CLS = -3
"""The CLS token of tile 0; that of tile t is CLS - t."""


class VisualSize(NamedTuple):
    """Pixels of an image, or of each of a video's frames.

    Attributes:
        height, width: pixels.
        frames: of a video that is seen as one; 1 for an image.
        most_tiles: that it may be cut into, where that is fewer than the model's.
    """

    height: int
    width: int
    frames: int = 1
    most_tiles: int | None = None


class Tiling(NamedTuple):
    """How the tiles of one image make up its visual tokens.

    A slot that holds no patch goes with the patches of its row, and stays where its row has
    none: so a newline leaves with the row that it ends, and a CLS token, in a row of its own,
    never.

    Attributes:
        tiles: how many the vision tower sees.
        slots: int32 `[M]`, in reading order: the patch that stands there, `NEWLINE`, or
            `CLS` - tile.
        rows: int32 `[M]`: the row of the picture that a slot is in.
        places: int32 `[M]`, or `[A, M]` for rotary positions of several axes: a slot's
            position, from the image's first one; None counts the slots.
        extent: positions that the image takes up before the text after it; None: M.
        maps: of an image of several tiles its patches as they lie in the picture, int32
            `[rows, columns]` each: seen as a whole, and enlarged in tiles. Of a video, each
            frame's.
        video: whether its tiles are a video's frames.
    """

    tiles: int
    slots: np.ndarray
    rows: np.ndarray
    places: np.ndarray | None = None
    extent: int | None = None
    maps: tuple[np.ndarray, ...] = ()
    video: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    @property
    def num_patches(self) -> int:
        return int((self.slots >= 0).sum())

    @property
    def num_cls(self) -> int:
        """Tokens that are never pruned."""
        return int((self.slots <= CLS).sum())

    @property
    def num_positions(self) -> int:
        return self.num_tokens if self.extent is None else self.extent

    @property
    def positions(self) -> np.ndarray:
        """int32 `[M]` or `[A, M]`."""
        return np.arange(self.num_tokens) if self.places is None else self.places


def one_tile(num_patches: int, *, cls: bool = False) -> Tiling:
    """An image that is one tile, read row by row, after its CLS token if that is a feature."""
    places = np.arange(num_patches, dtype=np.int32)
    slots = np.append(np.int32(CLS), places) if cls else places
    return Tiling(1, slots, (slots >= 0).astype(np.int32))


def map_of_tiles(tall: int, wide: int, grid: int, *, first: int = 0) -> np.ndarray:
    """The patches of tiles that lie side by side, int32 `[tall * grid, wide * grid]`.

    Args:
        tall, wide: rows and columns of tiles, which are numbered row by row.
        grid: patches along a side of a tile.
        first: the number of the first tile.
    """
    row, column = np.mgrid[: tall * grid, : wide * grid]
    tile = first + row // grid * wide + column // grid
    patch: np.ndarray = tile * grid**2 + row % grid * grid + column % grid
    return patch.astype(np.int32)


class Frames(NamedTuple):
    """Which of the encoded tiles are a video's, for towers that look at several at once.

    Attributes:
        video: int32 `[F]`: the same number for all frames of a video, `STILL` for a tile of an
            image, `NO_TILE` for padding.
        number: int32 `[F]`: which frame of its video a tile is.
    """

    video: Int[AnyArray, " F"]
    number: Int[AnyArray, " F"]


STILL, NO_TILE = -1, -2


class Packing(NamedTuple):
    """The tilings of a batch of images, I of them with up to T tiles and M slots each.

    Attributes:
        tile: int32 `[I, T]`: where an image's tile stands among the F encoded ones, or -1.
        image: int32 `[F]`: the image that a tile belongs to.
        number: int32 `[F]`: which of its tiles it is.
        video: int32 `[F]`, see `Frames`.
        slots: int32 `[I, M]`, as in `Tiling`; `NO_PATCH` after the end.
        rows: int32 `[I, M]`.
        positions: int32 `[I, M]` or `[A, I, M]`.
    """

    tile: Int[AnyArray, "I T"]
    image: Int[AnyArray, " F"]
    number: Int[AnyArray, " F"]
    video: Int[AnyArray, " F"]
    slots: Int[AnyArray, "I M"]
    rows: Int[AnyArray, "I M"]
    positions: Int[AnyArray, "*A I M"]

    @property
    def frames(self) -> Frames:
        return Frames(self.video, self.number)


def pack_tilings(
    tilings: Sequence[Tiling],
    *,
    images: int,
    tiles: int,
    image_tiles: int,
    slots: int,
    axes: tuple[int, ...] = (),
) -> Packing:
    """Tilings as padded numpy arrays; the tiles of all images follow each other.

    Args:
        tilings: one an image.
        images, tiles, image_tiles, slots: I, F, T and M, none smaller than needed.
        axes: (A,) where positions have several axes.
    """
    tile = np.full((images, image_tiles), -1, np.int32)
    image, number = np.zeros((2, tiles), np.int32)
    video = np.full(tiles, NO_TILE, np.int32)
    packed = np.full((images, slots), NO_PATCH, np.int32)
    rows = np.zeros((images, slots), np.int32)
    positions = np.zeros((*axes, images, slots), np.int32)
    first = 0
    for i, tiling in enumerate(tilings):
        own = np.arange(tiling.tiles)
        tile[i, : tiling.tiles] = first + own
        image[first : first + tiling.tiles] = i
        number[first : first + tiling.tiles] = own
        video[first : first + tiling.tiles] = i if tiling.video else STILL
        packed[i, : tiling.num_tokens] = tiling.slots
        rows[i, : tiling.num_tokens] = tiling.rows
        positions[..., i, : tiling.num_tokens] = tiling.positions
        first += tiling.tiles
    return Packing(tile, image, number, video, packed, rows, positions)


class Chosen(NamedTuple):
    """What a vision-side method keeps.

    Attributes:
        kept: bool `[I, T, N]`.
        order: int32 `[I, T, N]`: of an image of one tile, kept patches in ascending order of
            it; None, and of several tiles: as they stand in the picture.
    """

    kept: Bool[Array, "I T N"]
    order: Int[Array, "I T N"] | None = None


class Questions(NamedTuple):
    """What the user asks about each image, in the decoder's embeddings.

    Attributes:
        tokens: `[I, Q, D]`.
        valid: bool `[I, Q]`.
    """

    tokens: Float[Array, "I Q D"]
    valid: Bool[Array, "I Q"]


class Patches(NamedTuple):
    """What a vision-side method chooses from: the patches of images, tile by tile.

    Attributes:
        signals: `[I, T, N, ...]` each. Where an image has no such tile they mean nothing.
        place: int32 `[I, T, N]`, the patch's place in reading order among those of its
            image; -1 for what is no part of the picture.
        video: bool `[I]`: whether its tiles are a video's frames.
        questions: for a method that reads them.
    """

    signals: dict[Signal, Array]
    place: Int[Array, "I T N"]
    video: Bool[Array, " I"]
    questions: Questions | None = None

    @property
    def number(self) -> Int[Array, " I"]:
        """How many patches an image has."""
        return jnp.sum(self.place >= 0, axis=(1, 2), dtype=jnp.int32)

    def best(self, scores: Float[Array, "I T N"], keep: int) -> Chosen:
        """The `keep` patches of each image with the highest scores; ties keep the first tile's."""
        scores, inside = (x.reshape(len(x), -1) for x in (scores, self.place >= 0))
        return Chosen(best(scores, inside, keep).reshape(self.place.shape))


def patches_of(
    signals: dict[Signal, Array],
    packing: Packing,
    num_patches: int,
    questions: Questions | None = None,
) -> Patches:
    """The patches of a batch of images; signals are `[F, N, ...]` each."""
    I, T = packing.tile.shape
    tile = jnp.maximum(packing.tile, 0)
    stands = jnp.asarray(packing.slots) >= 0
    place = jnp.where(stands, jnp.cumsum(stands, axis=1) - 1, -1)
    outside = T * num_patches  # where slots without a patch are sent, to be dropped
    patch = jnp.where(stands, packing.slots, outside)
    places = jnp.full((I, outside), -1).at[jnp.arange(I)[:, None], patch].set(place, mode="drop")
    found = {signal: x[tile] for signal, x in signals.items()}
    place = places.reshape(I, T, num_patches).astype(jnp.int32)
    return Patches(found, place, jnp.asarray(packing.video)[tile[:, 0]] > STILL, questions)


def by_tile(x: Bool[Array, "I T N"], packing: Packing) -> Bool[Array, "F N"]:
    """A mask of images' patches, for each of the encoded tiles."""
    return x[packing.image, packing.number]


class ExtraTokens(NamedTuple):
    """How many tokens of no patch every tile gets, in front of its image and after it."""

    front: int = 0
    after: int = 0

    @property
    def number(self) -> int:
        return self.front + self.after


NO_EXTRA = ExtraTokens()


class LinedUp(NamedTuple):
    """The visual tokens that are left of each image, in reading order.

    Attributes:
        counts: int32 `[I]`.
        indices: int32 `[I, K]`: a patch, `NEWLINE`, `CLS` - tile, or `NO_PATCH`.
        tile: int32 `[I, K]`: the tile whose extra token stands here, or -1.
        extra: int32 `[I, K]`: which of its tile's extra tokens that is, or -1.
        slots: int32 `[I, K]`: the slot of the unpruned image where the token stands; an extra
            token is at the last patch of its tile that it stands for.
    """

    counts: Int[Array, " I"]
    indices: Int[Array, "I K"]
    tile: Int[Array, "I K"]
    extra: Int[Array, "I K"]
    slots: Int[Array, "I K"]


def line_up(
    chosen: Chosen, packing: Packing, *, extra: ExtraTokens = NO_EXTRA, capacity: int
) -> LinedUp:
    """Kept patches in order, what else stands in their rows, and extra tokens tile by tile.

    Args:
        chosen: what is kept; what is no part of the picture does not count.
        packing: how the images are made up.
        extra: tokens that every tile gets besides.
        capacity: K, slots for each image.
    """
    kept, source = _kept_slots(chosen, packing)
    body = jnp.sum(kept, axis=1, dtype=jnp.int32)[:, None]  # [I, 1]
    tiles = jnp.sum(packing.tile >= 0, axis=1, dtype=jnp.int32)[:, None]
    front, after = tiles * extra.front, tiles * extra.after
    counts = (front + body + after)[:, 0]
    place = jnp.arange(capacity) - front  # among the kept slots
    M = packing.slots.shape[1]
    own = jnp.arange(len(packing.slots))[:, None]
    slots = source[own, jnp.clip(place, 0, M - 1)]
    in_body = (place >= 0) & (place < body)
    indices = jnp.where(in_body, jnp.asarray(packing.slots)[own, slots], NO_PATCH)
    none = jnp.full(indices.shape, -1)
    if not extra.number:
        return LinedUp(counts, indices, none, none, slots)
    # Of the extra tokens in front and after, the number among all of their image's.
    number = jnp.where(place < 0, place + front, place - body)
    each = jnp.where(place < 0, max(extra.front, 1), max(extra.after, 1))
    is_extra = (place < 0) | ((place >= body) & (place < body + after))
    tile = jnp.where(is_extra, number // each, -1)
    which = jnp.where(is_extra, number % each + jnp.where(place < 0, 0, extra.front), -1)
    stands_for = _last_dropped(chosen, packing, kept)  # [I, T]
    at = stands_for[own, jnp.clip(tile, 0, packing.tile.shape[1] - 1)]
    return LinedUp(counts, indices, tile, which, jnp.where(is_extra, at, slots))


def _kept_slots(chosen: Chosen, packing: Packing) -> tuple[Bool[Array, "I M"], Int[Array, "I M"]]:
    """Which slots stay, and all slots, those first in the order in which they are read."""
    I, M = packing.slots.shape
    own, slots = jnp.arange(I)[:, None], jnp.asarray(packing.slots)
    patch, stands = jnp.maximum(slots, 0), slots >= 0
    kept = chosen.kept.reshape(I, -1)[own, patch] & stands
    # What is no patch goes with the last one of its row; a strip may have rows without any.
    nothing = jnp.zeros((I, M), bool)
    rows = jnp.asarray(packing.rows)
    left, had = (nothing.at[own, rows].max(x)[own, rows] for x in (kept, stands))
    stays = kept | ((slots < NO_PATCH) & (left | ~had))
    key = jnp.broadcast_to(jnp.arange(M), (I, M))
    if chosen.order is not None:
        one = jnp.sum(packing.tile >= 0, axis=1, keepdims=True) == 1  # [I, 1]
        order = jnp.where(stands, chosen.order.reshape(I, -1)[own, patch], -1)
        key = jnp.where(one, order, key)
    last = np.iinfo(np.int32).max
    return stays, jnp.argsort(jnp.where(stays, key, last), axis=1)  # stable


def _last_dropped(chosen: Chosen, packing: Packing, kept: Bool[Array, "I M"]) -> Int[Array, "I T"]:
    """The last slot of each tile whose patch is gone; the tile's or the image's last if none is."""
    I, T = packing.tile.shape
    M, N = packing.slots.shape[1], chosen.kept.shape[2]
    own, slots = jnp.arange(I)[:, None], jnp.asarray(packing.slots)
    tile, at = jnp.maximum(slots, 0) // N, jnp.arange(M)

    def last(where: Bool[Array, "I M"]) -> Int[Array, "I T"]:
        return jnp.full((I, T), -1).at[own, tile].max(jnp.where(where, at, -1))

    dropped, stands = last((slots >= 0) & ~kept), last(slots >= 0)
    end = jnp.max(jnp.where(slots != NO_PATCH, at, 0), axis=1)[:, None]
    return jnp.where(dropped >= 0, dropped, jnp.where(stands >= 0, stands, end))
