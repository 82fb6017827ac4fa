import chex
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.ops.ranking import descending_order, gather_tokens, quartiles, ranks

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=40)


@settings(max_examples=50, deadline=None)
@given(scores)
def test_ties_keep_the_lower_index(values):
    s = np.asarray(values, np.float32)
    expected = np.argsort(-s, kind="stable")
    order = descending_order(jnp.asarray(s))
    chex.assert_trees_all_equal(np.asarray(order), expected.astype(np.int32))
    chex.assert_trees_all_equal(
        np.asarray(ranks(order))[expected], np.arange(len(s), dtype=np.int32)
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60))
def test_quartiles_are_numpys(values):
    s = np.asarray(values, np.float32)
    found = [float(x) for x in quartiles(jnp.asarray(s))]
    chex.assert_trees_all_close(found, np.percentile(s, [25, 75]).tolist(), atol=1e-6)


def test_gather_out_of_range_is_nan():
    found = gather_tokens(jnp.ones((1, 3, 2)), jnp.asarray([[1, 7]]))
    assert np.isfinite(found[0, 0]).all()
    assert np.isnan(found[0, 1]).all()
