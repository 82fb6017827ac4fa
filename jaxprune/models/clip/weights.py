"""How CLIP towers are stored, in the spelling of the Hub: `vision_model.*`."""

from jaxprune.models.weights import (
    KEEP,
    PATCHES,
    KeyTable,
    Rule,
    Spelling,
    layer_norm,
    linear,
)

_LAYER, _HERE = "vision_model.encoder.layers.{l}", "layers_{l}"

CLIP = KeyTable(
    rules=(
        Rule("vision_model.embeddings.class_embedding", "class_embedding", KEEP),
        Rule("vision_model.embeddings.patch_embedding.weight", "patch_embedding/kernel", PATCHES),
        Rule("vision_model.embeddings.position_embedding.weight", "position_embedding", KEEP),
        # "layrnorm" is spelled so in the checkpoints.
        *layer_norm("vision_model.pre_layrnorm", "pre_layernorm"),
        *layer_norm("vision_model.post_layernorm", "post_layernorm"),
        *layer_norm(f"{_LAYER}.layer_norm1", f"{_HERE}/layer_norm1"),
        *layer_norm(f"{_LAYER}.layer_norm2", f"{_HERE}/layer_norm2"),
        *linear(f"{_LAYER}.self_attn.q_proj", f"{_HERE}/self_attn/q_proj"),
        *linear(f"{_LAYER}.self_attn.k_proj", f"{_HERE}/self_attn/k_proj"),
        *linear(f"{_LAYER}.self_attn.v_proj", f"{_HERE}/self_attn/v_proj"),
        *linear(f"{_LAYER}.self_attn.out_proj", f"{_HERE}/self_attn/out_proj"),
        *linear(f"{_LAYER}.mlp.fc1", f"{_HERE}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.fc2", f"{_HERE}/mlp/fc2"),
    ),
    # transformers from 5 on leaves a level out.
    spellings=(Spelling(r"(?!vision_model\.)", "vision_model."),),
    # A buffer that old releases stored and any model recomputes.
    ignored=(r"vision_model\.embeddings\.position_ids",),
    partition=(
        (r".*/(q_proj|k_proj|v_proj|fc1)/kernel", 1),
        (r".*/(q_proj|k_proj|v_proj|fc1)/bias", 0),
        (r".*/(out_proj|fc2)/kernel", 0),
    ),
)
