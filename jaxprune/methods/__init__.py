"""The pruning methods, one file a paper, and how a user names them.

Vision-side methods shorten an image before the decoder sees it, decoder-side ones remove tokens
at layers inside the decoder. A request may use one of each.

    base        what a method is, for these and for a user's own
    resolve     names, options, pairs and recipes -> a plan
    recipes     what calibration found or a paper published, as files
"""

from jaxprune.methods.base import DecoderMethod, KeepRates, Merged, Method, Plan, VisionMethod
from jaxprune.methods.baselines import RandomPlaces, UniformPlaces
from jaxprune.methods.fitprune import FitPrune
from jaxprune.methods.fixed_schedules import VTW, FastV, PyramidDrop
from jaxprune.methods.gsearch import GSearch, PSigmoid
from jaxprune.methods.iti import Interaction, Iti, LongTail
from jaxprune.methods.prumerge import PruMerge, PruMergePlus
from jaxprune.methods.resolve import METHODS, NO_PRUNING, describe, resolve
from jaxprune.ops.cuts import Depth

__all__ = [
    "METHODS",
    "NO_PRUNING",
    "VTW",
    "DecoderMethod",
    "Depth",
    "FastV",
    "FitPrune",
    "GSearch",
    "Interaction",
    "Iti",
    "KeepRates",
    "LongTail",
    "Merged",
    "Method",
    "PSigmoid",
    "Plan",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPlaces",
    "UniformPlaces",
    "VisionMethod",
    "describe",
    "resolve",
]
