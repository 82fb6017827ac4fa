"""Visual-token pruning for LLaVA-family models in JAX."""

from jaxprune.calibrate import calibrate
from jaxprune.errors import UserError
from jaxprune.generate import generate, stream
from jaxprune.loading import DEMO_IMAGE, SMALL_MODEL, Params, export, load
from jaxprune.methods import (
    METHODS,
    VTW,
    FastV,
    FitPrune,
    GSearch,
    Iti,
    PruMerge,
    PruMergePlus,
    PSigmoid,
    PyramidDrop,
    RandomPlaces,
    UniformPlaces,
)
from jaxprune.processing import Processor
from jaxprune.recipes import Recipe, load_recipe, save_recipe
from jaxprune.run import Answer
from jaxprune.shapes import Buckets
from jaxprune.version import __version__

__all__ = [
    "DEMO_IMAGE",
    "METHODS",
    "SMALL_MODEL",
    "VTW",
    "Answer",
    "Buckets",
    "FastV",
    "FitPrune",
    "GSearch",
    "Iti",
    "PSigmoid",
    "Params",
    "Processor",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPlaces",
    "Recipe",
    "UniformPlaces",
    "UserError",
    "__version__",
    "calibrate",
    "export",
    "generate",
    "load",
    "load_recipe",
    "save_recipe",
    "stream",
]
