"""A model directory -> everything that `generate` needs, in one pytree."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert.load import DTYPES, find_source
from jaxprune.checkpoints_convert.load import read_config as config_of_directory
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.checkpoints_convert.recognise import explained
from jaxprune.devices.mesh import with_auto_axes
from jaxprune.devices.process import check_here
from jaxprune.errors import UserError, check_choice, check_flag
from jaxprune.inputs.processor import SHIPPED, Processor, load_processor
from jaxprune.models.family import ModelConfig
from jaxprune.models.registry import PRESETS, family_of

SMALL_MODEL = SHIPPED
"""The model that ships: it answers questions about drawn scenes."""

DEMO_IMAGE = pathlib.Path(__file__).parent / "assets" / "demo.png"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Params:
    """A model's parameters, with its config and processor riding along.

    A pytree whose leaves are the arrays, so `jax.tree.map` and `jax.device_put` work on it;
    `params["language_model"]` reads like the plain dict in `arrays`.

    Attributes:
        arrays: nested dicts under "vision_tower", "multi_modal_projector", "language_model".
        config: the model's config; static.
        processor: tokenizer and image processor; static.
    """

    arrays: dict[str, Any]
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    processor: Processor | None = dataclasses.field(metadata={"static": True}, default=None)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.arrays)
        number = sum(math.prod(getattr(leaf, "shape", ())) for leaf in leaves)
        parts = ", ".join(self.arrays)
        return f"Params({self.config.family}, {number:,} parameters in {parts})"

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]

    def keys(self) -> Iterable[str]:
        """The names of its parts, so that `dict(params)` is the plain dict."""
        return self.arrays.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)


def load(
    directory: Any = None,
    *,
    dtype: str = "auto",
    mesh: jax.sharding.Mesh | None = None,
    vision_tower: Any = None,
    adapter: Any = None,
    download: bool = False,
    show_progress: bool | None = None,
) -> Params:
    """Load a LLaVA from a Hugging Face directory as it is; without one, the small model that ships.

    Tensors are read one at a time, so host memory peaks at about the size of the weights in
    `dtype`. PyTorch is needed for `.bin` files alone.

    Args:
        directory: the model's directory, a folder of the Hub's cache, or the name of a repository
            that is in it.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU; on an
            accelerator bfloat16 for 16-bit weights, else float32.
        mesh: a device mesh to lay the weights over; see docs/devices.md.
        vision_tower: the CLIP tower's directory, for checkpoints in LLaVA's original
            format, which do not hold it.
        adapter: the directory of a LoRA adapter, as PEFT or LLaVA's training writes it, to be
            merged into the model; an adapter's own directory may be loaded too, if its base is
            found by the name that it gives.
        download: fetch a repository that is not in the Hub's cache.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        jaxprune.UserError: for anything wrong with the directory.
    """
    check_flag("download", download)
    check_here((), "load")
    named = SMALL_MODEL if directory is None else directory
    source = find_source(named, vision_tower, adapter, download=download)
    arrays, config = checkpoints_convert.load_checkpoint(
        source, dtype=dtype, mesh=mesh, show_progress=show_progress
    )
    with explained(source.weights):
        processor = load_processor(source.config, config, tokenizer=source.weights)
        return Params(arrays, config, processor)


def read_config(model: str | pathlib.Path | None = None, dtype: str = "bfloat16") -> ModelConfig:
    """A model's config alone, without its weights.

    Args:
        model: the name of a published size (see `models.registry`) or a model's directory;
            None for the small model that ships.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        jaxprune.UserError: for what is neither, or a directory of an unsupported model.
    """
    check_choice("dtype", dtype, DTYPES)
    if model is None:
        return config_of_directory(SMALL_MODEL, dtype=dtype)
    if isinstance(model, str) and model in PRESETS:
        return PRESETS[model](dtype=dtype)
    try:
        source = find_source(model)
    except UserError as error:
        known = ", ".join(PRESETS)
        raise UserError(f"{error} It is no preset either; those are: {known}.") from None
    with explained(source.weights):
        return config_of_directory(source.config, dtype=dtype, weights=source.weights)


def export(params: Params, directory: Any, *, show_progress: bool | None = None) -> None:
    """Write a model as a Hugging Face directory that `transformers` loads.

    A model that came in LLaVA's original format is given what it lacks there: an image token
    and the files of a processor, as `jaxprune convert` does it.

    Args:
        params: the model.
        directory: must not exist; it appears complete or not at all.
        show_progress: a bar on stderr; None shows it in a terminal.

    Raises:
        jaxprune.UserError: when `directory` exists or cannot be written, or the tokenizer of
            a model in LLaVA's original format is gone.
    """
    if not isinstance(params, Params):
        raise UserError(
            f"params is a {type(params).__name__}; expected what jaxprune.load gives. For bare "
            "arrays there is jaxprune.checkpoints_convert.export."
        )
    companions = params.processor.directory if params.processor else None
    checkpoints_convert.export(
        params.arrays,
        params.config,
        directory,
        companions=companions,
        show_progress=show_progress,
    )


def complete(
    params: Params | Mapping[str, Any],
    config: ModelConfig | None = None,
    processor: Processor | None = None,
) -> Params:
    """What `load` gives, or bare arrays with the config and processor that they came without.

    Raises:
        UserError: for what is no model, or arrays that do not fit the config.
    """
    check_here(params, "This")
    if isinstance(params, Params):
        if config is not None:
            family_of(config)  # refuses what is no config
        config = params.config if config is None else config
        processor = params.processor if processor is None else processor
        params = params.arrays
    elif not isinstance(params, Mapping):
        raise UserError(
            f"params is a {type(params).__name__}; expected what jaxprune.load gives, or a "
            "nested dict of arrays."
        )
    elif config is None or processor is None:
        raise UserError("Bare params need config= and processor=; jaxprune.load gives all three.")
    else:
        family_of(config)  # refuses what is no config
        _check_arrays(params, config)
    if not isinstance(processor, Processor):
        raise UserError(f"processor is a {type(processor).__name__}; expected a Processor.")
    return Params(with_auto_axes(dict(params), config.mesh_splits()), config, processor)


def _check_arrays(params: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise `UserError` unless bare params have the names and shapes of the config's model."""
    expected = flat_shapes(config)
    try:
        found = flatten_dict(dict(params), sep="/")
        shapes = {path: leaf.shape for path, leaf in found.items()}
    except (AttributeError, TypeError):
        raise UserError("params are no nested dicts of arrays; expected what load gives.") from None
    wrong = [
        f"{path} is {shapes.get(path, 'missing')}, expected {leaf.shape}"
        for path, leaf in expected.items()
        if shapes.get(path) != leaf.shape
    ]
    wrong += [f"{path} is unknown" for path in found if path not in expected]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"params do not fit the config: {'; '.join(wrong[:3])}{more}.")
