"""What many tests share: pictures, and every method with options for the tiny models."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

import jaxprune

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "prumerge": {},
    "prumerge_plus": {},
    "prumerge fixed": {"method": "prumerge", "keep": 5},
    "prumerge_plus fixed": {"method": "prumerge_plus", "keep": 6},
    "prumerge, original positions": {"method": "prumerge", "positions": "original"},
    "random": {"keep": 5},
    "uniform": {"keep": 5},
    "fastervlm": {"keep": 5},
    "divprune": {"keep": 5},
    "visionzip": {"keep": 9},
    "mmtok": {"keep": 5},
    "cdpruner, by embeddings": {"method": "cdpruner", "keep": 5, "relevance": "embeddings"},
    "holov": {"keep": 5, "num_crops": 4},
    "holov, windows": {"method": "holov", "keep": 5, "num_crops": 4, "crops": "windows"},
    "evs": {"keep_rate": 0.4},
    "vidcom2": {},
    "scope": {"keep": 5},
    "vispruner": {"keep": 5},
    "vispruner, by tile": {"method": "vispruner", "keep": 3, "budget": "tile"},
    "hiprune": {"keep": 6, "alpha": 1.0, "layer": 1},
    "iti": {},
    "fitprune": {"deletions": (3, 5, 2), "num_tokens": 16},
    "gsearch": {"keep_rates": (1.0, 0.6, 0.2)},
    "gsearch, renumbered": {
        "method": "gsearch",
        "keep_rates": (1.0, 0.6, 0.2),
        "positions": "renumber",
    },
    "gsearch, without positions": {
        "method": "gsearch",
        "keep_rates": (1.0, 0.6, 0.2),
        "without_rope": True,
    },
    "psigmoid": {"keep_rate": 0.6, "k": 0.8, "first_pruned_layer": 1},
    "fastv": {"layer": 1},
    "pyramiddrop": {"stages": 3},
    "vtw": {},
    "dart": {"tokens": 9, "layer": 1},
    "feather": {"cut_layers": (1, 2)},
    "sparsevlm": {"keep_tokens": (300, 120), "cut_layers": (1, 2)},
    "sparsevlm, renumbered": {
        "method": "sparsevlm",
        "keep_tokens": (200,),
        "cut_layers": (1,),
        "positions": "renumber",
    },
    "sparsevlm plus": {
        "method": "sparsevlm",
        "keep_tokens": (300, 120),
        "cut_layers": (1, 2),
        "version": "plus",
    },
    "v2drop": {"keep_rates": (0.6, 0.3), "cut_layers": (1, 2)},
    "pair": {"method": ("prumerge_plus", "fastv"), "keep": 9, "keep_rate": 0.3},
    "adaptive pair": {"method": ("prumerge", "gsearch"), "keep_rates": (1.0, 0.5, 0.5)},
}


FEW = jaxprune.Buckets(
    batch=(1, 8), images=(1, 8), image_tiles=(8,), row_images=(1, 4), visual=(96, 512),
    text=(64, 256), new_tokens=(16, 128),
)  # fmt: skip
"""Few sizes, so that tests of the same models share programs."""


def options_of(name, methods=METHODS):
    """A case as keyword arguments of `generate`."""
    return {"method": name, **methods[name]}


def mostly_slow(values, quick):
    """Cases of which all but the quick ones are among the longer checks."""
    slow = ((x if isinstance(x, tuple) else (x,)) for x in values if x not in quick)
    return [
        *(x for x in values if x in quick),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in slow),
    ]


def picture(seed, size=(40, 50)):
    """Noise of so many rows and columns."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, size=(*size, 3), dtype=np.uint8))
