"""A checkpoint onto the devices, one tensor in host memory at a time."""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxprune.checkpoints_convert.adapters import Adapter, is_adapter, merged, read_adapter
from jaxprune.checkpoints_convert.files import StoredTensor, stored_tensors
from jaxprune.checkpoints_convert.plan import (
    PlannedTensor,
    cast,
    flat_shapes,
    make_plan,
    pair_tensors,
    path_of,
)
from jaxprune.checkpoints_convert.recognise import existing_directory, explained
from jaxprune.devices.mesh import check_mesh, placed, sharding_of
from jaxprune.errors import UserError
from jaxprune.files import read_json
from jaxprune.models.clip import ClipTextConfig
from jaxprune.models.clip.modeling import text_tower_shapes
from jaxprune.models.clip.weights import CLIP_TEXT
from jaxprune.models.family import ModelConfig, ModelFiles, is_original
from jaxprune.models.int8 import rounded, with_int8
from jaxprune.models.registry import FAMILIES, family_of_fields, table_of
from jaxprune.progress import track

DTYPES = ("float32", "bfloat16", "float16")
INT8 = "int8"


def load_checkpoint(
    directory: "str | pathlib.Path | Source",
    *,
    dtype: str = "auto",
    mesh: jax.sharding.Mesh | None = None,
    vision_tower: str | pathlib.Path | None = None,
    adapter: str | pathlib.Path | None = None,
    show_progress: bool | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
    """Read the weights of a model directory.

    Args:
        directory: a Hugging Face directory, an original-format one, one written by
            `convert(..., format="jaxprune")`, or an adapter's, whose base is then looked for.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU; on an
            accelerator bfloat16 where the file has 16-bit weights, else float32. "int8": as
            "auto", with the matrices of the decoder's layers rounded to 8 bits.
        mesh: lay every parameter over it, by the rules of the model's family; without one,
            all are on the default device.
        vision_tower: directory of the CLIP tower of an original-format checkpoint, which
            does not hold its own.
        adapter: directory of a LoRA adapter, which is merged into the model.
        show_progress: a bar on stderr; None shows it in a terminal.

    Returns:
        The parameters as nested dicts, and the model's config.

    Raises:
        UserError: for anything wrong with the directory; see `make_plan`.
    """
    if isinstance(directory, Source):
        source = directory
    else:
        source = find_source(directory, vision_tower, adapter)
    name = _name_of(dtype)
    with explained(source.weights, source.tower):
        config, plan = planned(source, dtype=_resolve_dtype(name, source.weights))
        if name == INT8:
            config = with_int8(config)
    if mesh is not None:
        mesh = check_mesh(mesh, config.mesh_splits())
    with explained(source.weights, source.tower):
        rules = table_of(config).partition
        eighths = {path for path, x in flat_shapes(config).items() if x.dtype == np.int8}
        return laid_out(plan, config.dtype, mesh, rules, show_progress, eighths), config


def load_text_tower(
    directory: pathlib.Path, *, dtype: str, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict[str, Any], ClipTextConfig]:
    """Read a CLIP's text tower and both towers' projections.

    Args:
        directory: of the whole CLIP.
        dtype: of the parameters.
        mesh: every device of it gets all of them.

    Raises:
        UserError: for a directory of something else.
    """
    mesh = None if mesh is None else check_mesh(mesh, {})
    with explained(directory):
        config = ClipTextConfig.from_hf(read_json(directory / "config.json"), dtype=dtype)
        shapes = flatten_dict(text_tower_shapes(config), sep="/")
        plan = pair_tensors(directory, CLIP_TEXT, shapes, config)
        return laid_out(plan, dtype, mesh, (), show_progress=False), config


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the parts of a model are.

    Attributes:
        weights: the directory of its weights and tokenizer.
        config: that of its config.json, another one where an adapter brings it.
        tower: that of its vision tower, if it has one of its own.
        adapter: what is merged into it.
    """

    weights: pathlib.Path
    config: pathlib.Path
    tower: pathlib.Path | None = None
    adapter: Adapter | None = None


def find_source(
    directory: object,
    vision_tower: object = None,
    adapter: object = None,
    *,
    download: bool = False,
) -> Source:
    """The parts of a model that a user names.

    Args:
        directory: the model's, or an adapter's whose base is looked for by its name.
        vision_tower: the vision tower's.
        adapter: an adapter's.
        download: fetch what is not in the Hub's cache.

    Raises:
        UserError: for what is not there.
    """
    path = existing_directory(directory, download=download)
    tower = None if vision_tower is None else existing_directory(vision_tower, download=download)
    if adapter is None and is_adapter(path):
        found = read_adapter(path)
        if found.base is None:
            raise UserError(
                f"{path} holds an adapter that does not name its base; load the base, with "
                "adapter= naming this directory."
            )
        try:
            base = existing_directory(found.base, download=download)
        except UserError as error:
            raise UserError(
                f"{path} holds an adapter whose base is not here: {error} Or load the base from "
                "where it is, with adapter= naming this directory."
            ) from None
    elif adapter is None:
        return Source(path, path, tower)
    else:
        found, base = read_adapter(existing_directory(adapter, download=download)), path
    own = found.directory / "config.json"
    # LLaVA's training leaves the whole model's config beside the adapter of a decoder.
    whole = own.is_file() and family_of_fields(read_json(own)) is not None
    return Source(base, found.directory if whole else base, tower, found)


def laid_out(
    plan: list[PlannedTensor],
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    rules: Iterable[tuple[str, int]],
    show_progress: bool | None,
    eighths: Collection[str] = (),
) -> dict[str, Any]:
    """The parameters of a plan on their devices, split over a mesh as rules say.

    Those of the paths `eighths` are rounded to 8 bits.
    """
    # The largest first: a tensor is in memory two or three times while it is laid out, which
    # then happens while most of the model is still on disk.
    plan.sort(key=lambda tensor: -math.prod(tensor.stored.shape))
    flat: dict[str, jax.Array] = {}
    for tensor in track(plan, "Loading", len(plan), show=show_progress):
        parameters = tensor.read()
        while parameters:  # no reference is kept to what is copied below
            path, parameter = parameters.popitem()
            made = {path: np.ascontiguousarray(cast(parameter, dtype, path))}
            if path in eighths:
                whole, scale = rounded(np.asarray(parameter, np.float32))
                made = {path: whole, f"{path.removesuffix('kernel')}scale": scale}
            del parameter
            for path, array in made.items():
                place = sharding_of(path, array.shape, mesh, rules) if mesh else None
                flat[path] = placed(array, place)
    tree: dict[str, Any] = unflatten_dict(flat, sep="/")
    return tree


def planned(source: Source, *, dtype: str) -> tuple[ModelConfig, list[PlannedTensor]]:
    """The config and plan of a checkpoint.

    Raises:
        UserError: as `make_plan`, for a tower that is nowhere, and for an adapter of another base.
    """
    config = config_of(source, dtype=dtype)
    extra = [] if source.tower is None else [source.tower]
    instead = () if source.adapter is None else source.adapter.whole
    try:
        plan = make_plan(source.weights, config, *extra, instead=instead)
    except UserError as error:
        if "vision_tower" in str(error) and is_original(config):
            raise UserError(f"{error} Pass the CLIP tower's directory as vision_tower.") from None
        raise
    return config, plan if source.adapter is None else merged(plan, source.adapter, config)


def config_of(source: Source, *, dtype: str) -> ModelConfig:
    """The config of a checkpoint."""
    found = read_config(
        source.config, dtype=dtype, vision_tower=source.tower, weights=source.weights
    )
    return _with_own_head(source.weights, found)


def _with_own_head(directory: pathlib.Path, config: ModelConfig) -> ModelConfig:
    """The config without tied words where the stored head is another than the embedding.

    So does transformers from version 5 on; before, the stored head was passed over.
    """
    table = table_of(config)
    if not table.words or not config.text_config.tie_word_embeddings:
        return config
    found = {path_of(table, stored.key): stored for stored in stored_tensors(directory)}
    both = [found[path] for path in table.words if path in found]
    if len(both) < 2 or (both[0].shape == both[1].shape and _equal(*both)):
        return config
    text: Any = config.text_config
    untied = dataclasses.replace(text, tie_word_embeddings=False)
    return dataclasses.replace(config, text_config=untied)  # type: ignore[type-var]


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    return np.array_equal(one.read(), other.read())


def _name_of(dtype: Any) -> str:
    """ "auto" or the name of a dtype.

    Raises:
        UserError: for one that is not supported.
    """
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:  # not even numpy knows it
        name = ""
    known = ("auto", *DTYPES, INT8)
    if name not in known:
        raise UserError(f"dtype is {dtype!r}; expected one of: {', '.join(known)}.")
    return name


def _resolve_dtype(name: str, directory: pathlib.Path) -> str:
    if name not in ("auto", INT8):
        return name
    if jax.default_backend() == "cpu":
        return "float32"
    stored = {tensor.dtype for tensor in stored_tensors(directory)}
    return "bfloat16" if stored & {"bfloat16", "float16"} else "float32"


def read_config(
    directory: pathlib.Path,
    *,
    dtype: str,
    vision_tower: pathlib.Path | None = None,
    weights: pathlib.Path | None = None,
) -> ModelConfig:
    """The model config of a directory, whichever family and format it is of.

    Args:
        directory: of config.json.
        dtype: of the parameters.
        vision_tower: of the vision tower, if it has one of its own.
        weights: of the weights, where they are elsewhere.

    Raises:
        UserError: without a config.json, or with one of an unsupported architecture.
    """
    fields = read_json(directory / "config.json")
    family = family_of_fields(fields)
    if family is None:
        raise UserError(
            f"{directory} holds a model of type {fields.get('model_type')!r}; supported: "
            f"{', '.join(FAMILIES)}."
        )

    def shapes() -> dict[str, tuple[int, ...]]:
        return {stored.key: stored.shape for stored in stored_tensors(weights or directory)}

    return family.read_config(ModelFiles(directory, fields, dtype, shapes, vision_tower))
