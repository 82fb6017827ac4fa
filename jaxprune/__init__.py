"""Visual-token pruning for LLaVA-family models in JAX."""

from jaxprune.errors import UserError
from jaxprune.generate import Answer, generate, stream
from jaxprune.loading import DEMO_IMAGE, SMALL_MODEL, Params, export, load
from jaxprune.methods import METHODS, PruMerge, PruMergePlus, RandomPlaces, UniformPlaces
from jaxprune.processing import Processor
from jaxprune.shapes import Buckets
from jaxprune.version import __version__

__all__ = [
    "DEMO_IMAGE",
    "METHODS",
    "SMALL_MODEL",
    "Answer",
    "Buckets",
    "Params",
    "Processor",
    "PruMerge",
    "PruMergePlus",
    "RandomPlaces",
    "UniformPlaces",
    "UserError",
    "__version__",
    "export",
    "generate",
    "load",
    "stream",
]
