"""Visual-token pruning for LLaVA-family models in JAX."""

from jaxprune.calibrate import calibrate
from jaxprune.compilation import no_compilation
from jaxprune.errors import UserError
from jaxprune.generate import generate, stream
from jaxprune.loading import DEMO_IMAGE, SMALL_MODEL, Params, export, load
from jaxprune.many import generate_many
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
from jaxprune.warmup import WarmUp, warmup

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
    "WarmUp",
    "__version__",
    "calibrate",
    "export",
    "generate",
    "generate_many",
    "load",
    "load_recipe",
    "no_compilation",
    "save_recipe",
    "stream",
    "warmup",
]
