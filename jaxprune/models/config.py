"""Reading a Hugging Face `config.json` strictly: an unknown field is refused, not ignored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError, is_number

# Fields that every Hugging Face config may carry and that do not change a forward pass:
# bookkeeping, and generation settings that old releases wrote into the model's config.
INERT_FIELDS = frozenset(
    """
    _name_or_path _attn_implementation_autoset _commit_hash add_cross_attention architectures
    attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    projection_dim pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache vocab_size

    _attn_implementation_internal _flash_attn_2_enabled attention_probs_dropout_prob dropout_rate
    embd_pdrop gradient_checkpointing hidden_dropout hidden_dropout_prob layerdrop model_max_length
    resid_pdrop tokenizer_model_max_length tokenizer_padding_side unsloth_fixed unsloth_version
    use_flash_attn use_flash_attention_2 use_return_dict
    """.split()  # noqa: SIM905  one a word reads better
)


# Far above any model, and low enough that whatever is made of a config is made at once.
MOST = {"num_hidden_layers": 1000, "image_size": 2**14, "patch_size": 2**14}
MOST_OTHERWISE = 10**8
MOST_PATCHES = 10**6  # of a tile


def refuse_unknown(fields: Mapping[str, Any], handled: set[str], where: str) -> None:
    """Raise `UserError` when `fields` holds one that is neither handled nor inert."""
    # What is null, off or empty is not asked for.
    said = {name for name, value in fields.items() if value not in (None, False, {}, [], "")}
    unknown = sorted(said - handled - INERT_FIELDS)
    if unknown:
        raise UserError(
            f"{where} has fields that this port does not handle: {', '.join(unknown)}. "
            "Ignoring them could change the answers; remove them if they do not matter."
        )


def without_nulls(fields: Mapping[str, Any], *meant: str) -> dict[str, Any]:
    """The fields that say something: null is what a field that is left out is, but for `meant`."""
    return {name: x for name, x in fields.items() if x is not None or name in meant}


def require(
    fields: Mapping[str, Any], name: str, allowed: tuple[Any, ...], where: str, default: Any
) -> Any:
    """The value of `fields[name]`, refused when it is none of `allowed`."""
    value = fields.get(name, default)
    if not isinstance(value, str | int | None) or value not in allowed:
        raise UserError(
            f"{where} has {name}={value!r}; supported: {', '.join(repr(a) for a in allowed)}."
        )
    return value


def require_types(config: Any, where: str) -> None:
    """Raise `UserError` unless every attribute of a config dataclass has its declared type.

    Whole numbers have to be positive, and so have other numbers: none of the sizes, factors
    and epsilons of these models may be zero.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"{where} has {field.name}={value!r}; expected true or false.")
        most = MOST.get(field.name, MOST_OTHERWISE)
        if field.type is int and (type(value) is not int or not 1 <= value <= most):
            raise UserError(
                f"{where} has {field.name}={value!r}; expected a positive whole number, at most "
                f"{most:,}."
            )
        if field.type is float and not (is_number(value) and value > 0):
            raise UserError(f"{where} has {field.name}={value!r}; expected a positive number.")
        if field.type is str and not isinstance(value, str):
            raise UserError(f"{where} has {field.name}={value!r}; expected a text.")


def mapping(fields: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The object `fields[name]`; empty where it is absent or null.

    Raises:
        UserError: when it is something else.
    """
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} has {name}={value!r}; expected an object.")
    return dict(value)
