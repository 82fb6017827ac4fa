"""VisPruner against a rendering with lists that get shorter."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.ops.visual import FEATURES
from tests.methods.builders import check_on_tiles, chosen_of


def vispruner(x, a, keep, ratio=0.5, lengths=None):
    """Which patches stay; `lengths` is given the list's length after each round."""
    x = np.asarray(x, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    order = np.argsort(-np.asarray(a), kind="stable").tolist()
    number = int(keep * ratio)
    important, rest, room = order[:number], order[number:], keep - number
    if room == 0:
        return np.sort(important)
    while len(rest) > room:
        one, other = rest[::2], rest[1::2]
        s = (x[one] @ x[other].T).max(axis=1)
        falling = np.argsort(-s, kind="stable")
        drop = min(8, len(rest) - room, len(one))
        rest = [one[i] for i in falling[drop:]] + other
        if lengths is not None:
            lengths.append(len(rest))
    return np.sort(important + rest)


def kept_by(x, a, keep, ratio):
    signals = {FEATURES: jnp.asarray(x[None]), ATTENTION: jnp.asarray(a[None], jnp.float32)}
    kept = chosen_of(jaxprune.VisPruner(keep=keep, important=ratio), signals, len(x))
    return np.flatnonzero(kept).tolist()


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    number=st.sampled_from([1, 9, 40]),
    share=st.floats(0, 1),
    ratio=st.sampled_from([0, 0.25, 0.5, 0.75, 0.9, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_against_lists(number, share, ratio, seed):
    rng = np.random.default_rng(seed)
    keep = max(1, round(share * number))
    x = rng.normal(size=(number, 6)).astype(np.float32)
    a = np.round(rng.random(number), 1).astype(np.float32)  # with ties
    assert kept_by(x, a, keep, ratio) == vispruner(x, a, keep, ratio).tolist()


@pytest.mark.parametrize(("number", "keep", "ratio"), [(9, 2, 0.5), (9, 1, 0), (14, 4, 0.5)])
def test_lists_where_the_published_code_fails(rng, number, keep, ratio):
    # Odd ones, and more to drop than half of the list has.
    x, a = rng.normal(size=(number, 6)).astype(np.float32), rng.random(number)
    assert kept_by(x, a, keep, ratio) == vispruner(x, a, keep, ratio).tolist()


def test_eight_are_dropped_in_a_round(rng):
    lengths: list[int] = []
    x, a = rng.normal(size=(576, 64)).astype(np.float32), rng.random(576)
    kept = vispruner(x, a, 128, lengths=lengths)
    assert lengths == list(range(504, 63, -8)) and len(lengths) == 56
    assert kept_by(x, a, 128, 0.5) == kept.tolist()


def test_duplicates_and_zeros(rng):
    x = np.repeat(rng.normal(size=(3, 6)), 3, axis=0).astype(np.float32)
    x[4] = 0
    for keep in (1, 2, 5, 8, 9):
        assert len(kept_by(x, np.zeros(9), keep, 0.5)) == keep
    # Of pairs next to each other on the list one stays.
    x, a = np.repeat(np.eye(4, dtype=np.float32), 2, axis=0), np.arange(8)[::-1]
    assert kept_by(x, a, 4, 0) == [1, 3, 5, 7]


def test_all_by_attention_is_fastervlm(rng):
    x, a = rng.normal(size=(40, 6)).astype(np.float32), rng.random(40).astype(np.float32)
    expected = chosen_of(jaxprune.FasterVLM(keep=17), {ATTENTION: jnp.asarray(a[None])}, 40)
    assert kept_by(x, a, 17, 1) == np.flatnonzero(expected).tolist()


def test_tiles_together_and_apart(rng):
    x, a = rng.normal(size=(4, 9, 6)), rng.random((4, 9))
    signals = {FEATURES: jnp.asarray(x, jnp.float32), ATTENTION: jnp.asarray(a, jnp.float32)}
    check_on_tiles(
        jaxprune.VisPruner,
        signals,
        lambda own, keep: vispruner(own[FEATURES], own[ATTENTION], keep),
    )


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_a_share_is_checked(share):
    with pytest.raises(jaxprune.UserError, match="important is"):
        jaxprune.VisPruner(keep=3, important=share)
