"""Low-rank adapters (LoRA, arXiv 2106.09685), merged into their base while it is read.

Two forms: what PEFT saves, and what LLaVA's own training writes beside it: the projector in
`non_lora_trainables.bin`, and a config.json of the whole model over a base that is a decoder
alone.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.checkpoints_convert.files import StoredTensor, open_tensors
from jaxprune.checkpoints_convert.plan import PlannedTensor, flat_shapes
from jaxprune.errors import UserError, is_number
from jaxprune.files import read_json
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import table_of
from jaxprune.models.weights import Rule

CONFIG, NON_LORA = "adapter_config.json", "non_lora_trainables.bin"
SAFETENSORS, BIN = "adapter_model.safetensors", "adapter_model.bin"
_WEIGHTS = (SAFETENSORS, BIN)
_PREFIX = re.compile(r"\Abase_model\.(?:model\.)?")  # of PEFT's wrappers
_FACTOR = re.compile(r"\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?\Z")
_OTHERS = ("lora_magnitude_vector", "lora_B.bias", "token_adapter", "prompt_embeddings")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two factors of what is added to a matrix.

    Attributes:
        down, up: `[r, in]` and `[out, r]`.
        scale: what their product is multiplied with.
        transposed: whether that is added the other way round, as to an embedding.
    """

    down: StoredTensor
    up: StoredTensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.up.shape[0], self.down.shape[1]
        return shape[::-1] if self.transposed else shape

    def product(self) -> np.ndarray:
        """What is added, float32 in PyTorch's layout."""
        up, down = self.up.read().astype(np.float32), self.down.read().astype(np.float32)
        found: np.ndarray = self.scale * (up @ down)
        return found.T if self.transposed else found


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's tensors.

    Attributes:
        directory: where it is.
        base: the name of its base, if it has one.
        pairs: by the key of the matrix that each changes.
        whole: tensors that stand instead of the base's.
    """

    directory: pathlib.Path
    base: str | None
    pairs: Mapping[str, Pair]
    whole: Sequence[StoredTensor]


def is_adapter(directory: pathlib.Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    files = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    whole = {f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin")
             for end in ("", ".index.json")}  # fmt: skip
    return bool(files & {CONFIG, NON_LORA}) and not files & whole


def read_adapter(directory: pathlib.Path) -> Adapter:
    """What is in an adapter's directory.

    Raises:
        UserError: for an adapter of another kind than LoRA, or a damaged one.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG}; expected the directory of an adapter.")
    fields = read_json(path)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} has peft_type={kind!r}; supported: 'LORA'.")
    for name in ("use_dora", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens"):
        if fields.get(name):
            raise UserError(f"{path} has {name}={fields[name]!r}, which is not supported.")
    file = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if file is None:
        raise UserError(f"{directory} has no weights; expected {' or '.join(_WEIGHTS)}.")
    tensors = list(open_tensors(file))
    extra = directory / NON_LORA
    tensors += open_tensors(extra) if extra.is_file() else []
    halves: dict[str, dict[str, tuple[StoredTensor, bool]]] = {}
    whole = []
    for tensor in tensors:
        key = _PREFIX.sub("", tensor.key)
        found = _FACTOR.search(key)
        if any(name in key for name in _OTHERS):
            raise UserError(f"{directory} holds {tensor.key}, which is not supported.")
        if found is None:
            key = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            whole.append(dataclasses.replace(tensor, key=key))
            continue
        halves.setdefault(key[: found.start()], {})[found[2]] = (tensor, found[1] is not None)
    pairs = {f"{module}.weight": _pair(directory, fields, module, own)
             for module, own in halves.items()}  # fmt: skip
    base = fields.get("base_model_name_or_path")
    return Adapter(directory, base if isinstance(base, str) else None, pairs, whole)


def _pair(
    directory: pathlib.Path,
    fields: Mapping[str, Any],
    module: str,
    own: Mapping[str, tuple[StoredTensor, bool]],
) -> Pair:
    if set(own) != {"A", "B"}:
        raise UserError(f"{directory} holds one of two factors of {module}; it is damaged.")
    (down, embedding), (up, _) = own["A"], own["B"]
    rank = _setting(fields, "rank_pattern", module, fields.get("r"))
    alpha = _setting(fields, "alpha_pattern", module, fields.get("lora_alpha", 8))
    two = len(down.shape) == len(up.shape) == 2
    if not is_number(rank) or not is_number(alpha) or rank < 1:
        raise UserError(f"{directory / CONFIG} has r={rank!r} and lora_alpha={alpha!r}.")
    if not two or down.shape[0] != up.shape[1] or down.shape[0] != rank:
        raise UserError(
            f"{directory} holds factors of {list(down.shape)} and {list(up.shape)} for {module}, "
            f"but its rank is {rank}; only matrices are supported."
        )
    scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    return Pair(down, up, float(scale), embedding)


def _setting(fields: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """A setting that may differ from module to module, by the ends of their names."""
    patterns = fields.get(name)
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})\Z", module):
                    return value
            except re.error:
                raise UserError(f"{CONFIG} has the {name} {pattern!r}, no expression.") from None
    return default


def merged(plan: list[PlannedTensor], adapter: Adapter, config: ModelConfig) -> list[PlannedTensor]:
    """A plan whose tensors are read with an adapter's products added.

    Raises:
        UserError: for an adapter that changes what the model does not have.
    """
    table, expected = table_of(config), flat_shapes(config)
    changes: dict[str, list[tuple[Rule, Pair]]] = {}
    strange = []
    for key, pair in adapter.pairs.items():
        name = table.canonical_key(key)
        rule = None if name is None else table.rule_of_key(name)
        paths = () if rule is None else rule.paths
        if rule is None or any(path not in expected for path in paths):
            strange.append(f"{key} is unknown")
            continue
        shape = rule.stored_shape([expected[path].shape for path in paths])
        if shape != pair.shape:
            strange.append(f"{key} is {list(pair.shape)}, the base's {list(shape)}")
            continue
        for path in paths:
            changes.setdefault(path, []).append((rule, pair))
    if strange:
        more = f", and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise UserError(
            f"The adapter in {adapter.directory} is of another base"
            f"{f' ({adapter.base})' if adapter.base else ''}: {'; '.join(strange[:3])}{more}."
        )

    def change(path: str, array: np.ndarray) -> np.ndarray:
        if path not in changes:
            return array
        total = array.astype(np.float32)
        for rule, pair in changes[path]:
            shapes = [expected[own].shape for own in rule.paths]
            parts = rule.load(pair.product(), shapes, config)
            total = total + parts[rule.paths.index(path)]
        return total

    return [dataclasses.replace(tensor, change=change) for tensor in plan]
