"""How InternVL is stored, in the spelling of `transformers`; the publisher's is read too."""

import functools

from jaxprune.models.internvit.weights import INTERNVIT
from jaxprune.models.llama.weights import decoder_table
from jaxprune.models.weights import KeyTable, Spelling, layer_norm, linear

_PROJECTOR = KeyTable(
    rules=(
        *layer_norm("multi_modal_projector.layer_norm", "multi_modal_projector/layer_norm"),
        *linear("multi_modal_projector.linear_1", "multi_modal_projector/linear_1"),
        *linear("multi_modal_projector.linear_2", "multi_modal_projector/linear_2"),
    ),
    spellings=(
        # The publisher's.
        Spelling(r"mlp1\.0\.", "multi_modal_projector.layer_norm."),
        Spelling(r"mlp1\.1\.", "multi_modal_projector.linear_1."),
        Spelling(r"mlp1\.3\.", "multi_modal_projector.linear_2."),
        Spelling(r"vision_model\.", "vision_tower."),
        # transformers from 4.52 on.
        Spelling(r"model\.(?=multi_modal_projector\.|vision_tower\.)", ""),
        Spelling(r"model\.language_model\.", "language_model.model."),
        Spelling(r"lm_head\.", "language_model.lm_head."),
    ),
)


@functools.cache
def internvl_table(model_type: str) -> KeyTable:
    """How an InternVL is stored whose decoder `transformers` calls so."""
    return (
        _PROJECTOR
        + INTERNVIT.under("vision_tower.", "vision_tower/")
        + decoder_table(model_type).under("language_model.", "language_model/")
    )
