"""Writing model directories: all or nothing, and checked against what they came from."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxprune.checkpoints_convert.files import stored_tensors
from jaxprune.checkpoints_convert.hub_form import HubForm, hub_form, widen, with_new_rows
from jaxprune.checkpoints_convert.load import (
    DTYPES,
    find_source,
    planned,
)
from jaxprune.checkpoints_convert.plan import PlannedTensor, cast
from jaxprune.checkpoints_convert.recognise import explained
from jaxprune.errors import UserError, check_choice
from jaxprune.files import new_path, read_json, whole_directory
from jaxprune.models.family import ModelConfig, is_original
from jaxprune.models.registry import family_of, table_of
from jaxprune.models.weights import Rule
from jaxprune.progress import track

FORMATS = ("hf", "jaxprune")
MAX_SHARD_BYTES = 2 * 1024**3

_FAILURES = (OSError, SafetensorError)  # to write a directory

_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


_TEMPLATES = "additional_chat_templates"  # named ones, a folder


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What `convert` wrote: tensors, their bytes, and how many were read back and compared."""

    tensors: int
    bytes: int
    verified: int


def export(
    params: dict[str, Any],
    config: ModelConfig,
    directory: str | pathlib.Path,
    *,
    companions: pathlib.Path | None = None,
    show_progress: bool | None = None,
) -> None:
    """Write parameters as a Hugging Face directory that `transformers` loads.

    Args:
        params: nested dict of arrays, as `load` gives it.
        config: their model config.
        directory: must not exist; it appears complete or not at all.
        companions: a directory to copy the tokenizer's and processor's files from; for a
            model in LLaVA's original format, the one to make them from.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        UserError: when `directory` exists or cannot be written, a model in LLaVA's original
            format comes without its tokenizer, or a parameter is missing that is stored in
            one tensor with others.
    """
    if any(array.dtype == np.int8 for array in flatten_dict(params).values()):
        raise UserError(
            "The weights are rounded to int8, which transformers has no such form for; export the "
            "model loaded in another dtype."
        )
    form = _form_of(config, companions)
    # In the tree's order: what is stored in one tensor stands close together.
    flat = sorted(flatten_dict(params, sep="/").items())
    parameters = (
        (path, np.asarray(array))
        for path, array in track(flat, "Exporting", len(flat), show=show_progress)
    )
    tensors = (
        (rule.key, with_new_rows(rule.paths[0], array, form.rows))
        for rule, array in _stored(parameters, config)
    )
    target = new_path(directory, "The destination")
    with whole_directory(target, failures=_FAILURES) as place:
        _write_weights(place, tensors)
        _write_companions(place, _config_fields(form, config.dtype), form.files)


def convert(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    *,
    dtype: str | None = None,
    format: str = "hf",
    verify: bool = True,
    vision_tower: str | pathlib.Path | None = None,
    adapter: str | pathlib.Path | None = None,
    show_progress: bool | None = None,
) -> ConvertReport:
    """Rewrite a checkpoint of any supported spelling as one clean directory, streaming.

    One of LLaVA's original format is given an image token, a longer vocabulary and the files
    of a processor; see `hub_form.py`.

    Args:
        source: Hugging Face directory, original-format directory, or one of this library's.
        destination: must not exist; it appears complete or not at all.
        dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's own.
        format: "hf" writes the Hub's spelling, which `transformers` loads; "jaxprune"
            writes parameters by path in this library's layout, which loads without a
            transposition.
        verify: read everything back and compare it with the source, bit by bit.
        vision_tower: directory of the CLIP tower of an original-format checkpoint.
        adapter: directory of a LoRA adapter, which is merged into the model.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        UserError: for a source that does not load, or a destination that exists.
    """
    check_choice("format", format, FORMATS)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    found = find_source(source, vision_tower, adapter)
    target = new_path(destination, "The destination")
    with explained(found.weights, found.tower):
        config, plan = planned(found, dtype=dtype or "float32")
        if found.adapter is not None and dtype is None:  # sums are rounded to what they came from
            plan = [dataclasses.replace(tensor, change=_rounded(tensor)) for tensor in plan]
        fields = read_json(found.config / "config.json")
        files = _companion_files(found.weights)
        if is_original(config) and family_of(config).hub_form(config):
            form = hub_form(found.config, config, tokenizer=found.weights)
            stored = fields.get("torch_dtype") or fields.get("dtype") or config.dtype
            fields, files = _config_fields(form, stored), form.files
            plan = widen(plan, form.rows)
    words = table_of(config).words
    if words and not config.text_config.tie_word_embeddings:  # older releases would tie them
        for part in (fields, fields.get("text_config")):
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields["dtype"] = dtype

    def tensors(label: str) -> Iterator[tuple[str, np.ndarray]]:
        tracked = track(plan, label, len(plan), show=show_progress)
        parameters = _parameters(tracked, dtype)
        if format == "jaxprune":
            return parameters
        return ((rule.key, array) for rule, array in _stored(parameters, config))

    with whole_directory(target, failures=_FAILURES) as place:
        count, size = _write_weights(place, tensors("Converting"))
        _write_companions(place, fields, files)
        verified = _verify(place, tensors("Verifying")) if verify else 0
    return ConvertReport(tensors=count, bytes=size, verified=verified)


def _rounded(tensor: PlannedTensor) -> Callable[[str, np.ndarray], np.ndarray]:
    """A tensor's change, its result in the dtype of the tensor."""
    change = tensor.change
    assert change is not None
    return lambda path, array: cast(change(path, array), array.dtype.name, path)


def _parameters(
    plan: Iterable[PlannedTensor], dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a plan by path, read one tensor at a time and cast."""
    for tensor in plan:
        for path, array in tensor.read().items():
            yield path, array if dtype is None else cast(array, dtype, path)


def _stored(
    parameters: Iterable[tuple[str, np.ndarray]], config: ModelConfig
) -> Iterator[tuple[Rule, np.ndarray]]:
    """Parameters by path -> the stored tensors of a family, each once all its parts are there.

    Raises:
        UserError: when a part of a tensor is missing.
    """
    table = table_of(config)
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for path, array in parameters:
        rule = table.rule_of_path(path)
        parts = waiting.setdefault(rule.key, {})
        parts[path] = array
        if len(parts) == len(rule.paths):
            del waiting[rule.key]
            yield rule, rule.export([parts[path] for path in rule.paths], config)
    for key, parts in waiting.items():
        paths = table.rule_of_path(next(iter(parts))).paths
        missing = ", ".join(path for path in paths if path not in parts)
        raise UserError(f"The parameters lack {missing}, which {key} holds together with others.")


def _verify(place: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]) -> int:
    """Compare what was written with what should have been; returns the number of tensors."""
    written = {tensor.key: tensor for tensor in stored_tensors(place)}
    count = 0
    for key, array in tensors:
        back = written[key].read()
        if back.dtype != array.dtype or not np.array_equal(back, array):
            raise UserError(f"{key} was not written as it was read; check the disk and try again.")
        count += 1
    return count


def _write_weights(
    place: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]]
) -> tuple[int, int]:
    """Write shards of at most 2 GiB and, for more than one, their index.

    Returns:
        The number of tensors and of their bytes.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            save_tensors(place / f"shard-{len(shards)}", pending)
            shards.append(list(pending))
            pending, pending_bytes = {}, 0

    for key, array in tensors:
        if pending and pending_bytes + array.nbytes > MAX_SHARD_BYTES:
            flush()
        pending[key] = np.ascontiguousarray(array)
        pending_bytes += array.nbytes
        total += array.nbytes
    flush()

    count = sum(map(len, shards))
    if len(shards) == 1:
        (place / "shard-0").rename(place / "model.safetensors")
        return count, total
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (place / f"shard-{i}").rename(place / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return count, total


def save_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Write contiguous arrays as a file of safetensors."""
    # The "pt" mark is what transformers asks for; it says nothing of torch itself.
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file makes it private


def _form_of(config: ModelConfig, companions: pathlib.Path | None) -> HubForm:
    """Config, token ids and files of a model to export, made up where its format lacks them."""
    if not is_original(config) or not family_of(config).hub_form(config):
        return HubForm(config, _token_ids(companions), _companion_files(companions))
    if companions is None:
        raise UserError(
            "The model came in its publisher's form and without its processor, from which "
            "the files of a Hugging Face directory are made; export what `jaxprune.load` gave."
        )
    return hub_form(companions, config)


def _config_fields(form: HubForm, dtype: str) -> dict[str, Any]:
    return {**form.config.to_hf(), "dtype": dtype, **form.token_ids}


def _write_companions(
    place: pathlib.Path, fields: dict[str, Any], files: Mapping[str, bytes]
) -> None:
    (place / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)


def _companion_files(directory: pathlib.Path | None) -> dict[str, bytes]:
    """What stands beside the weights of a directory: tokenizer, processor, chat template."""
    if directory is None:
        return {}
    paths = [directory / name for name in _COMPANIONS]
    paths += sorted((directory / _TEMPLATES).glob("*.jinja"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths if path.is_file()}


def _token_ids(companions: pathlib.Path | None) -> dict[str, Any]:
    """The special token ids of the config.json that the tokenizer's files stand beside."""
    path = companions / "config.json" if companions else None
    if path is None or not path.is_file():
        return {}
    fields = read_json(path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: fields[name] for name in names if fields.get(name) is not None}
