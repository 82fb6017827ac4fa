"""The model families, and which one a config or a name is of."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxprune.errors import UserError
from jaxprune.models import internvl, llava, llava_hr, llava_next, video_llava
from jaxprune.models.family import Family, ModelConfig
from jaxprune.models.weights import KeyTable
from jaxprune.ops.cuts import Depth

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        llava.FAMILY,
        llava_next.FAMILY,
        llava_hr.FAMILY,
        video_llava.FAMILY,
        internvl.FAMILY,
    )
}
"""By the `model_type` of their `config.json`."""

PRESETS: Mapping[str, Callable[..., ModelConfig]] = {
    name: make for family in FAMILIES.values() for name, make in family.presets.items()
}
"""Configs of published sizes by name, for counting costs without any weights."""


def family_of(config: object) -> Family:
    """The family of a model's config.

    Raises:
        UserError: for a config of no known family.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    known = ", ".join(family.config.__name__ for family in FAMILIES.values())
    raise UserError(f"config is a {type(config).__name__}; expected one of: {known}.")


def family_of_fields(fields: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None for an unknown one."""
    # A later one may be a special case of an earlier one.
    return next((f for f in reversed(list(FAMILIES.values())) if f.recognises(fields)), None)


def table_of(config: object) -> KeyTable:
    """How a model's weights are stored."""
    return family_of(config).weights(config)


def fingerprint(config: ModelConfig) -> str:
    """12 hex digits of a model's architecture: the same for every dtype and weights."""
    fields = json.dumps(config.to_hf(), sort_keys=True, default=str)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


def sizes(config: ModelConfig) -> tuple[object, ...]:
    """What recipes for a published model ask of another one: the family and decoder's shape.

    Not its vocabulary, token ids or dtype; and for another number of visual tokens recipes scale.
    """
    c = config.text_config
    decoder = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads)
    return (config.family, *decoder, c.num_key_value_heads, c.head_dim)


@functools.lru_cache(maxsize=64)
def depth_of(config: ModelConfig) -> Depth:
    """What methods have to know of a model: its layers, its CLS token, what recipes call it."""
    presets = [name for name, make in PRESETS.items() if sizes(make()) == sizes(config)]
    return Depth(
        config.text_config.num_hidden_layers,
        frozenset([fingerprint(config), *presets]),
        spare_cls=config.tower.spare_cls,
        grid=config.tower.grid,
    )
