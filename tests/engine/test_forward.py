"""A whole model as a pure function: the logits of `generate`, gradients, jit and meshes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from tests.builders import start
from tests.cases import FEW, mostly_slow, options_of, picture

CASES = ["none", "prumerge", "uniform", "fitprune", "gsearch", "adaptive pair"]


@pytest.fixture(scope="module")
def rows():
    return [picture(i) for i in range(3)], ["What?", "Where is the red circle, and why?", "a b c"]


def logits_at_the_end(batch, found):
    """Logits of the last token of each row: float32 `[B, V]`."""
    last = np.asarray(batch.layout.lengths) - 1
    place = (np.asarray(found.slots) == last[:, None]) & np.asarray(found.valid)
    return np.asarray(found.logits)[np.arange(len(last)), place.argmax(axis=1)]


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("name", mostly_slow(CASES, ["none", "prumerge", "fitprune"]))
def test_it_has_the_logits_of_generate(name, gather, tiny_model, rows):
    batch = jaxprune.batch(tiny_model, *rows, gather=gather, buckets=FEW, **options_of(name))
    found = jax.jit(jaxprune.forward)(tiny_model, batch)
    expected = start(tiny_model, *rows, buckets=FEW, **options_of(name))
    chex.assert_trees_all_close(
        logits_at_the_end(batch, found)[:3], np.asarray(expected.first_logits)[:3], atol=1e-4
    )
    if found.kept is not None and expected.seen.selection is not None:
        kept = np.asarray(expected.seen.selection.indices)
        assert np.asarray(found.kept).tolist() == kept.tolist()


def loss(arrays, batch):
    found = jaxprune.forward(arrays, batch)
    labels = jnp.take_along_axis(jnp.asarray(batch.labels), found.slots, axis=1)
    said = jax.nn.log_softmax(found.logits)
    each = jnp.take_along_axis(said, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, each, 0)) / jnp.sum(labels >= 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "prumerge_plus", "fitprune", "sparsevlm"])
def test_it_has_gradients(name, tiny_model, rows):
    """Those that a small step along one of them bears out, in every part of the model."""
    options = {"buckets": FEW, "answers": ["one", "two words", "x"], **options_of(name)}
    batch = jaxprune.batch(tiny_model, *rows, gather=name in ("fitprune", "sparsevlm"), **options)
    value = jax.jit(loss)
    found = jax.jit(jax.grad(loss))(tiny_model.arrays, batch)
    chex.assert_tree_all_finite(found)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(found[part])), part
    length = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(found))
    step = 1e-3 / length**0.5
    moved = [
        jax.tree.map(lambda x, g, s=sign: x + s * step * g, tiny_model.arrays, found)
        for sign in (1, -1)
    ]
    rise = float(value(moved[0], batch) - value(moved[1], batch)) / (2 * step)
    assert rise == pytest.approx(length, rel=0.05)


def test_labels_are_the_answers(tiny_model, rows):
    batch = jaxprune.batch(tiny_model, *rows, answers=["one", "two words", "x"], buckets=FEW)
    tokenizer = tiny_model.processor.tokenizer
    for own, text in zip(batch.labels, ("one", "two words", "x"), strict=False):
        ids = own[own >= 0].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_mistakes(tiny_model, rows):
    with pytest.raises(jaxprune.UserError, match=r"batch is a dict; expected what jaxprune\.batch"):
        jaxprune.forward(tiny_model, {})
    with pytest.raises(jaxprune.UserError, match="1 answers came with 3 prompts"):
        jaxprune.batch(tiny_model, *rows, answers="one")
    with pytest.raises(jaxprune.UserError, match=r"inside jax.jit, .* jaxprune.forward"):
        jax.jit(lambda p: jaxprune.generate(p, None, "Hi"))(tiny_model)
