import chex
import jax.numpy as jnp
import numpy as np

from jaxprune.ops.merging import neighbour_weights, weighted_sum


def test_neighbours_equal_the_definition(rng):
    keys, x = rng.normal(size=(2, 2, 9, 4)).astype(np.float32)
    scores = rng.random((2, 9)).astype(np.float32)
    kept = np.array([[0, 4, 7], [8, 1, 2]], np.int32)
    weights = neighbour_weights(keys, scores, kept, neighbours=3)
    expected = np.zeros((2, 3, 9), np.float32)
    for f in range(2):
        unit = keys[f] / np.linalg.norm(keys[f], axis=-1, keepdims=True)
        for i, token in enumerate(kept[f]):
            similarity = unit @ unit[token]
            similarity[token] = -np.inf
            nearest = np.argsort(-similarity)[:3]
            expected[f, i, nearest] = scores[f, nearest]
    chex.assert_trees_all_equal(np.asarray(weights), expected)
    chex.assert_trees_all_close(np.asarray(weighted_sum(weights, x)), expected @ x, atol=1e-6)


def test_a_key_of_zeros_has_no_direction():
    weights = neighbour_weights(jnp.zeros((1, 3, 2)), jnp.ones((1, 3)), jnp.array([[1]]), 1)
    assert weights.tolist() == [[[1, 0, 0]]]
