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
    counts = stages.count(vision, packing, None, method)
    return stages.select(
        vision,
        packing,
        None,
        method,
        capacity=capacity or int(counts.max()),
        images=len(packing.tile),
    )


def chosen_of(method, signals, number):
    """bool `[N]`: what a method keeps of one image of one tile."""
    packing = packing_of([one_tile(number)])
    found = method.choose(patches_of(signals, packing, number))
    return np.asarray(found.kept)[0, 0]
