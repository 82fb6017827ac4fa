"""How LLaMA decoders are stored, under `model.` and `lm_head.`; and those that differ in little."""

import dataclasses
import re
from typing import Any

from jaxprune.models.weights import KEEP, TRANSPOSE, KeyTable, Rule, Spelling, linear

_LAYER, _HERE = "model.layers.{l}", "layers_{l}"
_QKV = tuple(f"{_HERE}/self_attn/{name}_proj" for name in "qkv")
_GATE_UP = tuple(f"{_HERE}/mlp/{name}_proj" for name in ("gate", "up"))
_SEPARATE = tuple(
    rule
    for path in (*_QKV, *_GATE_UP)
    for rule in linear(path.replace(_HERE, _LAYER).replace("/", "."), path)
)
_STACKED = (
    *linear(f"{_LAYER}.self_attn.qkv_proj", _QKV),
    *linear(f"{_LAYER}.mlp.gate_up_proj", _GATE_UP),
)


def _key_value_heads(config: Any) -> int:
    heads: int = config.text_config.num_key_value_heads
    return heads


# A block for each key/value head: its queries, its keys, its values.
_GROUPED = linear(f"{_LAYER}.self_attn.wqkv", _QKV, _key_value_heads)

_INTERNLM2 = {  # its names within a layer, and LLaMA's
    "attention.wqkv": "self_attn.wqkv",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SPELLINGS = (
    Spelling(r"model\.tok_embeddings\.", "model.embed_tokens."),
    Spelling(r"output\.", "lm_head."),
    *(
        Spelling(rf"model\.layers\.(\d+)\.{re.escape(theirs)}\.", rf"model.layers.\1.{ours}.")
        for theirs, ours in _INTERNLM2.items()
    ),
    # A decoder inside another model may come without the level of its own.
    Spelling(r"(?!model\.|lm_head\.)", "model."),
)

LLAMA = KeyTable(
    rules=(
        Rule("model.embed_tokens.weight", "embed_tokens/embedding", KEEP),
        Rule("model.norm.weight", "norm/scale", KEEP),
        # With tied words the head is the embedding, and a stored one is the same.
        Rule("lm_head.weight", "lm_head/kernel", TRANSPOSE, optional=True),
        Rule(f"{_LAYER}.input_layernorm.weight", f"{_HERE}/input_layernorm/scale", KEEP),
        Rule(
            f"{_LAYER}.post_attention_layernorm.weight",
            f"{_HERE}/post_attention_layernorm/scale",
            KEEP,
        ),
        *_SEPARATE,
        Rule(f"{_LAYER}.self_attn.q_norm.weight", f"{_HERE}/self_attn/q_norm/scale", KEEP),
        Rule(f"{_LAYER}.self_attn.k_norm.weight", f"{_HERE}/self_attn/k_norm/scale", KEEP),
        *linear(f"{_LAYER}.self_attn.o_proj", f"{_HERE}/self_attn/o_proj"),
        *linear(f"{_LAYER}.mlp.down_proj", f"{_HERE}/mlp/down_proj"),
    ),
    also_read=(*_STACKED, *_GROUPED),
    spellings=_SPELLINGS,
    # Buffers that old releases stored and any model recomputes.
    ignored=(r".*\.rotary_emb\.inv_freq",),
    partition=(
        (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", 1),
        (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/(bias|scale)", 0),
        (r".*/(o_proj|down_proj)/kernel", 0),
        (r"lm_head/kernel", 1),
        (r"embed_tokens/embedding", 0),
    ),
    words=("embed_tokens/embedding", "lm_head/kernel"),
)

PHI3 = dataclasses.replace(
    LLAMA,
    rules=(*(rule for rule in LLAMA.rules if rule not in _SEPARATE), *_STACKED),
    also_read=(*_SEPARATE, *_GROUPED),
)


def decoder_table(model_type: str) -> KeyTable:
    """How a decoder is stored, by what `transformers` calls it."""
    return PHI3 if model_type == "phi3" else LLAMA
