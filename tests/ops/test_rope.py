import chex
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.ops.rope import angles, frequencies, rotate

INV_FREQ = frequencies(12, 10000)


def test_three_equal_axes_equal_one(rng):
    positions = jnp.asarray(rng.integers(0, 900, size=(2, 5)))
    equal = jnp.stack([positions] * 3)
    chex.assert_trees_all_equal(
        angles(equal, INV_FREQ, sections=(1, 2, 3)), angles(positions, INV_FREQ)
    )


@pytest.mark.parametrize("by_row", [False, True])
def test_sections_equal_the_formula(rng, by_row):
    positions = rng.integers(0, 900, size=(3, 2, 5))
    inv_freq = np.stack([INV_FREQ, INV_FREQ / 2]) if by_row else INV_FREQ
    expected = np.zeros((2, 5, 6), np.float32)
    for b in range(2):
        for place, axis in enumerate([0, 1, 1, 2, 2, 2]):
            of_row = inv_freq[b] if by_row else inv_freq
            expected[b, :, place] = positions[axis, b].astype(np.float32) * of_row[place]
    chex.assert_trees_all_equal(np.asarray(angles(positions, inv_freq, (1, 2, 3))), expected)


def test_heads_turn_by_their_angles_in_the_plane(rng):
    x = rng.normal(size=(2, 3, 5, 12)).astype(np.float32)
    turned = angles(rng.integers(0, 900, size=(2, 5)), INV_FREQ)
    pairs = x[..., :6] + 1j * x[..., 6:]
    pairs = 0.5 * pairs * np.exp(1j * np.asarray(turned, np.float64))[:, None]
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    found = np.asarray(rotate(x, turned, scale=0.5))
    chex.assert_trees_all_close(found, expected.astype(np.float32), atol=1e-5)


def test_sections_that_do_not_fit_are_refused():
    one, three = jnp.zeros((1, 4), int), jnp.zeros((3, 1, 4), int)
    for positions, sections in ((one, (6,)), (three, None), (three, (3, 3)), (three, (1, 2, 4))):
        with pytest.raises(ValueError, match="sections"):
            angles(positions, INV_FREQ, sections)
