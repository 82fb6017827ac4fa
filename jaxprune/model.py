"""A model directory -> everything that `generate` needs, in one pytree."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert.load import DTYPES, INT8, find_source, load_text_tower
from jaxprune.checkpoints_convert.load import read_config as config_of_directory
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.checkpoints_convert.recognise import existing_directory, explained
from jaxprune.devices.mesh import with_auto_axes
from jaxprune.devices.process import check_here
from jaxprune.errors import UserError, check_choice, check_flag
from jaxprune.inputs.processor import (
    SHIPPED,
    Processor,
    ids_of,
    load_processor,
    load_tokenizer,
)
from jaxprune.models.clip import ClipTextConfig, ClipVisionConfig
from jaxprune.models.family import ModelConfig
from jaxprune.models.int8 import with_int8
from jaxprune.models.registry import PRESETS, family_of
from jaxprune.models.vit.config import VitTower

SMALL_MODEL = SHIPPED
"""The model that ships: it answers questions about drawn scenes."""

DEMO_IMAGE = pathlib.Path(__file__).parent / "assets" / "demo.png"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TextTower:
    """A CLIP's text tower, by which methods compare patches with what is asked.

    Attributes:
        arrays: its parameters, and those of both towers' projections.
        config: static.
        tokenizer: a `transformers` tokenizer; static.
    """

    arrays: dict[str, Any]
    config: ClipTextConfig = dataclasses.field(metadata={"static": True})
    tokenizer: Any = dataclasses.field(metadata={"static": True})

    def ids_of(self, text: str) -> list[int]:
        """The token ids of a text between the tokens of its beginning and end."""
        return ids_of(self.tokenizer, text, add_special_tokens=True)

    def parts_of(self, texts: Sequence[Sequence[int]], images: int, width: int) -> np.ndarray:
        """Texts in parts of the tower's context, which are read one by one.

        Args:
            texts: token ids.
            images: I, rows of the result, of which those without a text have no part.
            width: tokens of a text that there is room for.

        Returns:
            int32 `[I, Q, S]`: parts of S tokens, the last one of a text filled up with 0, and -1
            where there is none.
        """
        size = self.config.max_position_embeddings
        number = -(-width // size)
        parts = np.full((images, number, size), -1, np.int32)
        for own, text in zip(parts, texts, strict=False):
            used = -(-len(text) // size)
            own[:used] = np.pad(text, (0, used * size - len(text))).reshape(used, size)
        return parts


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
        text_tower: a CLIP's, for methods that go by one.
    """

    arrays: dict[str, Any]
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    processor: Processor | None = dataclasses.field(metadata={"static": True}, default=None)
    text_tower: TextTower | None = None

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
    text_tower: Any = None,
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
            accelerator bfloat16 for 16-bit weights, else float32. "int8": as "auto", with the
            matrices of the decoder's layers rounded to 8 bits, for faster decoding there.
        mesh: a device mesh to lay the weights over; see docs/devices.md.
        vision_tower: the CLIP tower's directory, for checkpoints in LLaVA's original
            format, which do not hold it.
        adapter: the directory of a LoRA adapter, as PEFT or LLaVA's training writes it, to be
            merged into the model; an adapter's own directory may be loaded too, if its base is
            found by the name that it gives.
        text_tower: the directory of the whole CLIP whose vision tower the model has, for methods
            that go by its text tower.
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
    if text_tower is None:
        return Params(arrays, config, processor)
    place = existing_directory(text_tower, download=download)
    own, text_config = load_text_tower(place, dtype=config.dtype, mesh=mesh)
    tower = TextTower(own, text_config, load_tokenizer(place, "clip"))
    _check_text_tower(tower, config)
    return Params(arrays, config, processor, tower)


def _check_text_tower(tower: TextTower, config: ModelConfig) -> None:
    """Raise `UserError` unless a text tower's vision tower may be the model's."""
    words, rows = len(tower.tokenizer), tower.config.vocab_size
    if words > rows:
        raise UserError(
            f"The text tower's tokenizer has {words} tokens, but its embedding {rows} rows; they "
            "are not of one model."
        )
    width = clip_of(config).hidden_size
    if width != tower.config.vision_width:
        raise UserError(
            f"The text tower belongs to a vision tower of width {tower.config.vision_width}, but "
            f"the model's is {width} wide; name the CLIP whose vision tower the model has."
        )


def clip_of(config: ModelConfig) -> ClipVisionConfig:
    """The vision tower that makes a model's features, if it is a CLIP's.

    Raises:
        UserError: for another one, or features that several of its layers make.
    """
    own = config.tower
    if isinstance(own, VitTower) and isinstance(own.config, ClipVisionConfig):
        if len(own.feature_layers) == 1:
            return own.config
        what = f"of {len(own.feature_layers)} layers"
    else:
        what = f"of {config.family}"
    raise UserError(
        "A CLIP's text tower goes with features of one layer of its vision tower; those of this "
        f"model are {what}. cdpruner needs none under relevance='embeddings'."
    )


def check_text_tower(params: Params, method: str) -> TextTower:
    """The text tower of a model, for a method that goes by one.

    Raises:
        UserError: for a model without, or one that no text tower goes with.
    """
    clip_of(params.config)
    if params.text_tower is None:
        raise UserError(
            f"{method} compares patches with the question by a CLIP's text tower, which a LLaVA "
            'does not hold; load the model with it: jaxprune.load(..., text_tower="openai/'
            'clip-vit-large-patch14-336"), or whichever CLIP its vision tower is of. cdpruner '
            "needs none under relevance='embeddings'."
        )
    return params.text_tower


def read_config(model: str | pathlib.Path | None = None, dtype: str = "bfloat16") -> ModelConfig:
    """A model's config alone, without its weights.

    Args:
        model: the name of a published size (see `models.registry`) or a model's directory;
            None for the small model that ships.
        dtype: "float32", "bfloat16", "float16", or "int8": bfloat16 with the matrices of the
            decoder's layers rounded.

    Raises:
        jaxprune.UserError: for what is neither, or a directory of an unsupported model.
    """
    check_choice("dtype", dtype, (*DTYPES, INT8))
    if dtype == INT8:
        whole: ModelConfig = with_int8(read_config(model))
        return whole
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
    tower = params.text_tower if isinstance(params, Params) else None
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
    arrays = with_auto_axes(dict(params), config.mesh_splits())
    if tower is not None:
        tower = dataclasses.replace(tower, arrays=with_auto_axes(tower.arrays, {}))
    return Params(arrays, config, processor, tower)


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


def weights_digest(params: Params) -> str:
    """12 hex digits of a model's weights, by a few thousand numbers of every parameter."""
    return digest(*map(np.asarray, jax.tree.leaves(_some_of(params.arrays))))


@jax.jit
def _some_of(arrays: dict[str, Any]) -> dict[str, Any]:
    """A few thousand numbers of every parameter, from all over it."""

    def some(x: jax.Array) -> jax.Array:
        steps = (max(1, size // 32) for size in x.shape)
        return x[tuple(slice(None, None, step) for step in steps)].astype(jnp.float32)

    found: dict[str, Any] = jax.tree.map(some, arrays)
    return found


def digest(*arrays: np.ndarray) -> str:
    """12 hex digits of what arrays hold."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]
