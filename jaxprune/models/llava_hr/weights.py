"""How LLaVA-HR is stored: by its publisher's names, since transformers has none."""

import numpy as np

from jaxprune.models.clip.weights import CLIP
from jaxprune.models.convnext.weights import CONVNEXT, DEPTHWISE
from jaxprune.models.llama.weights import LLAMA
from jaxprune.models.weights import KEEP, KeyTable, Rule, Transform, linear

FAST = "model.vision_tower.fast_vision_tower.vision_tower."
SLOW = "model.vision_tower.slow_vision_tower.vision_tower."


def _export_point(x: np.ndarray) -> np.ndarray:
    return x.T[:, :, None, None]


_POINT = Transform(lambda x: x[:, :, 0, 0].T, _export_point)
"""A convolution `[D, C, 1, 1]` there, a matrix `[C, D]` here."""


def _convolution(key: str, path: str, transform: Transform) -> tuple[Rule, Rule]:
    weight = Rule(f"{key}.weight", f"{path}/kernel", transform)
    return weight, Rule(f"{key}.bias", f"{path}/bias", KEEP)


_ADAPTER, _HERE = "model.vision_tower.align_stages_latent.{a}", "vision_tower/adapters_{a}"

_OWN = KeyTable(
    rules=(
        *_convolution(f"{_ADAPTER}.slow_conv", f"{_HERE}/slow_conv", _POINT),
        *_convolution(f"{_ADAPTER}.slow_proj", f"{_HERE}/slow_proj", _POINT),
        *_convolution(f"{_ADAPTER}.fast_conv", f"{_HERE}/fast_conv", DEPTHWISE),
        *_convolution(f"{_ADAPTER}.fast_proj", f"{_HERE}/fast_proj", _POINT),
        *linear(f"{_ADAPTER}.gate.0", f"{_HERE}/gate_in"),
        *linear(f"{_ADAPTER}.gate.2", f"{_HERE}/gate_out"),
        *linear("model.vision_tower.align_stages.0.fast_proj", "vision_tower/fast_proj"),
        *linear("model.vision_tower.align_stages.0.slow_proj", "vision_tower/slow_proj"),
        *linear("model.mm_projector.0", "multi_modal_projector/linear_1"),
        *linear("model.mm_projector.2", "multi_modal_projector/linear_2"),
    ),
)

LLAVA_HR = (
    _OWN
    + CLIP.under(FAST, "vision_tower/fast/")
    + CONVNEXT.under(SLOW, "vision_tower/slow/")
    + LLAMA.under("", "language_model/")
)
