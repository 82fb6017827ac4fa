"""Which stored tensor is which parameter: one table, read in both directions."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """PyTorch's layout -> ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    export: Callable[[np.ndarray], np.ndarray]


def _load_patches(x: np.ndarray) -> np.ndarray:
    """Convolution `[C, 3, p, p]` -> matrix `[p * p * 3, C]`."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _export_patches(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, x.shape[1]).transpose(3, 2, 0, 1)


KEEP = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(np.transpose, np.transpose)
PATCHES = Transform(_load_patches, _export_patches)

_TOWER = "vision_tower.vision_model"
_LAYER = f"{_TOWER}.encoder.layers.{{l}}"
_TEXT = "language_model.model"

# (key in the Hub's spelling, path in the parameter tree, transform). A field in braces
# stands for the same text on both sides: {l}, {n} a number, any other a word.
CLIP = [
    (f"{_TOWER}.embeddings.class_embedding", "vision_tower/class_embedding", KEEP),
    (f"{_TOWER}.embeddings.patch_embedding.weight", "vision_tower/patch_embedding/kernel", PATCHES),
    (f"{_TOWER}.embeddings.position_embedding.weight", "vision_tower/position_embedding", KEEP),
    # "layrnorm" is spelled so in the checkpoints.
    (f"{_TOWER}.pre_layrnorm.weight", "vision_tower/pre_layernorm/scale", KEEP),
    (f"{_TOWER}.pre_layrnorm.bias", "vision_tower/pre_layernorm/bias", KEEP),
    (f"{_TOWER}.post_layernorm.weight", "vision_tower/post_layernorm/scale", KEEP),
    (f"{_TOWER}.post_layernorm.bias", "vision_tower/post_layernorm/bias", KEEP),
    (f"{_LAYER}.layer_norm{{n}}.weight", "vision_tower/layers_{l}/layer_norm{n}/scale", KEEP),
    (f"{_LAYER}.layer_norm{{n}}.bias", "vision_tower/layers_{l}/layer_norm{n}/bias", KEEP),
    (f"{_LAYER}.self_attn.{{p}}.weight", "vision_tower/layers_{l}/self_attn/{p}/kernel", TRANSPOSE),
    (f"{_LAYER}.self_attn.{{p}}.bias", "vision_tower/layers_{l}/self_attn/{p}/bias", KEEP),
    (f"{_LAYER}.mlp.{{p}}.weight", "vision_tower/layers_{l}/mlp/{p}/kernel", TRANSPOSE),
    (f"{_LAYER}.mlp.{{p}}.bias", "vision_tower/layers_{l}/mlp/{p}/bias", KEEP),
]
PROJECTOR = [
    ("multi_modal_projector.{p}.weight", "multi_modal_projector/{p}/kernel", TRANSPOSE),
    ("multi_modal_projector.{p}.bias", "multi_modal_projector/{p}/bias", KEEP),
]
_TEXT_LAYER = f"{_TEXT}.layers.{{l}}"
_LLAMA_LAYER = "language_model/layers_{l}"
LLAMA = [
    (f"{_TEXT}.embed_tokens.weight", "language_model/embed_tokens/embedding", KEEP),
    (f"{_TEXT}.norm.weight", "language_model/norm/scale", KEEP),
    ("language_model.lm_head.weight", "language_model/lm_head/kernel", TRANSPOSE),
    (f"{_TEXT_LAYER}.self_attn.{{p}}.weight", f"{_LLAMA_LAYER}/self_attn/{{p}}/kernel", TRANSPOSE),
    (f"{_TEXT_LAYER}.self_attn.{{p}}.bias", f"{_LLAMA_LAYER}/self_attn/{{p}}/bias", KEEP),
    (f"{_TEXT_LAYER}.mlp.{{p}}.weight", f"{_LLAMA_LAYER}/mlp/{{p}}/kernel", TRANSPOSE),
    (f"{_TEXT_LAYER}.mlp.{{p}}.bias", f"{_LLAMA_LAYER}/mlp/{{p}}/bias", KEEP),
    (f"{_TEXT_LAYER}.{{w}}_layernorm.weight", f"{_LLAMA_LAYER}/{{w}}_layernorm/scale", KEEP),
]  # fmt: skip
LLAVA = CLIP + PROJECTOR + LLAMA
TABLES = {"llava": LLAVA, "llava_next": [*LLAVA, ("image_newline", "image_newline", KEEP)]}


@functools.cache
def _compiled(table: str, exporting: bool) -> list[tuple[re.Pattern, str, Transform]]:
    rules = []
    for key, path, transform in TABLES[table]:
        source, target = (path, key) if exporting else (key, path)
        pattern = re.sub(r"\\\{([ln])\\\}", r"(?P<\1>\\d+)", re.escape(source))
        pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\w+)", pattern)
        rules.append((re.compile(pattern), target, transform))
    return rules


def _match(table: str, name: str, exporting: bool) -> tuple[str, Transform] | None:
    hits = []
    for pattern, target, transform in _compiled(table, exporting):
        found = pattern.fullmatch(name)
        if found:
            hits.append((target.format(**found.groupdict()), transform))
    if len(hits) > 1:
        raise AssertionError(f"{name} matches {len(hits)} rules of the table {table}")
    return hits[0] if hits else None


def path_of(table: str, key: str) -> tuple[str, Transform] | None:
    """A key in the Hub's spelling -> parameter path and transform; None if no rule fits."""
    return _match(table, key, exporting=False)


def key_of(table: str, path: str) -> tuple[str, Transform]:
    """A parameter path -> key in the Hub's spelling and transform."""
    found = _match(table, path, exporting=True)
    if found is None:
        raise AssertionError(f"the table {table} has no rule for the parameter {path}")
    return found
