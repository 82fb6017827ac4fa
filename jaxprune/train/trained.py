"""What a run trains of a model, and what rests.

`Trained` is a dict of float32 arrays with some of the keys "lora" (see `lora`),
"multi_modal_projector" and "language_model". All other arrays keep the model's dtype and have
neither gradients nor an optimiser's state. Vision towers always rest, and so does what a family
has beside these parts, such as LLaVA-NeXT's newline.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxprune.errors import UserError
from jaxprune.model import Params
from jaxprune.models.family import Arrays
from jaxprune.train.lora import Acting, init_adapters, matrices, merged_decoder
from jaxprune.train.settings import Settings

LORA, PROJECTOR, DECODER = "lora", "multi_modal_projector", "language_model"
WHAT: Mapping[str, tuple[str, ...]] = {
    "lora": (LORA, PROJECTOR),
    "projector": (PROJECTOR,),
    "decoder": (DECODER,),
    "all": (DECODER, PROJECTOR),
}
"""The parts that are trained, by `Settings.train`."""

Trained = dict[str, Any]


def acting(settings: Settings) -> Acting:
    """How a run's adapters act."""
    return Acting(scale=settings.alpha / settings.rank, dropout=settings.dropout)


def check_trainable(params: Params, settings: Settings) -> None:
    """Raise `UserError` for a model of 8 bits that is to be written whole."""
    if settings.train != LORA and params.config.text_config.int8:
        raise UserError(
            f"train={settings.train!r} ends in a whole model, and this one has matrices of 8 bits; "
            'load it with another dtype, or train adapters over it: train="lora".'
        )


def init_trained(arrays: Arrays, settings: Settings, key: Array) -> Trained:
    """What is trained as it begins: new adapters, and copies of the model's parts.

    Args:
        arrays: the model's.
        settings: of the run.
        key: of the adapters' beginning.
    """

    def copied(x: Array) -> Array:
        return jnp.array(x, jnp.float32, copy=True)  # the model keeps its own, whatever is donated

    return {
        part: init_adapters(arrays[DECODER], settings.rank, key)
        if part == LORA
        else jax.tree.map(copied, arrays[part])
        for part in WHAT[settings.train]
    }


def resting(params: Params, settings: Settings) -> Params:
    """A model without the parts that are trained in full, nor what no program needs."""
    parts = WHAT[settings.train]
    arrays = {name: x for name, x in params.arrays.items() if name not in parts}
    return dataclasses.replace(params, arrays=arrays, processor=None)


def whole(rest: Params, trained: Trained) -> Params:
    """The model with what is trained in full, in its dtype; adapters are not in it."""
    dtype = jnp.dtype(rest.config.dtype)
    parts = {
        name: jax.tree.map(lambda x: x.astype(dtype), x)
        for name, x in trained.items()
        if name != LORA
    }
    return dataclasses.replace(rest, arrays={**rest.arrays, **parts})


def merged(arrays: Arrays, trained: Trained, settings: Settings) -> Arrays:
    """A model's arrays after training: adapters added, parts replaced, in the dtypes they had.

    Args:
        arrays: of the base.
        trained: what came of it.
        settings: of the run.

    Raises:
        UserError: for adapters of a base of 8 bits.
    """
    found = dict(arrays)
    if LORA in trained:
        found[DECODER] = merged_decoder(arrays[DECODER], trained[LORA], acting(settings))
    for part in trained.keys() - {LORA}:
        found[part] = jax.tree.map(
            lambda new, old: jnp.array(new, old.dtype, copy=True), trained[part], arrays[part]
        )
    return found


def layout(arrays: Arrays, settings: Settings) -> Trained:
    """Where each trained array lies: a part as it lies in the model, an adapter as its matrix.

    A is split where its matrix's rows are, and B where its columns are.

    Args:
        arrays: the model's, or their shapes with shardings.
        settings: of the run.

    Returns:
        Shardings, or None for arrays that have none.
    """

    def place(x: Any) -> Any:
        return getattr(x, "sharding", None)

    def factors(kernel: Any) -> dict[str, Any]:
        where = place(kernel)
        if not isinstance(where, NamedSharding):
            return {"a": where, "b": where}
        rows, columns = (*where.spec, None, None)[:2]
        return {
            "a": NamedSharding(where.mesh, PartitionSpec(rows, None)),
            "b": NamedSharding(where.mesh, PartitionSpec(None, columns)),
        }

    return {
        part: {path: factors(x) for path, x in matrices(arrays[DECODER]).items()}
        if part == LORA
        else jax.tree.map(place, arrays[part])
        for part in WHAT[settings.train]
    }
