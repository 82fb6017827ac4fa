import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune.methods.prumerge import KEYS
from jaxprune.ops.visual import CLS_ATTENTION
from tests.methods import builders, reference

KEPT = {
    jaxprune.PruMerge: reference.kept_prumerge,
    jaxprune.PruMergePlus: reference.kept_prumerge_plus,
}


def image(rng, N, *, outliers=None, ties=False, width=16):
    """Random features, keys and CLS attention of one image, with so many outliers."""
    x = rng.normal(size=(N, width)).astype(np.float32)
    k = rng.normal(size=(N, width)).astype(np.float32)
    s = rng.uniform(0.001, 0.002, size=N)
    if outliers is not None:
        places = rng.permutation(N)[:outliers]
        s[places] = rng.uniform(0.1, 0.2, size=outliers)
    if ties:
        s = np.round(s, 1 if outliers else 4)
    return x, s.astype(np.float32), k


def select(method, images):
    x, s, k = (jnp.asarray(np.stack(part)) for part in zip(*images, strict=True))
    return builders.select(method, x, {CLS_ATTENTION: s, KEYS: k})


def check(method, images):
    selection = select(method, images)
    for i, (x, s, k) in enumerate(images):
        kept = KEPT[type(method)](s, method.keep)
        count = int(selection.counts[i])
        assert count == len(kept) + 1
        assert selection.indices[i, : count - 1].tolist() == kept
        assert (np.asarray(selection.indices[i, count - 1 :]) == -1).all()
        expected = reference.merge(x, s, k, kept, mean=method.merge == "weighted_mean")
        chex.assert_trees_all_close(selection.tokens[i, :count], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", KEPT)
@pytest.mark.parametrize("outliers", [0, 1, 2, 7, 20, 47, 48, 60, 144])
def test_adaptive_equals_the_reference(rng, cls, outliers):
    check(cls(), [image(rng, 144, outliers=outliers) for _ in range(2)])


@pytest.mark.parametrize("cls", KEPT)
def test_576_tokens_and_images_that_keep_different_numbers(rng, cls):
    check(cls(), [image(rng, 576, outliers=m) for m in (3, 32, 100)])


@pytest.mark.parametrize("cls", KEPT)
@pytest.mark.parametrize("keep", [1, 2, 3, 10, 31, 72, 143, 144])
def test_fixed_equals_the_reference(rng, cls, keep):
    merge = "authors" if keep % 2 else "weighted_mean"
    check(cls(keep=keep, merge=merge), [image(rng, 144, outliers=20)])


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(list(KEPT)),
    st.sampled_from([4, 5, 17, 48]),  # each takes a program
    st.integers(0, 48),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_number_of_tokens_and_ties(cls, N, outliers, ties, seed):
    rng = np.random.default_rng(seed)
    check(cls(), [image(rng, N, outliers=min(outliers, N), ties=ties)])


def test_equal_scores_keep_the_first_token(rng):
    x, _, k = image(rng, 30)
    s = np.full(30, 0.03, np.float32)
    selection = select(jaxprune.PruMerge(), [(x, s, k)])
    assert selection.indices[0].tolist() == [0, -1]


def test_raster_order_holds_the_same_tokens(rng):
    data = [image(rng, 100, outliers=9)]
    by_score, by_place = (select(jaxprune.PruMerge(order=o), data) for o in ("score", "raster"))
    indices = np.asarray(by_place.indices[0, :9])
    assert (np.diff(indices) > 0).all()
    order = np.argsort(np.asarray(by_score.indices[0, :9]))
    chex.assert_trees_all_close(by_place.tokens[0, :9], by_score.tokens[0, order], atol=1e-6)
    chex.assert_trees_all_close(by_place.tokens[0, 9], by_score.tokens[0, 9], atol=1e-6)


def test_an_image_does_not_depend_on_its_neighbours_or_the_capacity(rng):
    images = [image(rng, 144, outliers=m) for m in (4, 40, 12)]
    together = select(jaxprune.PruMergePlus(), images)
    for i, alone in enumerate(images):
        single = select(jaxprune.PruMergePlus(), [alone])
        count = int(single.counts[0])
        assert count == int(together.counts[i])
        chex.assert_trees_all_close(together.tokens[i, :count], single.tokens[0], atol=1e-6)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": -3}, {"keep": 2.5}, {"keep": True}])
def test_keep_is_checked(options):
    with pytest.raises(jaxprune.UserError, match="keep is"):
        jaxprune.PruMerge(**options)


@pytest.mark.parametrize("options", [{"merge": "sum"}, {"order": "random"}])
def test_choices_are_checked(options):
    with pytest.raises(jaxprune.UserError, match="expected one of"):
        jaxprune.PruMergePlus(**options)
