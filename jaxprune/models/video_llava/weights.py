"""How Video-LLaVA is stored: as transformers spells it, or, with attention over frames, as its
publisher does."""

import dataclasses

from jaxprune.models.clip.weights import CLIP
from jaxprune.models.llama.weights import LLAMA
from jaxprune.models.llava.weights import PROJECTOR
from jaxprune.models.weights import (
    KeyTable,
    Rule,
    Spelling,
    Transform,
    layer_norm,
    linear,
)

IMAGE_TOWER, VIDEO_TOWER = "model.image_tower.image_tower.", "model.video_tower.video_tower."

HUB = (
    PROJECTOR
    + KeyTable(
        spellings=(
            # transformers from 4.52 on.
            Spelling(r"model\.(?=image_tower\.|video_tower\.)", ""),
            Spelling(r"model\.language_model\.", "language_model.model."),
            Spelling(r"lm_head\.", "language_model.lm_head."),
        ),
    )
    + CLIP.under("image_tower.", "image_tower/")
    + CLIP.under("video_tower.", "video_tower/")
    + LLAMA.under("language_model.", "language_model/")
)

_BARE_CLIP = dataclasses.replace(
    CLIP,
    rules=tuple(
        rule.renamed(lambda key: key.removeprefix("vision_model."), lambda path: path)
        for rule in CLIP.rules
    ),
    spellings=(Spelling(r"vision_model\.", ""),),
    ignored=(r"embeddings\.position_ids",),
)
_FRAMES = Transform(lambda x: x[0], lambda x: x[None])
"""`[1, 8, C]` there, `[8, C]` here."""

_LAYER, _HERE = "encoder.layers.{l}", "layers_{l}"
_TEMPORAL = KeyTable(
    rules=(
        Rule(f"{_LAYER}.temporal_embedding", f"{_HERE}/temporal_embedding", _FRAMES),
        *layer_norm(f"{_LAYER}.temporal_layer_norm1", f"{_HERE}/temporal_norm"),
        *linear(f"{_LAYER}.temporal_attn.q_proj", f"{_HERE}/temporal_attn/q_proj"),
        *linear(f"{_LAYER}.temporal_attn.k_proj", f"{_HERE}/temporal_attn/k_proj"),
        *linear(f"{_LAYER}.temporal_attn.v_proj", f"{_HERE}/temporal_attn/v_proj"),
        *linear(f"{_LAYER}.temporal_attn.out_proj", f"{_HERE}/temporal_attn/out_proj"),
    ),
)

PUBLISHED = (
    KeyTable(
        rules=(
            *linear("model.mm_projector.0", "multi_modal_projector/linear_1"),
            *linear("model.mm_projector.2", "multi_modal_projector/linear_2"),
        ),
    )
    + _BARE_CLIP.under(IMAGE_TOWER, "image_tower/")
    + (_BARE_CLIP + _TEMPORAL).under(VIDEO_TOWER, "video_tower/")
    + LLAMA.under("", "language_model/")
)
