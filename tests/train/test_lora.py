"""Adapters in the decoder: as they begin, what they do, and merged."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.models.int8 import rounded, with_int8
from jaxprune.models.llama.config import with_remat
from jaxprune.models.llama.modeling import LlamaDecoder
from jaxprune.train import lora
from jaxprune.train.lora import Acting, adapted, init_adapters, matrices, merged_decoder
from jaxprune.train.trained import init_trained, merged
from tests import builders
from tests.train.builders import batch_of, random_adapters, settings_of

HALF = Acting(scale=0.5)
CONFIG = builders.tiny_config(text={"num_hidden_layers": 1})


@pytest.fixture(scope="module")
def decoder():
    return builders.random_params(CONFIG)["language_model"]


def logits_of(decoder, adapters=None, config=CONFIG):
    """Of a few words, with adapters or without."""

    def run(decoder, adapters):
        model = LlamaDecoder(config.text_config)
        with adapted(adapters, HALF):
            return model.apply({"params": decoder}, jnp.arange(6)[None])

    return jax.jit(run)(decoder, adapters or {})


def with_kernels(decoder, change):
    """A decoder whose layer has other matrices: what `change` makes of a path and a module."""
    layer = {
        block: {
            name: change(f"layers_0/{block}/{name}", own) if "kernel" in own else own
            for name, own in modules.items()
        }
        if block in ("self_attn", "mlp")
        else modules
        for block, modules in decoder["layers_0"].items()
    }
    return {**decoder, "layers_0": layer}


@pytest.fixture(scope="module")
def adapters(decoder):
    return random_adapters(init_adapters(decoder, 3, jax.random.key(0)))


def test_every_matrix_of_the_layers_has_one(decoder):
    attention = {f"layers_0/self_attn/{name}_proj" for name in "qkvo"}
    mlp = {f"layers_0/mlp/{name}_proj" for name in ("gate", "up", "down")}
    assert set(matrices(decoder)) == attention | mlp


def test_they_begin_as_pefts_do(decoder):
    """torch.nn.init.kaiming_uniform_(a=sqrt(5)): variance 1 / (3 in), within 1 / sqrt(in)."""
    adapters = init_adapters(decoder, 100, jax.random.key(0))
    found = adapters["layers_0/mlp/down_proj"]
    assert found["a"].shape == (64, 100) and found["b"].shape == (100, 48)
    assert not found["b"].any()
    a = np.asarray(found["a"])
    assert 0.99 < np.abs(a).max() * 64**0.5 <= 1
    assert a.var() == pytest.approx(1 / (3 * 64), rel=0.05)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    others = adapters["layers_0/mlp/up_proj"]["a"], adapters["layers_0/mlp/gate_proj"]["a"]
    assert np.abs(others[0] - others[1]).max() > 0.05


def changed(adapters):
    """W + s A B in the place of W, written out."""

    def change(path, module):
        own = {name: np.asarray(x, np.float64) for name, x in adapters[path].items()}
        kernel = np.asarray(module["kernel"]) + HALF.scale * own["a"] @ own["b"]
        return {"kernel": jnp.asarray(kernel, jnp.float32)}

    return change


def test_they_add_the_product_of_their_factors(decoder, adapters):
    found, expected = (
        logits_of(decoder, adapters),
        logits_of(with_kernels(decoder, changed(adapters))),
    )
    chex.assert_trees_all_close(found, expected, atol=1e-4)
    assert np.abs(found - logits_of(decoder)).max() > 0.1


def test_they_are_found_where_a_layer_is_computed_again(decoder, adapters):
    """There Flax runs each layer as a root of its own."""
    some = {path: adapters[path] for path in ("layers_0/self_attn/q_proj", "layers_0/mlp/up_proj")}
    found = logits_of(decoder, some, with_remat(CONFIG, "full"))
    chex.assert_trees_all_close(found, logits_of(decoder, some), atol=1e-5)
    assert np.abs(found - logits_of(decoder)).max() > 1e-2


def test_dropout_keeps_the_mean():
    x, eye = jnp.ones((1, 500, 64)), jnp.eye(64)
    acting = Acting(scale=1, dropout=0.25)
    found = np.asarray(lora._added(x, eye, eye, jax.random.key(0), acting))
    assert sorted(set(np.round(found.ravel(), 4))) == [0.0, 1.3333]
    assert found.mean() == pytest.approx(1, abs=0.02)


def test_over_8_bits_they_act_and_are_not_merged(decoder, adapters):
    eighths = {}

    def round_off(path, module):
        eighths[path] = rounded(np.asarray(module["kernel"]))
        return dict(zip(("kernel", "scale"), map(jnp.asarray, eighths[path]), strict=True))

    base = with_kernels(decoder, round_off)
    worth = with_kernels(decoder, lambda path, _: {"kernel": eighths[path][0] * eighths[path][1]})
    found = logits_of(base, adapters, with_int8(CONFIG))
    expected = logits_of(with_kernels(worth, changed(adapters)))
    chex.assert_trees_all_close(found, expected, atol=1e-4)
    with pytest.raises(jaxprune.UserError, match="matrices of 8 bits"):
        merged_decoder(base, adapters, HALF)


def test_the_merged_model_is_the_adapted_one(tiny_model):
    settings = settings_of()
    own = init_trained(tiny_model.arrays, settings, jax.random.key(0))
    own["lora"] = random_adapters(own["lora"])
    own["multi_modal_projector"] = jax.tree.map(lambda x: 1.1 * x, own["multi_modal_projector"])
    before = jax.tree.map(np.asarray, tiny_model.arrays)
    batch, forward = batch_of(tiny_model, (0,)), jax.jit(jaxprune.forward)
    expected = forward(merged(tiny_model.arrays, own, settings), batch).logits
    with adapted(own["lora"], Acting(scale=1.5)):
        arrays = {**tiny_model.arrays, "multi_modal_projector": own["multi_modal_projector"]}
        found = jax.jit(lambda *x: jaxprune.forward(*x))(arrays, batch).logits
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    assert np.abs(found - forward(tiny_model.arrays, batch).logits).max() > 0.1
    chex.assert_trees_all_equal(before, tiny_model.arrays)


def test_merging_keeps_the_dtypes_of_the_base(tiny_model):
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model.arrays)
    for train in ("lora", "all"):
        settings = settings_of(train=train)
        own = init_trained(arrays, settings, jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("float32")}
        found = merged(arrays, own, settings)
        chex.assert_trees_all_equal(found, arrays)  # nothing is trained yet
        chex.assert_trees_all_equal_dtypes(found, arrays)
