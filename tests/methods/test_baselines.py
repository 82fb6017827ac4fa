import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.ops.tiles import one_tile, patches_of
from tests.methods.builders import chosen_of, packing_of, select

PACKING = packing_of([one_tile(9)])


def places(method, number):
    """Where the kept patches of an image of `number` patches are."""
    return np.nonzero(chosen_of(method, {}, number))[0]


def test_uniform_places_are_the_formula():
    found = places(jaxprune.UniformPlaces(keep=5), 144)
    assert found.tolist() == [int((j + 0.5) * 144 / 5) for j in range(5)]


def test_random_places_depend_on_seed_and_number_alone():
    first = places(jaxprune.RandomPlaces(keep=20, seed=3), 144)
    assert first.tolist() == places(jaxprune.RandomPlaces(keep=20, seed=3), 144).tolist()
    assert first.tolist() != places(jaxprune.RandomPlaces(keep=20, seed=4), 144).tolist()
    assert first.tolist() != places(jaxprune.RandomPlaces(keep=20, seed=3), 145).tolist()
    assert len(first) == 20


def test_a_seed_may_be_a_shape():
    """As compilers get it, who see no numbers."""
    shaped = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((), x.dtype), jaxprune.RandomPlaces(keep=3)
    )
    (seed,) = jax.tree.leaves(shaped)
    assert seed.dtype == jnp.uint32
    kept = jax.eval_shape(lambda method: method.choose(patches_of({}, PACKING, 9)).kept, shaped)
    assert kept.shape == (1, 1, 9)


@pytest.mark.parametrize("cls", [jaxprune.RandomPlaces, jaxprune.UniformPlaces])
def test_keeping_everything_changes_nothing(rng, cls):
    x = jnp.asarray(rng.normal(size=(2, 30, 4)), jnp.float32)
    selection = select(cls(keep=30), x, {}, capacity=30)
    assert (selection.tokens == x).all()
    assert (selection.indices == np.arange(30)).all()


def test_unused_slots_are_marked(rng):
    x = jnp.asarray(rng.normal(size=(1, 9, 2)), jnp.float32)
    selection = select(jaxprune.UniformPlaces(keep=3), x, {}, capacity=5)
    assert selection.indices.tolist() == [[1, 4, 7, -1, -1]]
    assert selection.counts.tolist() == [3]


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**32])
def test_seed_is_checked(seed):
    with pytest.raises(jaxprune.UserError, match="seed is"):
        jaxprune.RandomPlaces(keep=3, seed=seed)
