"""Methods that keep a number of patches, against NumPy renderings of what their papers say."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.engine.cost import estimate
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.models.llava import LlavaConfig
from jaxprune.ops.visual import PROJECTED
from tests.methods.builders import check_on_tiles, chosen_of

SIZES = [(1, 1), (9, 1), (9, 4), (9, 8), (9, 9), (40, 17)]


def fastervlm(a, keep):
    return np.sort(np.argsort(-a, kind="stable")[:keep])


def divprune(x, keep):
    """Max-min, every distance computed anew."""
    x = x.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)

    def distance(i, chosen):
        return min((1 - unit[i] @ unit[j] for j in chosen if j != i), default=np.inf)

    everybody = range(len(x))
    chosen = [max(everybody, key=lambda i: distance(i, everybody))]
    while len(chosen) < keep:
        rest = [i for i in everybody if i not in chosen]
        chosen.append(max(rest, key=lambda i: distance(i, chosen)))
    return np.sort(chosen)


@pytest.mark.parametrize(("number", "keep"), SIZES)
def test_fastervlm(rng, number, keep):
    a = np.round(rng.random(number), 1).astype(np.float32)  # with ties
    kept = chosen_of(jaxprune.FasterVLM(keep=keep), {ATTENTION: jnp.asarray(a[None])}, number)
    assert np.flatnonzero(kept).tolist() == fastervlm(a, keep).tolist()


@pytest.mark.parametrize(("number", "keep"), SIZES)
def test_divprune(rng, number, keep):
    x = rng.normal(size=(number, 6)).astype(np.float32)
    kept = chosen_of(jaxprune.DivPrune(keep=keep), {PROJECTED: jnp.asarray(x[None])}, number)
    assert np.flatnonzero(kept).tolist() == divprune(x, keep).tolist()


def test_divprune_of_duplicates_and_nothing(rng):
    x = np.repeat(rng.normal(size=(3, 6)), 3, axis=0).astype(np.float32)
    x[4] = 0
    kept = chosen_of(jaxprune.DivPrune(keep=7), {PROJECTED: jnp.asarray(x[None])}, 9)
    assert kept.sum() == 7
    assert kept[4]  # at right angles to everybody


@pytest.mark.parametrize("cls", [jaxprune.FasterVLM, jaxprune.DivPrune])
def test_tiles_together_and_apart(rng, cls):
    x = jnp.asarray(rng.normal(size=(4, 9, 6)), jnp.float32)

    def rendering(signals, keep):
        if cls is jaxprune.DivPrune:
            return divprune(signals[PROJECTED], keep)
        return fastervlm(signals[ATTENTION], keep)

    check_on_tiles(cls, {ATTENTION: x[..., 0], PROJECTED: x}, rendering)


def test_an_image_of_one_tile_has_a_number_under_either_budget():
    config = LlavaConfig.llava_1_5_7b()
    for budget in ("image", "tile"):
        cost = estimate(config, "divprune", keep=64, budget=budget)
        assert cost.visual_tokens == 64


def test_a_budget_is_named():
    with pytest.raises(jaxprune.UserError, match="budget is 'row'"):
        jaxprune.DivPrune(keep=3, budget="row")
