"""Models for a compiler to look at: widths of LLaVA-1.5-7B, of two layers.

What a compiler copies does not depend on how many more there are.
"""

import dataclasses
from typing import Any

import jaxprune
from jaxprune.engine.programs import Sizes
from jaxprune.reports.compiled import compiled

LAYERS = 2
MOST_WRITTEN = 64 * 2**20  # bytes of an array; scores of 8 x 32 heads x 640 x 640 have 400 million
FITPRUNE = {"deletions": (200, 200), "num_tokens": 576}


def config(name="llava-1.5-7b", layers=LAYERS, dtype="bfloat16"):
    whole: Any = jaxprune.read_config(name, dtype)
    text = dataclasses.replace(whole.text_config, num_hidden_layers=layers)
    return dataclasses.replace(whole, text_config=text)


def stages(
    target, method="none", *, batch, model="llava-1.5-7b", dtype="bfloat16", data=1,
    only=("prefill", "decode"), **options,
):  # fmt: skip
    """What is found of every stage, by its name; all of it fits."""
    found = compiled(
        config(model, dtype=dtype), target, method, sizes=Sizes(batch=batch), data=data, only=only,
        show_progress=False, **options,
    )  # fmt: skip
    assert found.fits
    return {stage.stage: stage for stage in found.stages}


def written_scores(stage):
    """Arrays of float32 that are written, beyond what scores may take."""
    scores = [one for one in stage.written if one.shape.startswith("f32")]
    return [one for one in scores if one.bytes > MOST_WRITTEN]
