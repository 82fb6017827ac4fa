import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.ops import attention as module
from jaxprune.ops.attention import attention, causal_mask


def reference(q, k, v, mask):
    B, H, T, d = q.shape
    out = np.zeros((B, H, T, v.shape[-1]), np.float64)
    mask = np.broadcast_to(mask, (B, T, k.shape[2]))
    for b in range(B):
        for h in range(H):
            shared = h // (H // k.shape[1])
            for t in range(T):
                seen = mask[b, t]
                logits = (k[b, shared, seen] @ q[b, h, t]).astype(np.float64) / np.sqrt(d)
                weights = np.exp(logits - logits.max())
                out[b, h, t] = weights / weights.sum() @ v[b, shared, seen]
    return out


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (4, 1)])
def test_equals_the_definition(rng, heads, shared):
    q = rng.normal(size=(2, heads, 7, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, shared, 7, 8)).astype(np.float32)
    valid = np.arange(7) < np.array([[7], [4]])
    mask = causal_mask(jnp.asarray(valid))
    out = attention(q, k, v, mask)
    chex.assert_trees_all_close(np.asarray(out), reference(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("length", [9, 16, 17])
def test_chunks_of_queries_give_the_same(rng, monkeypatch, length):
    q, k, v = rng.normal(size=(3, 2, 4, length, 8)).astype(np.float32)
    mask = causal_mask(jnp.ones((2, length), bool))
    whole = attention(q, k, v, mask)
    monkeypatch.setattr(module, "QUERY_CHUNK", 5)
    chex.assert_trees_all_close(attention(q, k, v, mask), whole, atol=1e-6)


def test_no_square_matrix_in_the_program():
    S = 3000
    shape = jax.ShapeDtypeStruct((1, 2, S, 8), jnp.float32)
    program = jax.jit(lambda q, k, v: attention(q, k, v, jnp.ones((1, S, S), bool)))
    text = program.lower(shape, shape, shape).as_text()
    assert f"{S}x{S}xf32" not in text


def test_a_query_that_sees_nothing_is_finite():
    x = jnp.ones((1, 1, 2, 4))
    assert np.isfinite(attention(x, x, x, jnp.zeros((1, 2, 2), bool))).all()
