"""SCOPE against a rendering that computes what a set covers anew at every step."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.methods.scope import SUMMED
from jaxprune.ops.visual import FEATURES
from tests.methods.builders import check_on_tiles, chosen_of


def coverage(x, chosen):
    """f(S)."""
    x = np.asarray(x, np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return np.max((unit @ unit.T)[:, chosen], axis=1, initial=0).sum()


def gains(x, a, chosen, alpha, combine=np.multiply):
    """What every patch adds to a set, with its salience; nothing where it is a member."""
    base, salience = coverage(x, chosen), np.asarray(a, np.float64) ** alpha
    new = [coverage(x, [*chosen, u]) - base for u in range(len(x))]
    return np.where(np.isin(np.arange(len(x)), chosen), -np.inf, combine(new, salience))


def scope(x, a, keep, alpha=1.0, combine=np.multiply):
    chosen = []
    while len(chosen) < keep:
        chosen.append(int(np.argmax(gains(x, a, chosen, alpha, combine))))
    return np.sort(chosen)


def kept_by(x, a, keep, **options):
    method = jaxprune.Scope(keep=keep, **options)
    attention = SUMMED if method.combine == "sum" else ATTENTION
    assert method.signals == {FEATURES, attention}
    signals = {FEATURES: jnp.asarray(x[None]), attention: jnp.asarray(a[None], jnp.float32)}
    return np.flatnonzero(chosen_of(method, signals, len(x)))


@pytest.mark.parametrize(
    ("number", "keep"), [(1, 1), (9, 1), (9, 4), (9, 8), (9, 9), (40, 17), (100, 30)]
)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_against_sets_computed_anew(rng, number, keep, alpha):
    x, a = rng.normal(size=(number, 6)), rng.random(number)
    found = kept_by(x.astype(np.float32), a, keep, alpha=alpha)
    assert found.tolist() == scope(x, a, keep, alpha).tolist()


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_sum_of_coverage_and_attention(rng, alpha):
    x, a = rng.normal(size=(40, 6)), 4 * rng.random(40)
    found = kept_by(x.astype(np.float32), a, 17, alpha=alpha, combine="sum").tolist()
    assert found == scope(x, a, 17, alpha, np.add).tolist()
    assert found != scope(x, a, 17, alpha).tolist()  # or this tests nothing


@pytest.mark.parametrize("seed", range(3))
def test_coverage_alone_is_facility_location(seed):
    # Mutual nearest neighbours tie exactly: the sets may differ, what they cover may not.
    rng = np.random.default_rng(seed)
    x, a = rng.normal(size=(12, 4)).astype(np.float32), rng.random(12)
    before: list[int] = []
    for keep in range(1, 13):
        found = kept_by(x, a, keep, alpha=0.0).tolist()
        (new,) = set(found) - set(before)
        possible = gains(x, a, before, 0.0)
        assert possible[new] > possible.max() - 1e-5
        before = found


def test_duplicates_zeros_and_no_attention(rng):
    x = np.repeat(rng.normal(size=(3, 6)), 3, axis=0).astype(np.float32)
    x[4] = 0
    assert len(kept_by(x, np.zeros(9), 7)) == 7
    # Whoever is covered by a twin gains nothing: one of each first, by attention.
    a = np.array([0.3, 0.4, 0.3, 0.4, 0.9, 0.5, 0.2, 0.1, 0.2])
    assert kept_by(x, a, 3).tolist() == scope(x, a, 3).tolist()


def test_features_of_sixteen_bits(rng):
    x, a = jnp.asarray(rng.normal(size=(40, 6)), jnp.bfloat16), rng.random(40)
    found = kept_by(x, a, 9)
    assert found.tolist() == scope(np.asarray(x, np.float64), a, 9).tolist()


def test_tiles_together_and_apart(rng):
    x, a = rng.normal(size=(4, 9, 6)), rng.random((4, 9))
    signals = {FEATURES: jnp.asarray(x, jnp.float32), ATTENTION: jnp.asarray(a, jnp.float32)}
    check_on_tiles(
        jaxprune.Scope, signals, lambda own, keep: scope(own[FEATURES], own[ATTENTION], keep)
    )


@pytest.mark.parametrize("alpha", [-1, "one", True])
def test_alpha_is_checked(alpha):
    with pytest.raises(jaxprune.UserError, match="alpha is"):
        jaxprune.Scope(keep=3, alpha=alpha)


def test_combine_is_checked():
    with pytest.raises(jaxprune.UserError, match="combine is 'add'; expected one of: product, sum"):
        jaxprune.Scope(keep=3, combine="add")
