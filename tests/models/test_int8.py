"""Weights rounded to 8 bits."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import jaxprune
from jaxprune.models.int8 import rounded
from jaxprune.models.llama.modeling import Int8Dense


def test_every_weight_is_within_half_a_step(rng):
    kernel = rng.normal(size=(40, 6)).astype(np.float32) * 10.0 ** np.arange(-3, 3)
    kernel[:, 2] = 0
    whole, scale = rounded(kernel)
    assert np.abs(whole).max(axis=0).tolist() == [127, 127, 0, 127, 127, 127]
    assert (np.abs(whole * scale - kernel) <= scale / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_layer_is_the_product_with_the_rounded_matrix(rng, rows, dtype, tolerance):
    whole, scale = rounded(rng.normal(size=(32, 8)).astype(np.float32))
    bias = rng.normal(size=8).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(rows, 32)), dtype)
    params = {
        "kernel": jnp.asarray(whole),
        "scale": jnp.asarray(scale),
        "bias": jnp.asarray(bias, dtype),
    }
    found = Int8Dense(8, True, dtype).apply({"params": params}, x)
    expected = np.asarray(x, np.float64) @ (whole * scale.astype(np.float64)) + bias
    assert found.dtype == dtype
    chex.assert_trees_all_close(np.asarray(found, np.float64), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.slow
def test_the_small_model_answers_as_before(small_model, held_out):
    params = jaxprune.load(dtype="int8")
    requests = [(image, question.question) for image, question in held_out[:8]]
    before, after = (
        [*jaxprune.generate_many(model, requests, max_new_tokens=4)]
        for model in (small_model, params)
    )
    assert sum(a == b for a, b in zip(before, after, strict=True)) >= 7
    found = {path: x.dtype for path, x in flatten_dict(params.arrays, sep="/").items()}
    rounded_ones = {path for path, dtype in found.items() if dtype == np.int8}
    layers = params.config.text_config.num_hidden_layers
    assert len(rounded_ones) == 7 * layers
    assert all(path.startswith("language_model/layers_") for path in rounded_ones)
    assert {dtype.name for path, dtype in found.items() if path not in rounded_ones} == {"float32"}


def test_it_is_not_exported(tiny_directory, tmp_path):
    params = jaxprune.load(tiny_directory, dtype="int8")
    with pytest.raises(jaxprune.UserError, match="rounded to int8"):
        jaxprune.export(params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_alone():
    config = jaxprune.read_config("llava-1.5-7b", "int8")
    assert config.dtype == "bfloat16" and config.text_config.int8
    assert config.to_hf() == jaxprune.read_config("llava-1.5-7b").to_hf()
