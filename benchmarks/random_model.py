"""A model of any size with random weights, for what needs its shapes alone. No benchmark itself."""

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune
from jaxprune.inputs.processor import Processor, load_processor
from jaxprune.models.registry import family_of

IMAGE_TOKEN = 4
"""Of the small model's tokenizer, which all of these have; a config has to say so."""


def write_processor(config: Any, directory: pathlib.Path) -> None:
    """The small model's tokenizer and an image processor of the config's geometry."""
    for path in jaxprune.SMALL_MODEL.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            (directory / path.name).write_bytes(path.read_bytes())
    for file, content in family_of(config).processor_files(config).items():
        (directory / file).write_text(json.dumps(content))


def endless_processor(config: Any) -> Processor:
    """A processor without an end-of-sequence token: answers are as long as asked for."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        write_processor(config, directory)
        return dataclasses.replace(load_processor(directory, config), eos_token_ids=())


def random_params(config: Any) -> jaxprune.Params:
    """Weights drawn on the device, tensor by tensor, so that no second copy is ever there."""
    config = dataclasses.replace(config, image_token_index=IMAGE_TOKEN)
    shapes, places = jax.tree.flatten(family_of(config).param_shapes(config))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(
        lambda key, shape, dtype: (0.02 * jax.random.normal(key, shape)).astype(dtype),
        static_argnums=(1, 2),
    )
    arrays = [
        draw(key, leaf.shape, leaf.dtype) if len(leaf.shape) > 1 else jnp.ones_like(leaf)
        for key, leaf in zip(keys, shapes, strict=True)
    ]
    return jaxprune.Params(jax.tree.unflatten(places, arrays), config, endless_processor(config))
