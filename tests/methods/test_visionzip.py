"""VisionZip against a NumPy rendering of the paper's steps."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune.engine.answer import answers_of
from jaxprune.engine.cost import estimate
from jaxprune.methods import resolve
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.methods.visionzip import KEYS
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import depth_of
from jaxprune.ops.tiles import Tiling
from tests import builders as models
from tests.builders import start
from tests.cases import picture
from tests.methods.builders import select


def visionzip(x, a, keys, cls, dominant, contextual):
    """Kept patches and all tokens of a tile, float64; `dominant` counts CLS where there is one."""
    x, keys = x.astype(np.float64), keys.astype(np.float64)
    patches = dominant - (cls is not None)
    kept = sorted(np.argsort(-a, kind="stable")[:patches])
    rest = [i for i in range(len(x)) if i not in kept]
    tokens = [] if cls is None else [cls.astype(np.float64)]
    tokens += [x[i] for i in kept]
    if contextual:
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        joined = {target: [] for target in targets}
        for i in rest:
            if i not in targets:
                joined[max(targets, key=lambda t: unit[i] @ unit[t])].append(i)
        tokens += [x[t] + (np.mean(x[own], axis=0) if own else 0) for t, own in joined.items()]
    return kept, np.stack(tokens)


def tile(rng, N, width=16):
    x, keys = (rng.normal(size=(1, N, width)).astype(np.float32) for _ in range(2))
    a = np.round(rng.random((1, N)), 2).astype(np.float32)  # with ties
    return x, a, keys, rng.normal(size=(1, width)).astype(np.float32)


def run(method, x, a, keys, cls, **options):
    signals = {ATTENTION: jnp.asarray(a), KEYS: jnp.asarray(keys)}
    return select(method, jnp.asarray(x), signals, cls=jnp.asarray(cls), **options)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 1, 0), (9, 2, 8), (9, 6, 4), (9, 10, 0), (40, 12, 5), (40, 3, 30)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_equals_the_rendering(sizes, with_cls, seed):
    N, dominant, contextual = sizes
    if not with_cls and dominant + contextual > N:
        dominant -= 1
    x, a, keys, cls = tile(np.random.default_rng(seed), N)
    method = jaxprune.VisionZip(dominant=dominant, contextual=contextual, cls=with_cls)
    kept, tokens = visionzip(
        x[0], a[0], keys[0], cls[0] if with_cls else None, dominant, contextual
    )
    found = run(method, x, a, keys, cls)
    assert found.counts.tolist() == [dominant + contextual]
    assert found.indices[0].tolist() == [*[-1] * with_cls, *kept, *[-1] * contextual]
    chex.assert_trees_all_close(found.tokens[0], tokens, atol=1e-5)


def test_of_everything_nothing_is_lost(rng):
    x, a, keys, cls = tile(rng, 40)
    found = run(jaxprune.VisionZip(keep=41, cls=True), x, a, keys, cls)
    expected = np.concatenate([cls, x[0]])
    assert sorted(map(tuple, np.asarray(found.tokens[0]))) == sorted(map(tuple, expected))


def test_constant_features(rng):
    x, a, keys, cls = tile(rng, 9)
    found = run(jaxprune.VisionZip(dominant=3, contextual=3), 0 * x + 2, 0 * a, 0 * keys, cls)
    # Everybody joins the first of the equal targets.
    assert found.tokens[0, :, 0].tolist() == [2, 2, 2, 4, 2, 2]


def test_half_precision(rng):
    x, a, keys, cls = tile(rng, 40)
    half = jnp.asarray(x, jnp.bfloat16)
    method = jaxprune.VisionZip(dominant=8, contextual=5, cls=True)
    found = run(method, half, a, keys, jnp.asarray(cls, jnp.bfloat16))
    kept, tokens = visionzip(np.asarray(half[0], np.float32), a[0], keys[0], cls[0], 8, 5)
    assert found.tokens.dtype == jnp.bfloat16
    assert found.indices[0, 1:8].tolist() == kept
    chex.assert_trees_all_close(found.tokens[0].astype(jnp.float32), tokens, atol=0.02, rtol=0.01)


def test_every_tile_for_itself_and_without_its_padding(rng):
    # Nine, four and two of nine patches are part of the picture.
    slots = np.array([*range(9), 10, 11, 13, 14, 18, 26], np.int32)
    image = Tiling(3, slots, np.zeros_like(slots))
    parts = [tile(rng, 9) for _ in range(3)]
    x, a, keys, cls = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = run(
        jaxprune.VisionZip(dominant=3, contextual=3, cls=True), x, a, keys, cls, tilings=[image]
    )
    patches, summed = [], []
    for t, dominant in enumerate((3, 2, 1)):  # CLS, and 2, 1 and none
        own = slots[slots // 9 == t] % 9
        alone = (y[own] for y in (x[t], a[t], keys[t]))
        kept, tokens = visionzip(*alone, cls[t], dominant, min(3, len(own) - dominant + 1))
        patches += (9 * t + own[kept]).tolist()
        summed += list(tokens[dominant:])
    summed.append(summed[-2])  # two patches for three tokens: the first comes again
    assert found.indices[0].tolist() == [-1, -1, -1, *patches, *[-1] * 9]
    chex.assert_trees_all_close(found.tokens[0, :3], cls)
    chex.assert_trees_all_close(found.tokens[0, 6:], np.stack(summed), atol=1e-5)


@pytest.mark.parametrize(("keep", "split"), [(192, 30), (128, 20), (64, 10), (32, 5), (1, 0)])
def test_the_published_splits(keep, split):
    assert jaxprune.VisionZip(keep=keep).num_contextual == split
    cost = estimate(LlavaConfig.llava_1_5_7b(), "visionzip", keep=keep)
    assert cost.visual_tokens == keep


def test_cls_stands_in_front(tiny_model):
    run = start(tiny_model, picture(0), "What?", method="visionzip", keep=9)
    (answer,) = answers_of(run)
    assert answer.visual_tokens == [9]
    assert [index < 0 for index in answer.kept_indices[0]] == [True, *[False] * 7, True]
    encoded = jaxprune.encode(tiny_model, picture(0), method="visionzip", keep=9)
    chex.assert_trees_all_close(run.seen.selection.tokens[0, 0], encoded.vision.cls[0])


@pytest.mark.parametrize(
    ("config", "spare"),
    [
        (models.tiny_config(), True),
        (models.tiny_next_config(), True),
        (models.tiny_config(vision_feature_select_strategy="full"), False),
        (models.tiny_hr_config(), False),
        (models.tiny_internvl_config(), False),
        (models.tiny_video_config(), False),
    ],
)
def test_a_model_without_cls_to_spare_keeps_a_patch_more(config, spare):
    depth = depth_of(config)
    method = resolve("visionzip", depth, keep=9).vision
    assert (method.cls, method.extra_tokens.number + method.fixed_count(16)) == (spare, 9)
    assert resolve("visionzip", depth, keep=9, cls=False).vision.fixed_count(16) == 8
    if not spare:
        with pytest.raises(jaxprune.UserError, match="cls is True, but this model has no CLS"):
            resolve("visionzip", depth, keep=9, cls=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either keep, e.g. keep=64, or dominant with contextual"),
        ({"keep": 9, "contextual": 3}, "either keep"),
        ({"dominant": 9}, "either keep"),
        ({"dominant": 0, "contextual": 3}, "dominant is 0; expected a whole number, 1 or more"),
        ({"keep": 9, "cls": "no"}, "cls is 'no'; expected True, False or None"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.VisionZip(**options)
