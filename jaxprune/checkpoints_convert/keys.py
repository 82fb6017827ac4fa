"""One spelling for every published spelling of a LLaVA checkpoint's keys.

The spelling kept is the one of the Hugging Face Hub, which every `transformers` reads:
`vision_tower.vision_model.*`, `multi_modal_projector.*`, `language_model.model.*`,
`language_model.lm_head.*`.
"""

import re

_REWRITES = [
    # The publisher's original checkpoints.
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    # transformers from 4.52 on.
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    # The decoder alone, as in the original checkpoints; a bare CLIP tower.
    (r"^model\.", "language_model.model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^vision_model\.", "vision_tower.vision_model."),
    (r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower.vision_model."),
    # transformers from 5 on leaves a level out of CLIP.
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
]

# Buffers that old releases stored and any model recomputes.
_IGNORED = re.compile(r"(\.position_ids|\.rotary_emb\.inv_freq)$")


def canonical_key(key: str) -> str | None:
    """The Hub's spelling of a key, or None for a buffer that holds no weights."""
    if _IGNORED.search(key):
        return None
    for pattern, replacement in _REWRITES:
        key = re.sub(pattern, replacement, key)
    return key
