"""Images of one tile or of several: which patches the decoder reads, and in which order.

The vision tower sees each tile alone, a grid of N patches. An image of several is laid out
again from its tiles' patches, some of which may be padding and fall away, with newlines
between its rows. A patch of an image is numbered tile * N + place.

    Tiling     one image, on the host
    Packing    a batch of them, padded: arrays, so that all tilings share one program
    line_up    what is left of each image when some of its patches are pruned
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

NO_PATCH = -1
NEWLINE = -2


class Tiling(NamedTuple):
    """How the tiles of one image make up its visual tokens.

    Attributes:
        tiles: how many the vision tower sees.
        slots: int32 `[M]`, in reading order: the patch that stands there, or `NEWLINE`.
        rows: int32 `[M]`: the row of the picture that a slot is in; a newline is in the row
            that it ends.
    """

    tiles: int
    slots: np.ndarray
    rows: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    @property
    def num_patches(self) -> int:
        return int((self.slots >= 0).sum())


def one_tile(num_patches: int) -> Tiling:
    """An image that is one tile, read row by row."""
    places = np.arange(num_patches, dtype=np.int32)
    return Tiling(1, places, np.zeros_like(places))


class Packing(flax.struct.PyTreeNode):
    """The tilings of a batch of images, I of them with up to T tiles and M slots each.

    Attributes:
        tile: int32 `[I, T]`: where an image's tile stands among the F encoded ones, or -1.
        image: int32 `[F]`: the image that a tile belongs to.
        number: int32 `[F]`: which of its tiles it is.
        slots: int32 `[I, M]`, as in `Tiling`; `NO_PATCH` behind the end.
        rows: int32 `[I, M]`.
    """

    tile: Any
    image: Any
    number: Any
    slots: Any
    rows: Any


def pack_tilings(
    tilings: Sequence[Tiling], *, images: int, tiles: int, image_tiles: int, slots: int
) -> Packing:
    """Tilings as padded numpy arrays; the tiles of all images follow each other.

    Args:
        tilings: one an image.
        images, tiles, image_tiles, slots: I, F, T and M, none smaller than needed.
    """
    tile = np.full((images, image_tiles), -1, np.int32)
    image, number = np.zeros((2, tiles), np.int32)
    packed = np.full((images, slots), NO_PATCH, np.int32)
    rows = np.zeros((images, slots), np.int32)
    first = 0
    for i, tiling in enumerate(tilings):
        own = np.arange(tiling.tiles)
        tile[i, : tiling.tiles] = first + own
        image[first : first + tiling.tiles] = i
        number[first : first + tiling.tiles] = own
        packed[i, : tiling.num_tokens] = tiling.slots
        rows[i, : tiling.num_tokens] = tiling.rows
        first += tiling.tiles
    return Packing(tile, image, number, packed, rows)


class Patches(flax.struct.PyTreeNode):
    """What a vision-side method chooses from: the patches of images, tile by tile.

    Attributes:
        signals: float32 `[I, T, N]` each, by name: see `ops.visual.VisionOutput`. Where an
            image has no such tile they mean nothing.
        place: int32 `[I, T, N]`, the patch's place in reading order among those of its
            image; -1 for what is no part of the picture.
    """

    signals: dict[str, jax.Array]
    place: jax.Array

    @property
    def number(self) -> jax.Array:
        """How many patches an image has: int32 `[I]`."""
        return jnp.sum(self.place >= 0, axis=(1, 2), dtype=jnp.int32)


class Chosen(NamedTuple):
    """What a vision-side method keeps.

    Attributes:
        kept: bool `[I, T, N]`.
        order: int32 `[I, T, N]`, kept patches in ascending order of it; None: as they stand
            in the picture.
    """

    kept: jax.Array
    order: jax.Array | None = None


def patches_of(signals: dict[str, jax.Array], packing: Packing, num_patches: int) -> Patches:
    """The patches of a batch of images; signals are `[F, N]` each, others are left out."""
    I, T = packing.tile.shape
    tile = jnp.maximum(packing.tile, 0)
    found = {name: x[tile] for name, x in signals.items() if x.ndim == 2}
    stands = packing.slots >= 0
    place = jnp.where(stands, jnp.cumsum(stands, axis=1) - 1, -1)
    outside = T * num_patches  # where slots without a patch are sent, to be dropped
    patch = jnp.where(stands, packing.slots, outside)
    places = jnp.full((I, outside), -1).at[jnp.arange(I)[:, None], patch].set(place, mode="drop")
    return Patches(found, places.reshape(I, T, num_patches).astype(jnp.int32))


def by_tile(x: jax.Array, packing: Packing) -> jax.Array:
    """`[I, T, N]` -> `[F, N]`."""
    return x[packing.image, packing.number]


class LinedUp(NamedTuple):
    """The visual tokens that are left of each image, in reading order.

    Attributes:
        counts: int32 `[I]`.
        indices: int32 `[I, K]`: a patch, `NEWLINE`, or `NO_PATCH` for the others.
        extra: int32 `[I, K]`: the tile whose extra token stands here, or -1.
    """

    counts: jax.Array
    indices: jax.Array
    extra: jax.Array


def line_up(chosen: Chosen, packing: Packing, *, extra_tokens: bool, capacity: int) -> LinedUp:
    """Kept patches in order, newlines of rows that keep any, then a token for every tile.

    Args:
        chosen: what is kept; what is no part of the picture does not count.
        packing: how the images are made up.
        extra_tokens: a token a tile comes behind its image, in the order of the tiles.
        capacity: slots for each image.
    """
    I, M = packing.slots.shape
    T = packing.tile.shape[1]
    patch = jnp.maximum(packing.slots, 0)
    own = jnp.arange(I)[:, None]
    stands = packing.slots >= 0
    kept = chosen.kept.reshape(I, -1)[own, patch] & stands  # [I, M]
    # A newline goes with the last patch of its row; a strip may have rows without any.
    nothing = jnp.zeros((I, M), bool)
    left, had = (nothing.at[own, packing.rows].max(x)[own, packing.rows] for x in (kept, stands))
    stays = kept | ((packing.slots == NEWLINE) & (left | ~had))
    key = jnp.broadcast_to(jnp.arange(M), (I, M))
    if chosen.order is not None:
        key = chosen.order.reshape(I, -1)[own, patch]
    behind = jnp.iinfo(jnp.int32).max
    source = jnp.argsort(jnp.where(stays, key, behind), axis=1)  # stable
    body = jnp.sum(stays, axis=1, dtype=jnp.int32)[:, None]

    slot = jnp.arange(capacity)
    padded = jnp.pad(source, ((0, 0), (0, max(0, capacity - M))))[:, :capacity]
    indices = jnp.where(slot < body, packing.slots[own, padded], NO_PATCH)
    if not extra_tokens:
        return LinedUp(body[:, 0], indices, jnp.full((I, capacity), -1))
    tiles = jnp.sum(packing.tile >= 0, axis=1, dtype=jnp.int32)[:, None]
    tile = slot - body
    extra = jnp.where((tile >= 0) & (tile < tiles), jnp.minimum(tile, T - 1), -1)
    return LinedUp((body + tiles)[:, 0], indices, extra)
