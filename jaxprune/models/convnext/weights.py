"""How ConvNeXt is stored, in the spelling of LLaVA-HR (timm's, but for the scale of a block)."""

import numpy as np

from jaxprune.models.weights import (
    KEEP,
    PATCHES,
    KeyTable,
    Rule,
    Transform,
    layer_norm,
    linear,
)


def _export_halving(x: np.ndarray) -> np.ndarray:
    """Matrix `[2 * 2 * C, D]` -> convolution `[D, C, 2, 2]`."""
    return x.reshape(2, 2, -1, x.shape[1]).transpose(3, 2, 0, 1)


HALVING = Transform(PATCHES.load, _export_halving)
DEPTHWISE = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""`[C, 1, 7, 7]` there, `[7, 7, 1, C]` here."""

_BLOCK, _HERE = "stages.{s}.blocks.{b}", "blocks_{s}_{b}"

CONVNEXT = KeyTable(
    rules=(
        Rule("stem.0.weight", "stem/kernel", PATCHES),
        Rule("stem.0.bias", "stem/bias", KEEP),
        *layer_norm("stem.1", "stem_norm"),
        *layer_norm("stages.{s}.downsample.0", "norm_{s}"),
        Rule("stages.{s}.downsample.1.weight", "down_{s}/kernel", HALVING),
        Rule("stages.{s}.downsample.1.bias", "down_{s}/bias", KEEP),
        Rule(f"{_BLOCK}.conv_dw.weight", f"{_HERE}/conv/kernel", DEPTHWISE),
        Rule(f"{_BLOCK}.conv_dw.bias", f"{_HERE}/conv/bias", KEEP),
        *layer_norm(f"{_BLOCK}.norm", f"{_HERE}/norm"),
        *linear(f"{_BLOCK}.mlp.fc1", f"{_HERE}/fc1"),
        *linear(f"{_BLOCK}.mlp.fc2", f"{_HERE}/fc2"),
        Rule(f"{_BLOCK}.weight", f"{_HERE}/scale", KEEP),
    ),
    ignored=(r"head\..*",),  # the classifier that it was trained with first
    partition=(
        (r".*/fc1/kernel", 1),
        (r".*/fc1/bias", 0),
        (r".*/fc2/kernel", 0),
    ),
)
