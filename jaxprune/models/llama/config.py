"""Sizes of a LLaMA decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import mapping, refuse_unknown, require, require_types, without_nulls

_WHERE = "The LLaMA config"
_SCALING_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


# What transformers takes for a field that a config.json leaves out, by its model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "vocab_size": 32000,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched: kind "default", "linear", "dynamic" or "llama3"."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        where = f"{_WHERE}, {self.kind!r} RoPE scaling"
        require_types(self, where)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"{where} has high_freq_factor={self.high_freq_factor}, not above "
                f"low_freq_factor={self.low_freq_factor}."
            )

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, length: Any) -> "RopeScaling":
        """From `rope_scaling` (transformers 4) or `rope_parameters` (5), theta aside.

        Args:
            fields: those of the kind act; others do not, in transformers either.
            length: the original context, of which only "llama3" asks.
        """
        fields = {**without_nulls(fields), "original_max_position_embeddings": length}
        old_name = fields.pop("type", "default")
        kind = fields.pop("rope_type", old_name)
        if fields.get("partial_rotary_factor") == 1:
            del fields["partial_rotary_factor"]  # all of a head is rotated, as always here
        if not isinstance(kind, str) or kind not in _SCALING_FIELDS:
            raise UserError(
                f"{_WHERE} has RoPE scaling {kind!r}; supported: {', '.join(_SCALING_FIELDS)}."
            )
        missing = _SCALING_FIELDS[kind] - set(fields)
        if missing or "partial_rotary_factor" in fields:
            raise UserError(
                f"{_WHERE} has {kind!r} RoPE scaling without {sorted(missing)}, or with "
                f"partial_rotary_factor; expected {sorted(_SCALING_FIELDS[kind])}."
            )
        return cls(kind=kind, **{name: fields[name] for name in _SCALING_FIELDS[kind]})

    def to_hf(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in sorted(_SCALING_FIELDS[self.kind])}
        return {"rope_type": self.kind, **fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A LLaMA decoder; the defaults are Vicuna-7B, the language model of LLaVA-1.5-7B."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_sections: tuple[int, ...] | None = None
    """Where positions have several axes, how many frequencies of a head follow each."""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_types(self, _WHERE)
        if self.rope_sections is not None and sum(self.rope_sections) * 2 != self.head_dim:
            raise UserError(
                f"{_WHERE} has rope_sections={self.rope_sections}, which do not add up to half of "
                f"head_dim={self.head_dim}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{_WHERE} has {self.num_attention_heads} attention heads, which its "
                f"{self.num_key_value_heads} key/value heads do not divide."
            )
        if self.head_dim % 2:
            raise UserError(f"{_WHERE} has head_dim={self.head_dim}; RoPE needs an even number.")

    @property
    def context_length(self) -> int:
        """Positions the model can tell apart, its RoPE scaling counted in."""
        if self.rope_scaling.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings

    def mesh_splits(self) -> dict[str, int]:
        """What a mesh's "model" axis has to divide."""
        return {
            "attention heads": self.num_attention_heads,
            "key/value heads": self.num_key_value_heads,
            "MLP features": self.intermediate_size,
        }

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, dtype: str = "float32") -> "LlamaConfig":
        """From the dict of a `transformers` `LlamaConfig` or `MistralConfig`.

        Absent fields have that class's defaults. A Mistral whose attention has no window
        shorter than its context is a LLaMA.

        Raises:
            UserError: for a field or value that this port does not handle.
        """
        fields = without_nulls(fields, "sliding_window")
        names = {field.name for field in dataclasses.fields(cls)} - {"rope_sections"}
        # max_sequence_length is a note in Vicuna's configs; RoPE's fields decide.
        handled = {"rope_parameters", "max_sequence_length", "sliding_window"}
        handled |= {"original_max_position_embeddings"}
        refuse_unknown(fields, names | handled, _WHERE)
        kind = require(fields, "model_type", tuple(_DEFAULTS), _WHERE, "llama")
        require(fields, "hidden_act", tuple(ACTIVATIONS), _WHERE, "silu")

        rope = mapping(fields, "rope_scaling", _WHERE) or mapping(fields, "rope_parameters", _WHERE)
        theta = rope.pop("rope_theta", None)
        if theta is None:
            theta = fields.get("rope_theta")
        heads = fields.get("num_attention_heads", 32)
        hidden_size = fields.get("hidden_size", 4096)
        defaults = dict(_DEFAULTS[kind])
        few = defaults.pop("num_key_value_heads", None)
        shared, width = fields.get("num_key_value_heads", few), fields.get("head_dim")
        divisible = type(heads) is int and type(hidden_size) is int and heads > 0
        given = {name: fields[name] for name in names if fields.get(name) is not None}
        computed = {
            "num_key_value_heads": heads if shared is None else shared,
            # Sizes that are none are refused by name below.
            "head_dim": (hidden_size // heads if divisible else 1) if width is None else width,
            "rope_theta": 10000.0 if theta is None else theta,
            "rope_scaling": RopeScaling.from_hf(rope, length=_original_length(fields, rope, kind)),
            "dtype": dtype,
        }
        window = fields.get("sliding_window", defaults.pop("sliding_window", None))
        config = cls(**{**defaults, **given, **computed})
        if window is not None and (type(window) is not int or window < config.context_length):
            raise UserError(
                f"{_WHERE} has sliding_window={window!r}, but this port attends to the whole "
                f"context of {config.context_length}; supported: null, or no less than that."
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """The dict that `LlamaConfig` of transformers 4 and 5 reads back."""
        fields = dataclasses.asdict(self)
        del fields["dtype"], fields["rope_scaling"], fields["rope_sections"]
        if self.rope_scaling.kind != "default":
            fields["rope_scaling"] = self.rope_scaling.to_hf()
        return {"model_type": "llama", **fields}


def _original_length(fields: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> Any:
    """The context that a model had before its RoPE was scaled, as transformers 5 finds it."""
    name = "original_max_position_embeddings"
    default = _DEFAULTS[kind]["max_position_embeddings"]
    own = fields.get(name, rope.get(name))
    return fields.get("max_position_embeddings", default) if own is None else own
