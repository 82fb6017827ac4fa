"""How CLIP's towers are stored, in the spelling of the Hub: `vision_model.*`, `text_model.*`."""

from jaxprune.models.weights import (
    KEEP,
    PATCHES,
    TRANSPOSE,
    KeyTable,
    Rule,
    Spelling,
    layer_norm,
    linear,
)


def _layers(tower: str) -> tuple[Rule, ...]:
    """The rules of a tower's layers."""
    there, here = f"{tower}.encoder.layers.{{l}}", "layers_{l}"
    return (
        *layer_norm(f"{there}.layer_norm1", f"{here}/layer_norm1"),
        *layer_norm(f"{there}.layer_norm2", f"{here}/layer_norm2"),
        *linear(f"{there}.self_attn.q_proj", f"{here}/self_attn/q_proj"),
        *linear(f"{there}.self_attn.k_proj", f"{here}/self_attn/k_proj"),
        *linear(f"{there}.self_attn.v_proj", f"{here}/self_attn/v_proj"),
        *linear(f"{there}.self_attn.out_proj", f"{here}/self_attn/out_proj"),
        *linear(f"{there}.mlp.fc1", f"{here}/mlp/fc1"),
        *linear(f"{there}.mlp.fc2", f"{here}/mlp/fc2"),
    )


CLIP = KeyTable(
    rules=(
        Rule("vision_model.embeddings.class_embedding", "class_embedding", KEEP),
        Rule("vision_model.embeddings.patch_embedding.weight", "patch_embedding/kernel", PATCHES),
        Rule("vision_model.embeddings.position_embedding.weight", "position_embedding", KEEP),
        # "layrnorm" is spelled so in the checkpoints.
        *layer_norm("vision_model.pre_layrnorm", "pre_layernorm"),
        *layer_norm("vision_model.post_layernorm", "post_layernorm"),
        *_layers("vision_model"),
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

CLIP_TEXT = KeyTable(
    rules=(
        Rule("text_model.embeddings.token_embedding.weight", "token_embedding/embedding", KEEP),
        Rule("text_model.embeddings.position_embedding.weight", "position_embedding", KEEP),
        *_layers("text_model"),
        *layer_norm("text_model.final_layer_norm", "final_layer_norm"),
        Rule("text_projection.weight", "text_projection/kernel", TRANSPOSE),
        *layer_norm("vision_model.post_layernorm", "post_layernorm"),
        Rule("visual_projection.weight", "visual_projection/kernel", TRANSPOSE),
    ),
    # The rest of the vision tower, and what training compares with.
    ignored=(
        r"vision_model\.(?!post_layernorm\.).*",
        r"text_model\.embeddings\.position_ids",
        r"logit_scale",
    ),
)
"""A text tower with both towers' projections, out of a whole CLIP."""
