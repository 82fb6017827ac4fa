"""Visual-token pruning for LLaVA-family models in JAX."""

from jaxprune.calibrate import calibrate
from jaxprune.devices.compilation import no_compilation
from jaxprune.engine.batching import generate_many
from jaxprune.engine.session import Answer
from jaxprune.engine.shapes import Buckets
from jaxprune.engine.warmup import WarmUp, warmup
from jaxprune.errors import UserError
from jaxprune.generate import generate, stream
from jaxprune.inputs.processor import Processor
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
from jaxprune.methods.recipes import Recipe, load_recipe, save_recipe
from jaxprune.model import DEMO_IMAGE, SMALL_MODEL, Params, export, load
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
