"""A checkpoint onto the devices, one tensor in host memory at a time."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxprune.checkpoints_convert.files import stored_tensors
from jaxprune.checkpoints_convert.plan import make_plan, unflatten
from jaxprune.errors import UserError
from jaxprune.json_file import read_json
from jaxprune.models.clip.config import ClipVisionConfig
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.models.registry import CONFIGS
from jaxprune.partition import sharding_of
from jaxprune.progress import track

DTYPES = ("float32", "bfloat16", "float16")


def load_checkpoint(
    directory: pathlib.Path,
    *,
    dtype: str = "auto",
    mesh: jax.sharding.Mesh | None = None,
    vision_tower: pathlib.Path | None = None,
    show_progress: bool | None = None,
) -> tuple[dict[str, Any], Any]:
    """Read the weights of a model directory.

    Args:
        directory: a Hugging Face directory, an original-format one, or one written by
            `convert(..., format="jaxprune")`.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU; on an
            accelerator bfloat16 where the file has 16-bit weights, else float32.
        mesh: place every tensor by `jaxprune.partition`'s rules; without one, all on the
            default device.
        vision_tower: directory of the CLIP tower of an original-format checkpoint, which
            does not hold its own.
        show_progress: a bar on stderr; None shows it in a terminal.

    Returns:
        The parameters as nested dicts, and the model's config.

    Raises:
        UserError: for anything wrong with the directory; see `make_plan`.
    """
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise UserError(f"mesh is a {type(mesh).__name__}; expected a jax.sharding.Mesh.")
    directory = existing_directory(directory)
    dtype = _resolve_dtype(dtype, directory)
    config = read_config(directory, dtype=dtype, vision_tower=vision_tower)
    extra = [existing_directory(vision_tower)] if vision_tower else []
    try:
        plan = make_plan(directory, config, *extra)
    except UserError as error:
        if "vision_tower" in str(error) and is_original(read_json(directory / "config.json")):
            raise UserError(f"{error} Pass the CLIP tower's directory as vision_tower.") from None
        raise
    numpy_dtype = numpy_dtype_of(dtype)

    # The largest first: a tensor is in memory two or three times while it is laid out, which
    # then happens while most of the model is still on disk.
    plan.sort(key=lambda tensor: -math.prod(tensor.stored.shape))
    flat = {}
    for tensor in track(plan, "Loading", len(plan), show=show_progress):
        array = np.ascontiguousarray(tensor.read().astype(numpy_dtype, copy=False))
        place = sharding_of(tensor.path, array.shape, mesh) if mesh else None
        flat[tensor.path] = jax.device_put(array, place)
    return unflatten(flat), config


def numpy_dtype_of(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def existing_directory(directory: Any) -> pathlib.Path:
    """The path of a model directory.

    Raises:
        UserError: when it is no directory.
    """
    if not isinstance(directory, str | pathlib.Path):
        raise UserError(f"directory is a {type(directory).__name__}; expected a path.")
    path = pathlib.Path(directory).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; expected the directory of a model.")
    return path


def _resolve_dtype(dtype: str, directory: pathlib.Path) -> str:
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:  # not even numpy knows it
        name = ""
    if name in DTYPES:
        return name
    if name != "auto":
        raise UserError(f"dtype is {dtype!r}; expected one of: auto, {', '.join(DTYPES)}.")
    if jax.default_backend() == "cpu":
        return "float32"
    stored = {tensor.dtype for tensor in stored_tensors(directory)}
    return "bfloat16" if stored & {"bfloat16", "float16"} else "float32"


def read_config(
    directory: pathlib.Path, *, dtype: str, vision_tower: pathlib.Path | None = None
) -> Any:
    """The model config of a directory, whichever family and format it is of.

    Raises:
        UserError: without a config.json, or with one of an unsupported architecture.
    """
    fields = read_json(directory / "config.json")
    if is_original(fields):
        return _original_config(fields, dtype=dtype, vision_tower=vision_tower)
    kind = fields.get("model_type")
    if kind not in CONFIGS:
        raise UserError(
            f"{directory} holds a model of type {kind!r}; supported: {', '.join(CONFIGS)}."
        )
    return CONFIGS[kind].from_hf(fields, dtype=dtype)


def is_original(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's original format: a LLaMA with `mm_*` fields."""
    return "mm_vision_tower" in fields and "text_config" not in fields


# Settings of the original code base that say how it was trained, or choose among code
# paths that all give LLaVA-1.5's forward pass.
_ORIGINAL_INERT = {
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_hidden_size",
    "mm_patch_merge_type",
    "mm_resampler_type",
    "mm_vision_tower",
    "mm_vision_tower_lr",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
    "mm_projector_lr",
    "mm_use_im_patch_token",
    "use_mm_proj",
}


def _original_config(
    fields: Mapping[str, Any], *, dtype: str, vision_tower: pathlib.Path | None
) -> LlavaConfig:
    where = "The original-format LLaVA config"
    if fields.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise UserError(
            f"{where} has mm_projector_type={fields.get('mm_projector_type')!r}; supported: "
            "'mlp2x_gelu', the projector of LLaVA-1.5."
        )
    if fields.get("mm_use_im_start_end"):
        raise UserError(f"{where} has mm_use_im_start_end=true, which LLaVA-1.5 does not use.")
    if fields.get("image_aspect_ratio") == "anyres" or "mpt" in str(fields.get("model_type")):
        raise UserError(f"{where} is not of LLaVA-1.5 (any-resolution tiles or another decoder).")
    if vision_tower is None:
        vision = ClipVisionConfig(dtype=dtype)
        tower = str(fields["mm_vision_tower"])
        if "clip-vit-large-patch14-336" not in tower:
            raise UserError(
                f"{where} names the vision tower {tower!r}; pass its directory as vision_tower."
            )
    else:
        tower_fields = read_json(existing_directory(vision_tower) / "config.json")
        tower_fields = tower_fields.get("vision_config", tower_fields)
        vision = ClipVisionConfig.from_hf(tower_fields, dtype=dtype)
    handled = {"mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"}
    handled |= {"mm_use_im_start_end"}
    text = {k: v for k, v in fields.items() if k not in handled | _ORIGINAL_INERT}
    select = {"patch": "default", "cls_patch": "full"}
    feature = fields.get("mm_vision_select_feature", "patch")
    if feature not in select:
        raise UserError(f"{where} has mm_vision_select_feature={feature!r}; supported: {select}.")
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig.from_hf(text, dtype=dtype),
        # The original tokenizer has no image token: images stand at this id of its own.
        image_token_index=-200,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=select[feature],
    )
