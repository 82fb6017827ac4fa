"""The pruning methods, one file a paper, and how a user names them.

Vision-side methods shorten an image before the decoder sees it, decoder-side ones remove tokens
at layers inside the decoder. A request may use one of each.

    base        what a method is, for these and for a user's own
    counted     vision-side methods that keep a given number of patches
    resolve     names, options, pairs and recipes -> a plan
    written     what the command line takes: a method and its options as one text
    recipes     what calibration found or a paper published, as files
"""

from jaxprune.methods.base import DecoderMethod, KeepRates, Merged, Method, Plan, VisionMethod
from jaxprune.methods.baselines import RandomPlaces, UniformPlaces
from jaxprune.methods.cdpruner import CDPruner
from jaxprune.methods.dart import Dart
from jaxprune.methods.divprune import DivPrune
from jaxprune.methods.evs import EVS
from jaxprune.methods.fastervlm import FasterVLM
from jaxprune.methods.feather import Feather
from jaxprune.methods.fitprune import FitPrune
from jaxprune.methods.fixed_schedules import VTW, FastV, PyramidDrop
from jaxprune.methods.gsearch import GSearch, PSigmoid
from jaxprune.methods.hiprune import HiPrune
from jaxprune.methods.holov import HoloV
from jaxprune.methods.iti import Interaction, Iti, LongTail
from jaxprune.methods.mmtok import MMTok
from jaxprune.methods.prumerge import PruMerge, PruMergePlus
from jaxprune.methods.resolve import METHODS, NO_PRUNING, describe, resolve
from jaxprune.methods.scope import Scope
from jaxprune.methods.sparsevlm import SparseVLM
from jaxprune.methods.v2drop import V2Drop
from jaxprune.methods.vidcom2 import VidCom2
from jaxprune.methods.visionzip import VisionZip
from jaxprune.methods.vispruner import VisPruner
from jaxprune.ops.cuts import Depth

__all__ = [
    "EVS",
    "METHODS",
    "NO_PRUNING",
    "VTW",
    "CDPruner",
    "Dart",
    "DecoderMethod",
    "Depth",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "Feather",
    "FitPrune",
    "GSearch",
    "HiPrune",
    "HoloV",
    "Interaction",
    "Iti",
    "KeepRates",
    "LongTail",
    "MMTok",
    "Merged",
    "Method",
    "PSigmoid",
    "Plan",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPlaces",
    "Scope",
    "SparseVLM",
    "UniformPlaces",
    "V2Drop",
    "VidCom2",
    "VisPruner",
    "VisionMethod",
    "VisionZip",
    "describe",
    "resolve",
]
