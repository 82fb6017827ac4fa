"""How LLaMA decoders are stored, in the spelling of the Hub: `model.*` and `lm_head.*`."""

from jaxprune.models.weights import KEEP, TRANSPOSE, KeyTable, Rule, Spelling, linear

_LAYER, _HERE = "model.layers.{l}", "layers_{l}"

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
        *linear(f"{_LAYER}.self_attn.q_proj", f"{_HERE}/self_attn/q_proj"),
        *linear(f"{_LAYER}.self_attn.k_proj", f"{_HERE}/self_attn/k_proj"),
        *linear(f"{_LAYER}.self_attn.v_proj", f"{_HERE}/self_attn/v_proj"),
        *linear(f"{_LAYER}.self_attn.o_proj", f"{_HERE}/self_attn/o_proj"),
        *linear(f"{_LAYER}.mlp.gate_proj", f"{_HERE}/mlp/gate_proj"),
        *linear(f"{_LAYER}.mlp.up_proj", f"{_HERE}/mlp/up_proj"),
        *linear(f"{_LAYER}.mlp.down_proj", f"{_HERE}/mlp/down_proj"),
    ),
    # A decoder inside another model may come without the level of its own.
    spellings=(Spelling(r"(?!model\.|lm_head\.)", "model."),),
    # Buffers that old releases stored and any model recomputes.
    ignored=(r".*\.rotary_emb\.inv_freq",),
    partition=(
        (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", 1),
        (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias", 0),
        (r".*/(o_proj|down_proj)/kernel", 0),
        (r"lm_head/kernel", 1),
        (r"embed_tokens/embedding", 0),
    ),
    words=("embed_tokens/embedding", "lm_head/kernel"),
)
