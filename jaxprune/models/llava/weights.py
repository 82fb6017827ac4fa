"""How LLaVA is stored.

The spelling kept is the one of the Hugging Face Hub, which every `transformers` reads:
`vision_tower.vision_model.*`, `multi_modal_projector.*`, `language_model.model.*`,
`language_model.lm_head.*`.
"""

import functools

from jaxprune.models.clip.weights import CLIP
from jaxprune.models.llama.weights import decoder_table
from jaxprune.models.weights import KeyTable, Spelling, linear

PROJECTOR = KeyTable(
    rules=(
        *linear("multi_modal_projector.linear_1", "multi_modal_projector/linear_1"),
        *linear("multi_modal_projector.linear_2", "multi_modal_projector/linear_2"),
    ),
    spellings=(
        # The publisher's original checkpoints.
        Spelling(r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        Spelling(r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        # transformers from 4.52 on.
        Spelling(r"model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
)

WHOLE = KeyTable(
    spellings=(
        # The publisher's original checkpoints.
        Spelling(r"model\.vision_tower\.vision_tower\.", "vision_tower."),
        # transformers from 4.52 on.
        Spelling(r"model\.vision_tower\.", "vision_tower."),
        Spelling(r"model\.language_model\.", "language_model.model."),
        Spelling(r"lm_head\.", "language_model.lm_head."),
        # The decoder alone, as in the original checkpoints; a CLIP tower in a directory of its
        # own.
        Spelling(r"model\.", "language_model.model."),
        Spelling(r"vision_model\.", "vision_tower.vision_model."),
        # Levels that some releases of transformers wrote twice, or put the head under.
        Spelling(r"language_model\.model\.model\.", "language_model.model."),
        Spelling(r"language_model\.model\.lm_head\.", "language_model.lm_head."),
        Spelling(
            r"(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower.vision_model."
        ),
    ),
)


@functools.cache
def llava_table(model_type: str) -> KeyTable:
    """How a LLaVA is stored whose decoder `transformers` calls so."""
    return (
        PROJECTOR
        + WHOLE
        + CLIP.under("vision_tower.", "vision_tower/")
        + decoder_table(model_type).under("language_model.", "language_model/")
    )
