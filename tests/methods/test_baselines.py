import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.ops.visual import VisionOutput


def test_uniform_places_are_the_formula():
    places = jaxprune.UniformPlaces(keep=5).places(144)
    assert places.tolist() == [int((j + 0.5) * 144 / 5) for j in range(5)]


def test_random_places_depend_on_seed_and_number_alone():
    places = jaxprune.RandomPlaces(keep=20, seed=3).places(144)
    assert places.tolist() == jaxprune.RandomPlaces(keep=20, seed=3).places(144).tolist()
    assert places.tolist() != jaxprune.RandomPlaces(keep=20, seed=4).places(144).tolist()
    assert len(set(places.tolist())) == 20
    assert (np.diff(places) > 0).all()


@pytest.mark.parametrize("cls", [jaxprune.RandomPlaces, jaxprune.UniformPlaces])
def test_keeping_everything_changes_nothing(rng, cls):
    x = jnp.asarray(rng.normal(size=(2, 30, 4)), jnp.float32)
    selection = cls(keep=30).select(VisionOutput(x, {}), 30)
    assert (selection.tokens == x).all()
    assert (selection.indices == np.arange(30)).all()


def test_unused_slots_are_marked(rng):
    x = jnp.asarray(rng.normal(size=(1, 9, 2)), jnp.float32)
    selection = jaxprune.UniformPlaces(keep=3).select(VisionOutput(x, {}), 5)
    assert selection.indices.tolist() == [[1, 4, 7, -1, -1]]
    assert selection.counts.tolist() == [3]


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_seed_is_checked(seed):
    with pytest.raises(jaxprune.UserError, match="seed is"):
        jaxprune.RandomPlaces(keep=3, seed=seed)
