"""Visual-token pruning for LLaVA-family models in JAX."""

from jaxprune.calibrate import calibrate
from jaxprune.devices.compilation import no_compilation
from jaxprune.engine.answer import Answer
from jaxprune.engine.buckets import Buckets
from jaxprune.engine.forward import Batch, Forward, batch, forward
from jaxprune.engine.warmup import WarmUp, warmup
from jaxprune.errors import UserError
from jaxprune.generate import encode, generate, generate_many, stream
from jaxprune.inputs.images import fetch_image
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.videos import Video
from jaxprune.methods import (
    METHODS,
    VTW,
    DecoderMethod,
    FastV,
    FitPrune,
    GSearch,
    Iti,
    KeepRates,
    Plan,
    PruMerge,
    PruMergePlus,
    PSigmoid,
    PyramidDrop,
    RandomPlaces,
    UniformPlaces,
    VisionMethod,
)
from jaxprune.methods.recipes import Recipe, load_recipe, save_recipe
from jaxprune.model import DEMO_IMAGE, SMALL_MODEL, Params, export, load, read_config
from jaxprune.ops.visual import Signal
from jaxprune.version import __version__

__all__ = [
    "DEMO_IMAGE",
    "METHODS",
    "SMALL_MODEL",
    "VTW",
    "Answer",
    "Batch",
    "Buckets",
    "DecoderMethod",
    "FastV",
    "FitPrune",
    "Forward",
    "GSearch",
    "Iti",
    "KeepRates",
    "PSigmoid",
    "Params",
    "Plan",
    "Processor",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPlaces",
    "Recipe",
    "Signal",
    "UniformPlaces",
    "UserError",
    "Video",
    "VisionMethod",
    "WarmUp",
    "__version__",
    "batch",
    "calibrate",
    "encode",
    "export",
    "fetch_image",
    "forward",
    "generate",
    "generate_many",
    "load",
    "load_recipe",
    "no_compilation",
    "read_config",
    "save_recipe",
    "stream",
    "warmup",
]
