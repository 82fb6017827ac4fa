"""Sizes of a LLaMA decoder, and of those that differ from it in little."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxprune.errors import UserError, check_choice, is_number
from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.config import mapping, refuse_unknown, require, require_types, without_nulls

REMAT = ("none", "dots", "full")

_WHERE = "The LLaMA config"
_SCALING_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
}
_OTHER_NAMES = {"su": "longrope"}  # what Phi-3 called it first

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
    "qwen2": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "phi3": {
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_size": 3072,
        "intermediate_size": 8192,
    },
}
MODEL_TYPES = tuple(_DEFAULTS)
"""The decoders, as `transformers` calls them.

A Mistral without a window is a LLaMA. Qwen2 has biases on queries, keys and values and on nothing
else; Qwen3 norms the heads of queries and keys; Phi-3 stores matrices that are read together as
one. Nothing else is different."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched.

    Attributes:
        kind: "default", "linear", "dynamic", "llama3" or "longrope".
        factor: how much longer the context is than it was.
        low_freq_factor, high_freq_factor: Llama 3's.
        original_max_position_embeddings: the context that the model had first.
        short_factor, long_factor: LongRoPE's divisors of each frequency, up to the original
            context and beyond it.
        attention_factor: LongRoPE's factor of cosines and sines, at any length.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        where = f"{_WHERE}, {self.kind!r} RoPE scaling"
        require_types(self, where)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"{where} has high_freq_factor={self.high_freq_factor}, not above "
                f"low_freq_factor={self.low_freq_factor}."
            )
        for name in ("short_factor", "long_factor"):
            if not all(is_number(x) and x > 0 for x in getattr(self, name)):
                raise UserError(f"{where} has a {name} that is no list of positive numbers.")

    @classmethod
    def from_hf(
        cls, fields: Mapping[str, Any], *, original_length: Any, length: Any
    ) -> "RopeScaling":
        """From `rope_scaling` (transformers 4) or `rope_parameters` (5), theta aside.

        Args:
            fields: those of the kind act; others do not, in transformers either.
            original_length: the context that the model had first.
            length: the one that it has.
        """
        fields = {**without_nulls(fields), "original_max_position_embeddings": original_length}
        old_name = fields.pop("type", "default")
        kind = fields.pop("rope_type", old_name)
        kind = _OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
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
        own = {name: fields[name] for name in _SCALING_FIELDS[kind]}
        if kind == "longrope":
            own |= _longrope(fields, original_length, length)
        return cls(kind=kind, **own)

    def to_hf(self) -> dict[str, Any]:
        names = set(_SCALING_FIELDS[self.kind])
        if self.kind == "longrope":
            names |= {"factor", "attention_factor"}
        fields = {name: getattr(self, name) for name in sorted(names)}
        lists = {name: list(x) for name, x in fields.items() if isinstance(x, tuple)}
        return {"rope_type": self.kind, **fields, **lists}


def _longrope(fields: Mapping[str, Any], original_length: Any, length: Any) -> dict[str, Any]:
    """LongRoPE's lists, and its factors where they are left to be computed."""
    lists = {name: fields[name] for name in ("short_factor", "long_factor")}
    if not all(isinstance(x, list | tuple) for x in lists.values()):
        raise UserError(f"{_WHERE} has 'longrope' RoPE scaling whose factors are no lists.")
    factor, attention = fields.get("factor"), fields.get("attention_factor")
    lengths = [original_length, length]
    if not all(type(n) is int and n > 1 for n in lengths):
        raise UserError(
            f"{_WHERE} has 'longrope' RoPE scaling from {original_length!r} to {length!r} "
            "positions; expected two numbers."
        )
    if factor is None:
        factor = length / original_length
    if attention is None:
        grown = is_number(factor) and factor > 1
        attention = math.sqrt(1 + math.log(factor) / math.log(original_length)) if grown else 1.0
    return {
        **{name: tuple(x) for name, x in lists.items()},
        "factor": factor,
        "attention_factor": attention,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder of LLaMA's making; the defaults are Vicuna-7B, the decoder of LLaVA-1.5-7B."""

    model_type: str = "llama"
    """One of `MODEL_TYPES` but "mistral"."""
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
    int8: bool = False
    """Whether the layers' matrices are rounded to 8 bits; see `models.int8`."""
    remat: str = "none"
    """What gradients compute again instead of keeping it. "none"; "dots": all but the products
    with weights; "full": all but each layer's input. Of a training run, not of the model."""

    def __post_init__(self) -> None:
        require_types(self, _WHERE)
        check_choice("remat", self.remat, REMAT)
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
        rope = self.rope_scaling
        for factors in (rope.short_factor, rope.long_factor):
            if rope.kind == "longrope" and 2 * len(factors) != self.head_dim:
                raise UserError(
                    f"{_WHERE} has 'longrope' RoPE scaling with {len(factors)} factors; expected "
                    f"half of head_dim={self.head_dim}."
                )

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias where the others have."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether every head of queries and keys is normed."""
        return self.model_type == "qwen3"

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
        """From the dict of a `transformers` config of one of `MODEL_TYPES`.

        Absent fields have that class's defaults. A Mistral whose attention has no window
        shorter than its context is a LLaMA.

        Raises:
            UserError: for a field or value that this port does not handle.
        """
        fields = without_nulls(fields, "sliding_window")
        names = {field.name for field in dataclasses.fields(cls)} - _OURS
        # max_sequence_length is a note in Vicuna's configs; RoPE's fields decide.
        handled = {"rope_parameters", "max_sequence_length", "sliding_window"}
        handled |= {"original_max_position_embeddings"}
        kind = require(fields, "model_type", MODEL_TYPES, _WHERE, "llama")
        fields = _without_unused_window(fields, kind)
        refuse_unknown(fields, names | handled, _WHERE)
        require(fields, "hidden_act", tuple(ACTIVATIONS), _WHERE, "silu")

        rope = mapping(fields, "rope_scaling", _WHERE) or mapping(fields, "rope_parameters", _WHERE)
        theta = rope.pop("rope_theta", None)
        if theta is None:
            theta = fields.get("rope_theta")
        defaults = dict(_DEFAULTS[kind])
        heads = fields.get("num_attention_heads", 32)
        hidden_size = fields.get("hidden_size", defaults.get("hidden_size", 4096))
        few = defaults.pop("num_key_value_heads", None)
        shared = fields.get("num_key_value_heads", few)
        width = fields.get("head_dim", defaults.pop("head_dim", None))
        divisible = type(heads) is int and type(hidden_size) is int and heads > 0
        given = {name: fields[name] for name in names if fields.get(name) is not None}
        computed = {
            "num_key_value_heads": heads if shared is None else shared,
            # Sizes that are none are refused by name below.
            "head_dim": (hidden_size // heads if divisible else 1) if width is None else width,
            "rope_theta": 10000.0 if theta is None else theta,
            "rope_scaling": RopeScaling.from_hf(
                rope,
                original_length=_original_length(fields, rope, kind),
                length=fields.get("max_position_embeddings", defaults["max_position_embeddings"]),
            ),
            "model_type": "llama" if kind == "mistral" else kind,
            "dtype": dtype,
        }
        if kind == "qwen2":
            computed["attention_bias"] = True
        window = fields.get("sliding_window", defaults.pop("sliding_window", None))
        config = cls(**{**defaults, **given, **computed})
        if window is not None and (type(window) is not int or window < config.context_length):
            raise UserError(
                f"{_WHERE} has sliding_window={window!r}, but this port attends to the whole "
                f"context of {config.context_length}; supported: null, or no less than that."
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """The dict that the class of `model_type` in transformers 4 and 5 reads back."""
        fields = dataclasses.asdict(self)
        for name in _OURS | {"dtype", "rope_scaling"}:
            del fields[name]
        for name in _NOT_FIELDS.get(self.model_type, ()):
            del fields[name]
        if self.rope_scaling.kind != "default":
            fields["rope_scaling"] = self.rope_scaling.to_hf()
        if self.rope_scaling.kind == "longrope":  # where Phi-3 of transformers 4 looks for it
            name = "original_max_position_embeddings"
            fields[name] = fields["rope_scaling"][name]
        if self.model_type == "phi3":  # its class has an id of the published vocabulary
            fields["pad_token_id"] = None
        return fields


_OURS = {"rope_sections", "int8", "remat"}
"""What no config.json says."""

# What LLaMA's config has and another's has not.
_NOT_FIELDS = {
    "qwen2": ("attention_bias", "mlp_bias"),
    "qwen3": ("mlp_bias",),
    "phi3": ("attention_bias", "mlp_bias", "head_dim"),
}


def _without_unused_window(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields without those of an attention window that no layer has.

    Qwen has one where `use_sliding_window` says so; layers are listed by what they have.
    """
    layers = fields.get("layer_types")
    if isinstance(layers, list) and set(layers) == {"full_attention"}:
        fields = {name: x for name, x in fields.items() if name != "layer_types"}
    if kind.startswith("qwen") and not fields.get("use_sliding_window"):
        window = ("sliding_window", "max_window_layers", "use_sliding_window")
        fields = {name: x for name, x in fields.items() if name not in window}
    return fields


def _original_length(fields: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> Any:
    """The context that a model had before its RoPE was scaled, as transformers 5 finds it."""
    name = "original_max_position_embeddings"
    default = _DEFAULTS[kind]["max_position_embeddings"]
    own = fields.get(name, rope.get(name))
    if own is None and kind == "phi3":
        return default
    return fields.get("max_position_embeddings", default) if own is None else own


def with_remat(config: Any, remat: str) -> Any:
    """The config of a model whose decoder is trained with so much computed again."""
    text = dataclasses.replace(config.text_config, remat=remat)
    return dataclasses.replace(config, text_config=text)
