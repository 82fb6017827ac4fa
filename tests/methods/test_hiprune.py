"""HiPrune against a rendering with sets."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.methods.hiprune import DEEP
from tests.cases import picture
from tests.methods.builders import check_on_tiles, chosen_of

MIDDLE = jaxprune.Signal("received_attention", layer=8)


def around(patch, side, inside=None):
    """The patch and its buffers, those that are part of the picture."""
    found = {min(max(patch + step, 0), side**2 - 1) for step in (0, -1, 1, -side, side)}
    return found if inside is None else found & inside


def hiprune(middle, deep, keep, alpha=0.1):
    """Which patches of a square tile stay, and how many of them are anchors or buffers."""
    side = round(len(middle) ** 0.5)
    anchors = np.argsort(-middle, kind="stable")[: min(round(keep * alpha / 5), keep // 5)]
    union = set().union(*(around(int(anchor), side) for anchor in anchors))
    rest = [i for i in np.argsort(-deep, kind="stable").tolist() if i not in union]
    return sorted([*union, *rest[: keep - len(union)]]), len(union)


def kept_by(middle, deep, keep, **options):
    signals = {MIDDLE: jnp.asarray(middle[None]), DEEP: jnp.asarray(deep[None])}
    kept = chosen_of(jaxprune.HiPrune(keep=keep, **options), signals, len(middle))
    return np.flatnonzero(kept).tolist()


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    side=st.sampled_from([1, 4, 24]),
    share=st.floats(0, 1),
    alpha=st.sampled_from([0, 0.1, 0.5, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_against_sets(side, share, alpha, seed):
    rng = np.random.default_rng(seed)
    keep = max(1, round(share * side**2))
    middle, deep = np.round(rng.random((2, side**2)), 2).astype(np.float32)  # with ties
    expected, _ = hiprune(middle, deep, keep, alpha)
    assert len(expected) == keep
    assert kept_by(middle, deep, keep, alpha=alpha) == expected


@pytest.mark.parametrize(("keep", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (25, 0)])
def test_published_numbers_of_anchors(rng, keep, anchors):
    # So far apart that no buffers are shared: all the objects are five an anchor.
    middle, deep = np.zeros((2, 576), np.float32)
    middle[[50, 150, 250, 350, 450]] = [5, 4, 3, 2, 1]
    deep[400:] = 1
    found = kept_by(middle, deep, keep)
    objects = set().union(*(around(patch, 24) for patch in [50, 150, 250, 350, 450][:anchors]))
    assert {patch for patch in found if patch < 400} == objects
    assert len(found) == keep


@pytest.mark.parametrize("corner", [0, 3, 12, 15])
def test_anchors_in_corners(corner):
    middle, deep = np.zeros((2, 16), np.float32)
    middle[corner], deep[7:9] = 1, 1
    beside = {0: [0, 1, 4], 3: [0, 2, 3, 4, 7], 12: [8, 11, 12, 13, 15], 15: [11, 14, 15]}[corner]
    found = kept_by(middle, deep, 5, alpha=1)
    registers = [patch for patch in (7, 8) if patch not in beside][: 5 - len(beside)]
    assert found == sorted(beside + registers)


def test_tiles_together_and_apart(rng):
    middle, deep = rng.random((2, 4, 9)).astype(np.float32)
    number = np.tile(np.arange(27, dtype=np.float32), 2)[:36].reshape(4, 9)
    where = jaxprune.Signal("hidden_states")  # carries which patch one is
    signals = {MIDDLE: jnp.asarray(middle), DEEP: jnp.asarray(deep), where: jnp.asarray(number)}

    def rendering(own, keep):
        patches = own[where].astype(int).tolist()
        anchor = patches[int(np.argmax(own[MIDDLE]))]
        tile = anchor - anchor % 9
        objects = {tile + n for n in around(anchor - tile, 3)} & set(patches)
        order = [patches[i] for i in np.argsort(-own[DEEP], kind="stable")]
        rest = [patch for patch in order if patch not in objects]
        return [patches.index(patch) for patch in [*objects, *rest[: keep - len(objects)]]]

    check_on_tiles(lambda **own: jaxprune.HiPrune(alpha=1, **own), signals, rendering)


def test_the_layer_is_one_of_the_tower(tiny_model):
    with pytest.raises(jaxprune.UserError, match=r"layer=8.*the vision tower has 3 layers"):
        jaxprune.generate(tiny_model, picture(0), "What?", method="hiprune", keep=5)


@pytest.mark.parametrize(
    "options, message", [({"alpha": 2}, "alpha is 2"), ({"layer": -1}, "layer is -1")]
)
def test_mistakes(options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.HiPrune(keep=3, **options)
