"""Vision-side methods on made-up tiles."""

import jax
import numpy as np

from jaxprune.engine import stages
from jaxprune.ops.tiles import Tiling, one_tile, pack_tilings, patches_of
from jaxprune.ops.visual import VisionOutput


def packing_of(tilings, **sizes):
    """The tilings of a batch, padded no more than `sizes` say."""
    fields = {
        "images": len(tilings),
        "tiles": sum(tiling.tiles for tiling in tilings),
        "image_tiles": max(tiling.tiles for tiling in tilings),
        "slots": max(tiling.num_tokens for tiling in tilings),
    }
    return pack_tilings(tilings, **{**fields, **sizes})


def select(method, features, signals, *, cls=None, tilings=None, capacity=None, **sizes):
    """A method's selection from tiles `[F, N, C]`, in as few slots as hold it."""
    N = features.shape[1]
    packing = packing_of(tilings or [one_tile(N)] * len(features), **sizes)
    vision = VisionOutput(features, cls, signals)
    extra = packing.tile.shape[1] * (method.extra_tokens.number if method else 0)
    room = capacity or packing.slots.shape[1] + extra  # one program for any number that is kept
    found = stages.select(vision, packing, None, method, capacity=room, images=len(packing.tile))
    most = capacity or int(found.counts.max())
    return found._replace(
        tokens=found.tokens[:, :most],
        indices=found.indices[:, :most],
        positions=found.positions[..., :most],
    )


def chosen_of(method, signals, number):
    """bool `[N]`: what a method keeps of one image of one tile."""
    packing = packing_of([one_tile(number)])
    found = method.choose(patches_of(signals, packing, number))
    return np.asarray(found.kept)[0, 0]


def strip(patches):
    """An image of tiles of nine patches, of which the picture shows those."""
    slots = np.asarray(patches, np.int32)
    return Tiling(int(slots.max()) // 9 + 1, slots, np.zeros_like(slots))


def check_on_tiles(make, signals, rendering):
    """A number kept of an image of three tiles, and of each of them, is what a rendering keeps.

    The image has padding in two of its tiles and is in a batch with one of a single tile.

    Args:
        make: a method's class, or what takes `keep` and `budget`.
        signals: `[4, 9, ...]` each: the tiles of both images.
        rendering: the signals of a group's patches, and how many are kept -> their places.
    """
    N, image = 9, strip([*range(4), *range(9, 18), *range(20, 26)])
    patches = patches_of(signals, packing_of([image, strip(range(N))]), N)
    flat = {signal: np.asarray(x)[:3].reshape(3 * N, *x.shape[2:]) for signal, x in signals.items()}
    tiles = [image.slots[image.slots // N == tile] for tile in range(3)]
    for budget, keep, groups in (("image", 7, [image.slots]), ("tile", 5, tiles)):
        expected = []
        for own in groups:
            of_group = {signal: x[own] for signal, x in flat.items()}
            places = rendering(of_group, keep) if keep < len(own) else range(len(own))
            expected += [int(own[place]) for place in places]
        kept = jax.jit(make(keep=keep, budget=budget).choose)(patches).kept[0].ravel()
        assert np.flatnonzero(kept).tolist() == sorted(expected), budget
