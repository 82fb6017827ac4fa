"""Updates: sums of micro-batches, states that are kept whole, programs, meshes."""

import dataclasses
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.inputs.request import NO_LABEL
from jaxprune.models.int8 import with_int8
from jaxprune.models.registry import family_of
from jaxprune.train.step import Trainer
from tests import builders
from tests.cases import mostly_slow
from tests.devices.test_mesh import on_cpus
from tests.train.builders import batch_of, settings_of

EQUAL = ("no", "no", "no", "no")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    builders.write_directory(directory, builders.tiny_config(text={"num_hidden_layers": 1}))
    return jaxprune.load(directory)


@pytest.fixture(scope="module")
def trainer(model):
    return Trainer(model, settings_of(dropout=0.25), 10)


@pytest.fixture(scope="module")
def micro(model):
    return [batch_of(model, rows) for rows in ((0, 1), (2, 3))]


def whole_again(state):
    """A copy, since an update takes its state."""
    return jax.tree.map(jnp.copy, state)


def test_a_run_lowers_the_loss_and_leaves_the_model_alone(model, trainer, micro):
    before = jax.tree.map(np.array, model.arrays)
    state = trainer.begin(model)
    first = sum(float(trainer.score(state, batch).loss) for batch in micro)
    told = []
    for _ in range(6):
        state, update = trainer.update(state, micro)
        told.append(update)
    last = sum(float(trainer.score(state, batch).loss) for batch in micro)
    assert last < 0.9 * first
    assert int(state.step) == 6
    assert all(bool(update.finite) for update in told)
    tokens = sum(int((np.asarray(batch.labels) >= 0).sum()) for batch in micro)
    assert (int(told[0].scored.tokens), int(told[0].scored.rows)) == (tokens, 4)
    chex.assert_trees_all_equal(model.arrays, before)


def test_an_optimiser_has_state_of_what_is_trained_alone(model, trainer):
    numbers = {x.size for x in jax.tree.leaves(trainer.state_shapes.trained)}
    moments = [x for x in jax.tree.leaves(trainer.state_shapes.optimiser) if x.shape]
    trained = jax.tree.leaves(trainer.state_shapes.trained)
    assert sorted(x.shape for x in moments) == sorted(2 * [x.shape for x in trained])
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    assert model["language_model"]["embed_tokens"]["embedding"].size not in numbers


def test_nothing_compiles_after_the_first_update(model, trainer, micro, compilations):
    state = trainer.begin(model)
    state, _ = trainer.update(state, micro)
    trainer.score(state, micro[0])
    compilations.clear()
    other = batch_of(model, (3, 2), answers=("yes", "it is", "up", "red"))
    state, _ = trainer.update(state, [other, micro[0], micro[1]])
    trainer.score(state, other)
    assert compilations == []


def test_dropout_is_new_in_every_update_and_micro_batch(model, trainer, micro):
    """The same rows have another loss each time, and the same one in a run that resumes."""
    state = trainer.begin(model)
    state, _ = trainer.update(state, micro[:1])
    saved = whole_again(state)
    losses = []
    for batches in (micro[:1], micro[:1] * 2):
        _, told = trainer.update(whole_again(saved), batches)
        losses.append(float(told.loss))
    later = whole_again(saved)._replace(step=jnp.int32(7))
    losses.append(float(trainer.update(later, micro[:1])[1].loss))
    assert len(set(losses)) == 3
    one, two = (trainer.update(whole_again(saved), micro) for _ in range(2))
    chex.assert_trees_all_equal(one, two)


def test_a_micro_batch_without_answers_does_not_count(model, trainer, micro):
    labels = np.full_like(micro[1].labels, NO_LABEL)
    empty = dataclasses.replace(micro[1], labels=labels)
    state, _ = trainer.update(trainer.begin(model), micro)
    alone = trainer.update(whole_again(state), micro[:1])
    chex.assert_trees_all_equal(trainer.update(whole_again(state), [micro[0], empty]), alone)
    _, told = trainer.update(state, [empty])
    assert told.finite and told.norm == 0


def test_a_loss_that_is_no_number_changes_nothing(model, trainer, micro):
    state, _ = trainer.update(trainer.begin(model), micro)
    before = jax.tree.map(np.array, state)
    pixels = np.full_like(micro[1].pixel_values, np.nan)
    bad = dataclasses.replace(micro[1], pixel_values=pixels)
    state, told = trainer.update(state, [micro[0], bad])
    assert not told.finite
    chex.assert_trees_all_equal(state, before)


@pytest.mark.parametrize("train", mostly_slow(["lora", "all"], ["all"]))
def test_micro_batches_are_one_batch(train, model):
    """Where answers have equally many tokens; and each part is trained."""
    trainer = Trainer(model, settings_of(train=train), 4)
    states = []
    for parts in ([(0, 1), (2, 3)], [(0, 1, 2, 3)]):
        batches = [batch_of(model, rows, answers=EQUAL) for rows in parts]
        state, told = trainer.update(trainer.begin(model), batches)
        states.append((state.optimiser, told))
    chex.assert_trees_all_close(*states, atol=1e-5, rtol=1e-4)
    first = jax.tree.map(np.asarray, trainer.begin(model).trained)
    for part, own in state.trained.items():
        moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), own, first[part])
        assert max(jax.tree.leaves(moved)) > 1e-4, part


def test_parts_of_the_model():
    config = builders.tiny_config(text={"num_hidden_layers": 1})
    params = jaxprune.Params(family_of(config).param_shapes(config), config)
    expected = {
        "lora": {"lora", "multi_modal_projector"},
        "projector": {"multi_modal_projector"},
        "decoder": {"language_model"},
        "all": {"language_model", "multi_modal_projector"},
    }
    for train, parts in expected.items():
        trainer = Trainer(params, settings_of(train=train), 4)
        assert set(trainer.state_shapes.trained) == parts
        assert set(trainer.rest.arrays) == set(params.arrays) - parts
    with pytest.raises(jaxprune.UserError, match="train='all' ends in a whole model"):
        Trainer(dataclasses.replace(params, config=with_int8(config)), settings_of(train="all"), 4)


def test_programs_are_made_of_shapes_alone(model, micro):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), model.arrays
    )
    text = dataclasses.replace(model.config.text_config, dtype="bfloat16")
    vision = dataclasses.replace(model.config.vision_config, dtype="bfloat16")
    config = dataclasses.replace(model.config, text_config=text, vision_config=vision)
    trainer = Trainer(dataclasses.replace(model, arrays=shapes, config=config), settings_of(), 4)
    batch = dataclasses.replace(micro[0], config=config)
    add, change = trainer.lowered(batch)
    for program in (add, change):
        found = {x.dtype for x in jax.tree.leaves(program.out_info)}
        assert found <= {np.dtype(x) for x in ("float32", "int32", "bool")}
    assert jax.tree.map(jnp.shape, add.out_info.gradients) == jax.tree.map(
        jnp.shape, trainer.state_shapes.trained
    )


PROGRAM = """
import sys

import chex
import jax
import jaxprune
import numpy as np
from jax.sharding import PartitionSpec
from jaxprune.train.step import Trainer
from tests.train.builders import batch_of, settings_of

directory, train, *sizes = sys.argv[1:]
one = jaxprune.load(directory)
mesh = jax.make_mesh(tuple(map(int, sizes)), ("data", "model"))
eight = jaxprune.load(directory, mesh=mesh)
ends = []
for model in (one, eight):
    options = {"method": "fitprune", "deletions": (6,), "num_tokens": 16, "gather": True}
    micro = [batch_of(one, rows, **options) for rows in ((0, 1, 2, 3), (3, 2, 1, 0))]
    trainer = Trainer(model, settings_of(train=train, dropout=0.1, remat="full"), 4)
    state, updates = trainer.begin(model), []
    for _ in range(2):
        state, told = trainer.update(state, micro)
        updates.append(told)
    placed = jax.tree.map(lambda x: x.sharding, state)
    assert placed == trainer.layout
    scored = trainer.score(state, micro[0])
    ends.append(jax.device_get((state.optimiser, updates, scored)))
if train == "lora":
    down = trainer.layout.trained["lora"]["layers_0/mlp/down_proj"]
    assert down["a"].spec == PartitionSpec("model", None), down
    assert down["b"].spec == PartitionSpec(None, None), down
    up = trainer.layout.trained["lora"]["layers_0/mlp/up_proj"]
    assert up["b"].spec == PartitionSpec(None, "model"), up
chex.assert_trees_all_close(*ends, rtol=1e-3, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("train, sizes", [("lora", "42"), ("all", "24"), ("lora", "81")])
def test_eight_devices_train_as_one(train, sizes, tmp_path):
    directory = tmp_path / "model"
    text = {"num_hidden_layers": 1, "num_key_value_heads": 4}
    builders.write_directory(directory, builders.tiny_config(text=text))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, directory, train, *sizes],
        capture_output=True,
        text=True,
        env=on_cpus(8),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"
