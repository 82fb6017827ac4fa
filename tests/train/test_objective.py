"""The loss: of the answers alone, whatever is dropped, and whatever is computed again."""

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.train.objective import objective, score, score_trained
from jaxprune.train.trained import init_trained, resting
from tests import builders
from tests.cases import mostly_slow
from tests.train.builders import batch_of, random_adapters, settings_of

FITPRUNE = {"method": "fitprune", "deletions": (5, 6), "num_tokens": 16}
GSEARCH = {"method": "gsearch", "keep_rates": (1.0, 0.4)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    builders.write_directory(directory, builders.tiny_config(text={"num_hidden_layers": 2}))
    return jaxprune.load(directory)


@pytest.fixture(scope="module")
def trained(model):
    own = init_trained(model.arrays, settings_of(), jax.random.key(0))
    return {**own, "lora": random_adapters(own["lora"])}


def gradient(trained, model, batch, **fields):
    settings = settings_of(**fields)

    def run(trained, rest, batch):
        return jax.value_and_grad(objective, has_aux=True)(trained, rest, batch, settings)

    return jax.jit(run)(trained, resting(model, settings), batch)


def test_scores_are_those_of_the_logits(model):
    """In a shortened sequence; one row is answered just as the model would, another is padding."""
    batch = batch_of(model, (0, 1, 2), gather=True, **FITPRUNE)
    found = jax.jit(jaxprune.forward)(model.arrays, batch)
    logits, slots = np.asarray(found.logits, np.float64), np.asarray(found.slots)
    labels = np.asarray(batch.labels).copy()
    for place, slot in enumerate(slots[0]):
        if found.valid[0, place] and labels[0, slot] >= 0:
            labels[0, slot] = logits[0, place].argmax()
    losses = []
    for row, place in np.argwhere(np.asarray(found.valid)):
        label, own = labels[row, slots[row, place]], logits[row, place]
        if label >= 0:
            losses.append(math.log(np.exp(own).sum()) - own[label])
    batch = dataclasses.replace(batch, labels=labels, answer_slots=8)
    scored = jax.jit(score)(model.arrays, batch)
    assert int(scored.tokens) == len(losses) == (labels >= 0).sum()
    assert float(scored.loss) == pytest.approx(sum(losses), rel=1e-5)
    assert (int(scored.right), int(scored.rows)) == (1, 3)


def test_a_batch_has_room_for_its_longest_answer(model):
    options = {"answers": ["no", "a word of many"], "buckets": jaxprune.Buckets(text=(9, 17, 40))}
    batch = jaxprune.batch(model, None, ["What?", "Who is there?"], **options)
    most = (np.asarray(batch.labels) >= 0).sum(axis=1).max()
    assert 9 < most <= batch.answer_slots == 17 < batch.labels.shape[1]


@pytest.mark.parametrize("options", mostly_slow([FITPRUNE, GSEARCH], [FITPRUNE]))
def test_gathering_is_masking(options, model, trained):
    both = [
        gradient(trained, model, batch_of(model, gather=gather, **options))
        for gather in (True, False)
    ]
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "remat, options", mostly_slow([("full", FITPRUNE), ("dots", FITPRUNE), ("full", GSEARCH)],
                                  [("full", FITPRUNE)])
)  # fmt: skip
def test_computing_again_changes_nothing(remat, options, model, trained):
    batch = batch_of(model, gather=True, **options)
    expected = gradient(trained, model, batch)
    chex.assert_trees_all_close(gradient(trained, model, batch, remat=remat), expected, atol=1e-5)


def kept_for(trained, model, batch, remat):
    """The shapes of what is kept for the gradient, beside the parameters."""
    settings = settings_of(remat=remat)

    def pull(trained, rest, batch):
        return jax.vjp(lambda x: objective(x, rest, batch, settings)[0], trained)[1]

    found = jax.eval_shape(pull, trained, resting(model, settings), batch)
    shapes = [x.shape for x in jax.tree.leaves(found) if np.issubdtype(x.dtype, np.floating)]
    own = {x.shape for x in jax.tree.leaves((trained, model.arrays))}
    return [shape for shape in shapes if shape not in own]


def test_less_is_kept_where_more_is_computed_again(model, trained):
    batch = batch_of(model)
    B, S = batch.labels.shape
    c = model.config.text_config
    none, dots, full = (kept_for(trained, model, batch, x) for x in ("none", "dots", "full"))
    sizes = [sum(map(math.prod, shapes)) for shapes in (none, dots, full)]
    assert sizes[0] > sizes[1] > sizes[2]
    # Of the MLP: what it is given, and the products that are kept.
    assert full.count((B, S, c.intermediate_size)) == 0
    assert dots.count((B, S, c.intermediate_size)) == 2 * c.num_hidden_layers
    assert full.count((B, S, c.hidden_size)) <= c.num_hidden_layers + 1


def test_dropout_is_of_training_alone(model, trained):
    batch, rest = batch_of(model), resting(model, settings_of())

    def loss_with(dropout):
        settings = settings_of(dropout=dropout)
        return jax.jit(lambda key: score_trained(trained, rest, batch, settings, key).loss)

    loss = loss_with(0.5)
    one, same, other = (float(loss(jax.random.key(seed))) for seed in (1, 1, 2))
    assert one == same != other
    without = float(loss_with(0.0)(None))
    assert float(loss(None)) == without
    assert without not in (one, other)
