"""Visual-token pruning for LLaVA-family models in JAX."""

from jaxprune.calibrate import calibrate
from jaxprune.devices.compilation import no_compilation
from jaxprune.engine.answer import Answer
from jaxprune.engine.buckets import Buckets
from jaxprune.engine.forward import Batch, Forward, batch, forward
from jaxprune.engine.warmup import WarmUp, warmup
from jaxprune.errors import UserError
from jaxprune.evaluate import Evaluation, evaluate
from jaxprune.generate import encode, generate, generate_many, stream
from jaxprune.inputs.images import fetch_image
from jaxprune.inputs.processor import Processor
from jaxprune.inputs.videos import Video
from jaxprune.methods import (
    EVS,
    METHODS,
    VTW,
    CDPruner,
    Dart,
    DecoderMethod,
    DivPrune,
    FasterVLM,
    FastV,
    Feather,
    FitPrune,
    GSearch,
    HiPrune,
    HoloV,
    Iti,
    KeepRates,
    MMTok,
    Plan,
    PruMerge,
    PruMergePlus,
    PSigmoid,
    PyramidDrop,
    RandomPlaces,
    Scope,
    SparseVLM,
    UniformPlaces,
    V2Drop,
    VidCom2,
    VisionMethod,
    VisionZip,
    VisPruner,
)
from jaxprune.methods.recipes import Recipe, load_recipe, save_recipe
from jaxprune.model import DEMO_IMAGE, SMALL_MODEL, Params, export, load, read_config
from jaxprune.ops.visual import Signal
from jaxprune.train import train
from jaxprune.version import __version__

__all__ = [
    "DEMO_IMAGE",
    "EVS",
    "METHODS",
    "SMALL_MODEL",
    "VTW",
    "Answer",
    "Batch",
    "Buckets",
    "CDPruner",
    "Dart",
    "DecoderMethod",
    "DivPrune",
    "Evaluation",
    "FastV",
    "FasterVLM",
    "Feather",
    "FitPrune",
    "Forward",
    "GSearch",
    "HiPrune",
    "HoloV",
    "Iti",
    "KeepRates",
    "MMTok",
    "PSigmoid",
    "Params",
    "Plan",
    "Processor",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPlaces",
    "Recipe",
    "Scope",
    "Signal",
    "SparseVLM",
    "UniformPlaces",
    "UserError",
    "V2Drop",
    "VidCom2",
    "Video",
    "VisPruner",
    "VisionMethod",
    "VisionZip",
    "WarmUp",
    "__version__",
    "batch",
    "calibrate",
    "encode",
    "evaluate",
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
    "train",
    "warmup",
]
