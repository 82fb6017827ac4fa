"""Vision-side methods on made-up tiles."""

import numpy as np

from jaxprune.engine import stages
from jaxprune.ops.tiles import one_tile, pack_tilings, patches_of
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


def select(method, features, signals, *, tilings=None, capacity=None, **sizes):
    """A method's selection from tiles `[F, N, C]`, in as few slots as hold it."""
    N = features.shape[1]
    packing = packing_of(tilings or [one_tile(N)] * len(features), **sizes)
    vision = VisionOutput(features, None, signals)
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
