"""How InternViT is stored, in the spelling of `transformers`; the publisher's is read too."""

from jaxprune.models.weights import (
    KEEP,
    PATCHES,
    KeyTable,
    Rule,
    Spelling,
    Transform,
    layer_norm,
    linear,
)

# [1, 1, C] and [1, S, C] there, [C] and [S, C] here.
_CLS = Transform(lambda x: x.reshape(x.shape[-1]), lambda x: x[None, None])
_POSITIONS = Transform(lambda x: x.reshape(x.shape[-2:]), lambda x: x[None])

_LAYER, _HERE = "encoder.layer.{l}", "layers_{l}"
_NAMES = {  # the publisher's within a layer, and transformers'
    r"norm1\.": "layernorm_before.",
    r"norm2\.": "layernorm_after.",
    r"attn\.proj\.": "attention.projection_layer.",
    r"attn\.": "attention.",
    r"ls1\Z": "lambda_1",
    r"ls2\Z": "lambda_2",
}
_QKV = tuple(f"{_HERE}/self_attn/{name}_proj" for name in "qkv")

INTERNVIT = KeyTable(
    rules=(
        Rule("embeddings.cls_token", "class_embedding", _CLS),
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", PATCHES),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias", KEEP),
        Rule("embeddings.position_embeddings", "position_embedding", _POSITIONS),
        *layer_norm(f"{_LAYER}.layernorm_before", f"{_HERE}/layer_norm1"),
        *layer_norm(f"{_LAYER}.layernorm_after", f"{_HERE}/layer_norm2"),
        *linear(f"{_LAYER}.attention.q_proj", _QKV[0]),
        *linear(f"{_LAYER}.attention.k_proj", _QKV[1]),
        *linear(f"{_LAYER}.attention.v_proj", _QKV[2]),
        *linear(f"{_LAYER}.attention.projection_layer", f"{_HERE}/self_attn/out_proj"),
        Rule(f"{_LAYER}.attention.q_norm.weight", f"{_HERE}/self_attn/q_norm/scale", KEEP),
        Rule(f"{_LAYER}.attention.k_norm.weight", f"{_HERE}/self_attn/k_norm/scale", KEEP),
        *linear(f"{_LAYER}.mlp.fc1", f"{_HERE}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.fc2", f"{_HERE}/mlp/fc2"),
        Rule(f"{_LAYER}.lambda_1", f"{_HERE}/scale1", KEEP),
        Rule(f"{_LAYER}.lambda_2", f"{_HERE}/scale2", KEEP),
    ),
    also_read=linear(f"{_LAYER}.attention.qkv", _QKV),  # the publisher's, one below the other
    spellings=(
        Spelling(r"embeddings\.class_embedding\Z", "embeddings.cls_token"),
        Spelling(r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
        Spelling(r"embeddings\.position_embedding\Z", "embeddings.position_embeddings"),
        Spelling(r"encoder\.layers\.", "encoder.layer."),
        *(
            Spelling(rf"encoder\.layer\.(\d+)\.{theirs}", rf"encoder.layer.\1.{ours}")
            for theirs, ours in _NAMES.items()
        ),
    ),
    partition=(
        (r".*/(q_proj|k_proj|v_proj|fc1)/kernel", 1),
        (r".*/(q_proj|k_proj|v_proj|fc1)/bias", 0),
        (r".*/(out_proj|fc2)/kernel", 0),
    ),
)
