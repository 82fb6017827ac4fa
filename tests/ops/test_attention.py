import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxprune.ops.attention import (
    Cached,
    Watch,
    attention,
    cached_attention,
    causal_attention,
    causal_mask,
    full_attention,
    limits,
    scratch_bytes,
)
from jaxprune.ops.attention.by_chunks import attend_by_chunks, attend_by_rows
from jaxprune.ops.attention.by_heads import attend_by_heads, heads_at_once
from jaxprune.ops.attention.definition import Options
from jaxprune.ops.attention.fused import attend_fused
from jaxprune.ops.products import at_least_two_rows
from jaxprune.ops.rope import _by_halves, _by_product


def reference(q, k, v, mask):
    B, H, Q, d = q.shape
    out = np.zeros((B, H, Q, v.shape[-1]), np.float64)
    mask = np.broadcast_to(mask, (B, Q, k.shape[2]))
    for b in range(B):
        for h in range(H):
            shared = h // (H // k.shape[1])
            for t in range(Q):
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
    monkeypatch.setattr(limits, "QUERY_CHUNK", 5)
    chex.assert_trees_all_close(attention(q, k, v, mask), whole, atol=1e-6)


@pytest.mark.parametrize("length, shared", [(9, 4), (16, 2), (17, 1)])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("causal", [True, False])
def test_heads_equal_chunks(rng, length, shared, heads, causal, monkeypatch):
    """What runs on a CPU against what runs elsewhere, rows with holes and padding included."""
    monkeypatch.setattr(limits, "BLOCK", 3)
    monkeypatch.setattr(limits, "FULL_BLOCK", 5)
    monkeypatch.setattr(limits, "STAIRS", 2)
    q = rng.normal(size=(2, 4, length, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, shared, length, 8)).astype(np.float32)
    valid = jnp.asarray(rng.random((2, length)) < 0.7).at[:, 0].set(True)
    asks = jnp.asarray(rng.random((2, length, 2)).astype(np.float32)) * valid[..., None]
    used = valid[:, None, :, None]
    for later in (False, True):
        options = Options(causal=causal, heads=heads, later=later)
        by_heads = attend_by_heads(q, k, v, valid, asks, options)
        by_chunks = attend_by_chunks(q, k, v, valid, asks, options)
        chex.assert_trees_all_close(by_heads[0] * used, by_chunks[0] * used, atol=1e-5)
        chex.assert_trees_all_close(by_heads[1], by_chunks[1], atol=1e-5)
    plain = attend_by_heads(q, k, v, valid, None, options)
    chex.assert_trees_all_close(plain[0] * used, by_chunks[0] * used, atol=1e-5)
    assert plain[1].shape == (0, 2, length)


def test_everything_sees_everything(rng, monkeypatch):
    monkeypatch.setattr(limits, "SHORT", 4)
    monkeypatch.setattr(limits, "FULL_BLOCK", 4)
    q, k, v = rng.normal(size=(3, 2, 4, 9, 8)).astype(np.float32)
    expected = reference(q, k, v, np.ones((1, 9, 9), bool))
    chex.assert_trees_all_close(np.asarray(full_attention(q, k, v)), expected, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 4, 5])
def test_rows_apart_give_the_same(rng, monkeypatch, at_once):
    q, k, v = rng.normal(size=(3, 6, 2, 9, 8)).astype(np.float32)
    valid = jnp.asarray(rng.random((6, 9)) < 0.7)
    asks = jnp.asarray(rng.random((6, 9, 3)).astype(np.float32))
    options = Options(causal=True)
    expected = attend_by_chunks(q, k, v, valid, asks, options)
    monkeypatch.setattr(limits, "SCORES", at_once * 2 * 9 * 9 * 4)
    assert limits.rows_at_once(2, 9) == at_once
    found = attend_by_rows(q, k, v, valid, asks, options)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    out, nothing = attend_by_rows(q, k, v, valid, None, options)
    chex.assert_trees_all_close(out, expected[0], atol=1e-6)
    assert nothing.shape == (0, 6, 9)


@pytest.mark.parametrize("number, cores, expected", [(16, 2, 2), (7, 4, 1), (6, 4, 3), (2, 64, 2)])
def test_heads_at_once_divide(number, cores, expected, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert heads_at_once(number) == expected


def test_heads_have_the_gradient_of_the_definition(rng, monkeypatch):
    q, k, v = rng.normal(size=(3, 1, 2, 11, 4)).astype(np.float32)
    valid = jnp.ones((1, 11), bool)

    def by_definition(q, k, v):
        return (attention(q, k, v, causal_mask(valid)) ** 2).sum()

    def by_heads(q, k, v):
        return (causal_attention(q, k, v, valid)[0] ** 2).sum()

    expected = jax.grad(by_definition, argnums=(0, 1, 2))(q, k, v)
    monkeypatch.setattr(limits, "BLOCK", 4)
    monkeypatch.setattr(limits, "SHORT", 4)
    found = jax.grad(by_heads, argnums=(0, 1, 2))(q, k, v)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2)])
def test_a_cached_query_equals_the_last_of_a_prompt(rng, heads, shared):
    q = rng.normal(size=(3, heads, 7, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, shared, 7, 8)).astype(np.float32)
    valid = jnp.asarray(rng.random((3, 7)) < 0.6).at[:, -1].set(True)
    expected = causal_attention(q, k, v, valid)[0][:, :, -1:]
    k, v = (x.reshape(3 * shared, 7, 8) for x in (k, v))
    for cuts in ([0, 7], [0, 4, 7], [0, 3, 6, 7]):  # in one place and in several
        parts = [
            Cached(k[:, begin:end], v[:, begin:end], valid[:, begin:end])
            for begin, end in itertools.pairwise(cuts)
        ]
        found = cached_attention(q[:, :, -1:], *parts)
        chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_one_row_is_the_first_of_two(rng):
    """What accelerators run instead of a product of one row."""
    row, matrix = (rng.normal(size=size).astype(np.float32) for size in ((3, 1, 8), (3, 8, 5)))
    programs = [
        jax.jit(lambda *x: at_least_two_rows(jnp.matmul, *x)).trace(row, matrix).lower(
            lowering_platforms=(platform,)
        ).as_text()
        for platform in ("cpu", "tpu", "cuda")
    ]  # fmt: skip
    assert ["tensor<3x2x8xf32>" in text for text in programs] == [False, True, True]
    two = jnp.pad(row, ((0, 0), (0, 1), (0, 0)))
    found = at_least_two_rows(jnp.matmul, row, matrix)
    chex.assert_trees_all_close(found, (two @ matrix)[:, :1], atol=1e-6)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_square_matrix_in_the_program(watched, platform):
    S = 3000
    shape = jax.ShapeDtypeStruct((1, 2, S, 8), jnp.float32)

    def program(q, k, v):
        watch = Watch(jnp.ones((2, 1, S)), heads="max") if watched else None
        return causal_attention(q, k, v, jnp.ones((1, S), bool), watch)

    lowered = jax.jit(program).trace(shape, shape, shape).lower(lowering_platforms=(platform,))
    assert f"{S}x{S}xf32" not in lowered.as_text()


def test_a_query_that_sees_nothing_is_finite():
    x = jnp.ones((1, 1, 2, 4))
    assert np.isfinite(attention(x, x, x, jnp.zeros((1, 2, 2), bool))).all()
    x = jnp.ones((1, 1, limits.SHORT + 1, 4))
    assert np.isfinite(
        causal_attention(x, x, x, jnp.zeros(x.shape[:1] + x.shape[2:3], bool))[0]
    ).all()


def test_scratch_is_that_of_the_queries_at_once(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    sizes = {"heads": 8, "key_value_heads": 4, "block": 100}
    on_cpu = 2 * 4 * 100 * 640 * 4  # before and after; four heads of one row
    assert scratch_bytes(3, 640, **sizes) == on_cpu
    assert scratch_bytes(3, 60, **sizes) == on_cpu * 60 * 60 // (100 * 640)
    monkeypatch.setattr(limits, "QUERY_CHUNK", 128)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    one_row = 8 * 128 * 640 * 4
    assert scratch_bytes(3, 640, **sizes) == 2 * 3 * one_row
    monkeypatch.setattr(limits, "SCORES", 2 * one_row)
    assert scratch_bytes(3, 640, **sizes) == 2 * 2 * one_row
    monkeypatch.setattr(limits, "SCORES", one_row // 2)
    assert scratch_bytes(3, 640, **sizes) == one_row
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert scratch_bytes(3, 640, **sizes) == 0


def test_shapes_are_checked_while_tests_run():
    x = jnp.ones((1, 1, 2, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match="valid"):
        causal_attention(x, x, x, jnp.ones((1, 3), bool))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    slots=st.sampled_from([5, 33, 130, 600]),
    heads=st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    how=st.sampled_from(["mean", "max"]),
    later=st.booleans(),
    rows=st.sampled_from([None, 7]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@example(seed=0, slots=600, heads=(4, 2), how="max", later=True, rows=None, dtype="float32")
@pytest.mark.slow
def test_the_kernels_of_a_tpu(seed, slots, heads, how, later, rows, dtype):
    """Step by step on this machine: outputs and what is received, against the definition."""
    rng = np.random.default_rng(seed)
    H, J = heads
    q = jnp.asarray(rng.normal(size=(2, H, slots, 16)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, 2, J, slots, 16)), dtype)
    valid = jnp.asarray(rng.random((2, slots)) < 0.8).at[:, 0].set(True)
    asking = rng.random((2, 2, slots)) < (0.5 if rows is None else 0.0)
    asking[..., -5:] = True
    queries = jnp.asarray(asking * rng.random((2, 2, slots)), jnp.float32)
    options = Options(causal=True, heads=how, later=later, rows=rows)
    found = attend_fused(q, k, v, valid, queries, options=options, interpret=True)
    plain = causal_attention(q, k, v, valid)[0]
    expected = attend_by_chunks(q, k, v, valid, jnp.moveaxis(queries, 0, -1), options)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    chex.assert_trees_all_close(found, expected, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(found[0], plain, atol=tolerance, rtol=tolerance)


def test_the_kernel_of_a_tower_and_gradients(rng):
    q, k, v = jnp.asarray(rng.normal(size=(3, 2, 4, 150, 8)), jnp.float32)
    valid = jnp.ones((2, 150), bool)

    def loss(options, interpret):
        attend = functools.partial(attend_fused, interpret=True) if interpret else None
        return lambda *x: ((attend or by_chunks)(*x, valid, None, options=options)[0] ** 2).sum()

    def by_chunks(*x, options):
        return attend_by_chunks(*x, options)

    for causal in (False, True):
        options = Options(causal=causal)
        found, expected = (
            jax.value_and_grad(loss(options, how), argnums=(0, 1, 2))(q, k, v)
            for how in (True, False)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-4)


def test_two_ways_to_rotate_give_the_same_numbers(rng):
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    cos, sin = rng.normal(size=(2, 2, 1, 5, 4)).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        one, other = (
            jax.jit(way)(jnp.asarray(x, dtype), cos, sin) for way in (_by_halves, _by_product)
        )
        assert (one == other).all()
