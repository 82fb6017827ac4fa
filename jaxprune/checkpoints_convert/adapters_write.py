"""Trained adapters into a directory of their own, in the forms that `adapters.py` reads.

PEFT's form is for the class of `transformers`, by the names that its modules have from release 4.52
on. LLaVA's own is for its training's loader, which takes the projector from
`non_lora_trainables.bin` and passes over any key there that it does not know.
"""

import io
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError

from jaxprune.checkpoints_convert.adapters import BIN, CONFIG, NON_LORA, SAFETENSORS
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.checkpoints_convert.recognise import existing_directory
from jaxprune.checkpoints_convert.write import save_tensors
from jaxprune.errors import UserError, check_choice
from jaxprune.files import as_path, new_path, read_json, whole_directory
from jaxprune.models.family import ModelConfig, is_original
from jaxprune.models.registry import table_of

Tensors = dict[str, np.ndarray]
PEFT, LLAVA = "peft", "llava"

FORMS: Mapping[str, Mapping[str, str]] = {
    PEFT: {
        "language_model.model.": "model.language_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    LLAVA: {
        "language_model.model.": "model.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    },
}
"""By form: starts of keys as key tables have them, and as the form does. Others stay."""


def write_adapter(
    trained: Mapping[str, Any],
    config: ModelConfig,
    directory: str | pathlib.Path,
    *,
    alpha: float,
    dropout: float = 0.0,
    base: str | pathlib.Path | None = None,
    form: str = PEFT,
) -> None:
    """Write low-rank adapters and a trained projector.

    Where a form of the model stores several matrices as one, as Phi-3's `qkv_proj`, their adapters
    become one of as many times the rank, whose product is theirs.

    Args:
        trained: under "lora" the factors by the path of each matrix in the decoder,
            `{"layers_0/self_attn/q_proj": {"a": [in, r], "b": [r, out]}}`, all of one rank; under
            "multi_modal_projector", if that was trained, its arrays. Written in float32.
        config: the model's.
        directory: must not exist; it appears complete or not at all.
        alpha: the products act times alpha / r.
        dropout: that they were trained with; it is noted alone.
        base: the directory, or the name on the Hub, of the model that was trained.
        form: "peft", or "llava" for a base in LLaVA's original format; that needs torch, and a
            directory with both "llava" and "lora" in its name, by which LLaVA's loader goes.

    Raises:
        UserError: for arrays that are not the model's, a form that it does not have, or a
            directory that exists or cannot be written.
    """
    check_choice("form", form, tuple(FORMS))
    target = new_path(directory, "The adapter's directory")
    pairs = _pairs(trained.get("lora") or {}, config)
    factors, fused = _factors(pairs, config, form)
    projector = _projector(trained.get("multi_modal_projector") or {}, config, form)
    rank = next(iter(pairs.values()))[0].shape[1]
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _name_of(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _expression(factors),
    }
    if fused:  # releases of PEFT that read LLaVA's form need not know of patterns
        fields["rank_pattern"] = {name: number * rank for name, number in fused.items()}
        fields["alpha_pattern"] = {name: number * alpha for name, number in fused.items()}
    if form == LLAVA:
        own = _original_config(target, config, base)
        contents = {"config.json": own, BIN: _pickled(factors), NON_LORA: _pickled(projector)}
    else:
        contents = {}
        if projector:
            fields["modules_to_save"] = [next(iter(projector)).split(".")[1]]
    with whole_directory(target, failures=(OSError, SafetensorError)) as place:
        (place / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        for name, content in contents.items():
            (place / name).write_bytes(content)
        if form == PEFT:
            save_tensors(place / SAFETENSORS, _wrapped({**factors, **projector}))


def _pairs(
    adapters: Mapping[str, Mapping[str, Any]], config: ModelConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors `[in, r]` and `[r, out]` by the paths of the matrices, as they have to be."""
    found = {}
    for path, pair in adapters.items():
        a, b = (np.asarray(pair[name], np.float32) for name in ("a", "b"))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise UserError(
                f"The factors of {path} are {list(a.shape)} and {list(b.shape)}; expected "
                "[in, r] and [r, out]."
            )
        found[f"language_model/{path}/kernel"] = a, b
    _check_fit({path: (len(a), b.shape[1]) for path, (a, b) in found.items()}, config)
    ranks = sorted({len(b) for _, b in found.values()})
    if len(ranks) != 1:
        raise UserError(
            f"An adapter has factors of one rank; here are {ranks or 'none'}. What was trained "
            "without any is written as a whole model, by jaxprune.export."
        )
    return found


def _factors(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], config: ModelConfig, form: str
) -> tuple[Tensors, dict[str, int]]:
    """The factors as they are stored.

    Returns:
        `[n r, in]` and `[out, n r]` by key, for a stored tensor of n matrices; and n by the last
        part of such a tensor's name, where it is not 1.
    """
    table, expected = table_of(config), flat_shapes(config)
    rank = len(next(iter(pairs.values()))[1])
    tensors: Tensors = {}
    fused: dict[str, int] = {}
    for rule in dict.fromkeys(table.rule_of_path(path) for path in pairs):
        sizes = {path: expected[path].shape for path in rule.paths}
        nothing = {path: np.zeros((rank, out), np.float32) for path, (_, out) in sizes.items()}
        downs, ups = [], []
        for path, (inputs, _) in sizes.items():
            a, b = pairs.get(path, (np.zeros((inputs, rank), np.float32), nothing[path]))
            downs.append(a.T)
            # In the rows of the others there is nothing of this one.
            ups.append(rule.export([*{**nothing, path: b}.values()], config))
        module = _named(rule.key, config, form).removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = np.concatenate(downs)
        tensors[f"{module}.lora_B.weight"] = np.concatenate(ups, axis=1)
        if len(rule.paths) > 1:
            fused[module.rpartition(".")[2]] = len(rule.paths)
    return tensors, fused


def _projector(arrays: Mapping[str, Any], config: ModelConfig, form: str) -> Tensors:
    """The projector's arrays as they are stored."""
    flat = {
        f"multi_modal_projector/{path}": np.asarray(array, np.float32)
        for path, array in flatten_dict(arrays, sep="/").items()
    }
    _check_fit({path: array.shape for path, array in flat.items()}, config)
    rules = [(table_of(config).rule_of_path(path), array) for path, array in flat.items()]
    return {_named(rule.key, config, form): rule.export([array], config) for rule, array in rules}


def _check_fit(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raise `UserError` unless parameters of such shapes are among a model's."""
    expected = flat_shapes(config)
    for path, shape in shapes.items():
        own = list(expected[path].shape) if path in expected else "not there"
        if own != list(shape):
            raise UserError(
                f"What was trained is not of this model: {path} is {list(shape)}, in the model "
                f"{own}."
            )


def _named(key: str, config: ModelConfig, form: str) -> str:
    """A key as a form spells it."""
    for ours, theirs in FORMS[form].items():
        if key.startswith(ours):
            name = theirs + key.removeprefix(ours)
            # Loaders pass over what they do not know, so a wrong name would be seen by no one.
            assert table_of(config).canonical_key(name) == key
            return name
    return key


def _expression(factors: Tensors) -> str:
    """What is written as `target_modules`: an expression for the modules' whole names.

    A bare list of their last parts would be found in the vision tower as well.
    """
    names = [key.rpartition(".lora_")[0] for key in factors]
    layers = re.escape(names[0].partition("layers.")[0])
    last = sorted({name.rpartition(".")[2] for name in names})
    return rf"{layers}layers\.\d+\..*\.({'|'.join(last)})"


def _name_of(base: Any) -> str | None:
    """What an adapter calls its base: a directory's whole path, or a name as it is."""
    if base is None:
        return None
    path = as_path(base, "The base")
    return str(path.absolute() if path.is_dir() else base)


def _original_config(target: pathlib.Path, config: ModelConfig, base: Any) -> bytes:
    """The config.json of a base in LLaVA's original format.

    Raises:
        UserError: for another base, or a directory that LLaVA's loader would not take.
    """
    name = target.name.lower()
    if "llava" not in name or "lora" not in name:
        raise UserError(
            f"LLaVA's loader takes adapters from directories with both 'llava' and 'lora' in their "
            f"name, and {target.name} is none; call it llava-lora-{target.name}, say."
        )
    path = None if base is None else existing_directory(base) / "config.json"
    fields = {} if path is None else read_json(path)
    if not is_original(config) or not any(name.startswith("mm_") for name in fields):
        raise UserError(
            "LLaVA's own form of an adapter is for a base in LLaVA's original format, named by "
            "base=; write this one in PEFT's form."
        )
    return json.dumps(fields, indent=2).encode()


def _wrapped(tensors: Tensors) -> Tensors:
    """Tensors by the keys that they have inside PEFT's wrapper."""
    return {f"base_model.model.{key}": np.ascontiguousarray(x) for key, x in tensors.items()}


def _pickled(tensors: Tensors) -> bytes:
    """A file of torch's."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "LLaVA's own form of an adapter is a PyTorch pickle; install torch, or write "
            "PEFT's form."
        ) from None
    file = io.BytesIO()
    torch.save({key: torch.tensor(x) for key, x in _wrapped(tensors).items()}, file)
    return file.getvalue()
