"""HoloV against a NumPy rendering of the published code, its lost quotas handed out again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune.engine.answer import answers_of
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.methods.holov import share_out
from jaxprune.ops.visual import PROJECTED
from tests.builders import start
from tests.cases import picture
from tests.methods.builders import check_on_tiles, chosen_of


def runs(number, crops):
    """The places of each run; the first ones are longer."""
    return [part for part in np.array_split(np.arange(number), crops) if len(part)]


def windows(number, crops):
    side, along = round(number**0.5), round(crops**0.5)
    row, column = np.divmod(np.arange(number), side)
    of = (row * along // side) * along + column * along // side
    return [part for c in range(crops) if len(part := np.flatnonzero(of == c))]


def scores(a, x, part, alpha):
    """t of a crop's tokens."""
    n = len(part)
    if n == 1:
        return a[part].astype(np.float64)
    x = x[part].astype(np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    S = unit @ unit.T
    np.fill_diagonal(S, 0)
    mu = S.sum(axis=1) / (n - 1)
    v = ((S - mu[:, None]) ** 2).sum(axis=1) / (n - 1)
    scaled = 1000 * a[part].astype(np.float64)
    return scaled + alpha * np.abs(scaled).mean() / (np.abs(v).mean() + 1e-6) * v


def quotas_of(means, sizes, keep):
    """How many of each crop, and how many the published code loses."""
    w = np.array(means) / (np.sum(means) + 1e-6)
    falling = np.argsort(-w, kind="stable")
    quotas = np.floor(w * keep).astype(int)
    quotas[falling[: keep - quotas.sum()]] += 1
    quotas = np.minimum(quotas, sizes)
    lost = min(keep, sum(sizes)) - quotas.sum()
    while quotas.sum() < min(keep, sum(sizes)):
        for crop in falling:
            if quotas[crop] < sizes[crop] and quotas.sum() < keep:
                quotas[crop] += 1
    return quotas, lost


def holov(a, x, keep, cut=runs, crops=16, tokens="attention", alpha=0.09):
    parts = cut(len(a), crops)
    t = [scores(a, x, part, alpha) for part in parts]
    quotas, _ = quotas_of([own.mean() for own in t], [len(part) for part in parts], keep)
    kept = []
    for part, own, quota in zip(parts, t, quotas, strict=True):
        ranked = a[part] if tokens == "attention" else own
        kept += part[np.argsort(-ranked, kind="stable")[:quota]].tolist()
    return sorted(kept)


def drawn(rng, number, power=1):
    """Attention, the more uneven the higher the power, with ties; and features."""
    a = np.round(rng.random(number) ** power, 2).astype(np.float32) / number
    return a, rng.normal(size=(number, 6)).astype(np.float32)


def kept_of(a, x, **options):
    signals = {ATTENTION: jnp.asarray(a[None]), PROJECTED: jnp.asarray(x[None])}
    return np.flatnonzero(chosen_of(jaxprune.HoloV(**options), signals, len(a))).tolist()


@pytest.mark.parametrize(
    ("number", "keep"),
    [(1, 1), (9, 1), (9, 4), (9, 9), (40, 17), (40, 39), (100, 9), (100, 10), (100, 90), (576, 64)],
)
@pytest.mark.parametrize("power", [1, 8])
def test_it_equals_the_rendering(rng, number, keep, power):
    a, x = drawn(rng, number, power)
    assert kept_of(a, x, keep=keep) == holov(a, x, keep)


@pytest.mark.parametrize("options", [{"tokens": "score"}, {"tokens": "score", "alpha": 2.0}])
@pytest.mark.parametrize("cut", [runs, windows])
def test_options(rng, options, cut):
    a, x = drawn(rng, 100, 8)
    kept = kept_of(a, x, keep=40, crops=cut.__name__, num_crops=9, **options)
    assert kept == holov(a, x, 40, cut=cut, crops=9, **options)
    assert kept != holov(a, x, 40, cut=cut, crops=9)


def test_alpha_cancels(rng):
    a, x = drawn(rng, 100)
    assert kept_of(a, x, keep=40) == kept_of(a, x, keep=40, alpha=5.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_no_quota_is_lost(keep, seed):
    rng = np.random.default_rng(seed)
    means = (rng.random(8) ** rng.integers(1, 9)).astype(np.float32)
    sizes = rng.integers(1, 6, 8)
    found = np.asarray(jax.jit(share_out, static_argnums=0)(keep, means, jnp.asarray(sizes)))
    assert found.tolist() == quotas_of(means, sizes, keep)[0].tolist()
    assert found.sum() == min(keep, sizes.sum())


def test_some_quotas_overflow_in_these_tests(rng):
    a, x = drawn(rng, 40, 8)
    means = [scores(a, x, part, 0.09).mean() for part in runs(40, 16)]
    assert quotas_of(means, [len(part) for part in runs(40, 16)], 17)[1] > 0


def test_no_attention_and_no_features():
    nothing = np.zeros(32, np.float32)
    assert kept_of(nothing, np.zeros((32, 6), np.float32), keep=17) == [0, 1, *range(2, 32, 2)]


def test_tiles_together_and_apart(rng):
    tiles = [drawn(rng, 9) for _ in range(4)]
    signals = {
        ATTENTION: jnp.stack([a for a, _ in tiles]),
        PROJECTED: jnp.stack([x for _, x in tiles]),
    }
    check_on_tiles(
        lambda **options: jaxprune.HoloV(num_crops=3, **options),
        signals,
        lambda own, keep: holov(own[ATTENTION], own[PROJECTED], keep, crops=3),
    )


def test_windows_of_an_image(tiny_model):
    run = start(
        tiny_model, picture(0), "What?", method="holov", keep=4, num_crops=4, crops="windows"
    )
    (answer,) = answers_of(run)
    vision = jaxprune.encode(tiny_model, picture(0), method="holov", keep=4).vision
    a, x = (np.asarray(vision.signals[signal][0]) for signal in (ATTENTION, PROJECTED))
    assert answer.kept_indices[0].tolist() == holov(a, x, 4, cut=windows, crops=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": "squares"}, "crops is 'squares'; expected one of: runs, windows"),
        ({"tokens": "all"}, "tokens is 'all'"),
        ({"crops": "windows", "num_crops": 8}, "num_crops is 8; expected a square number"),
        ({"num_crops": 0}, "num_crops is 0"),
        ({"alpha": -1}, "alpha is -1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.HoloV(keep=3, **options)
