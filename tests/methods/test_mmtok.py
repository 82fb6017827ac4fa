"""MMTok against a NumPy rendering in which what a set covers is computed anew at each step."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.inputs.request import make_request
from jaxprune.ops.tiles import Questions, one_tile, patches_of
from jaxprune.ops.visual import FEATURES, PROJECTED
from tests.cases import picture
from tests.methods.builders import check_on_tiles, packing_of


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def softmax(x):
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def gains(features, projected, words, keep, *, tau_text=0.02, tau_vision=0.2, weight=0.5):
    """The patches in the order in which they are chosen, and what each adds."""
    vision = softmax(unit(features) @ unit(features).T / tau_vision)
    text = softmax(unit(words) @ unit(projected).T / tau_text) if len(words) else None

    def covered(chosen):
        image = vision[:, chosen].max(axis=1).mean()
        return weight * image + (0 if text is None else text[:, chosen].max(axis=1).mean())

    chosen, added = [], []
    while len(chosen) < keep:
        rest = [i for i in range(len(features)) if i not in chosen]
        best = max(rest, key=lambda i: covered([*chosen, i]))
        added.append(covered([*chosen, best]) - (covered(chosen) if chosen else 0))
        chosen.append(best)
    return chosen, added


def mmtok(*args, **options):
    return sorted(gains(*args, **options)[0])


def asking(words, valid, **options):
    """A method that is asked the same of every image."""

    def choose(patches):
        images = len(patches.place)
        asked = Questions(jnp.stack([words] * images), jnp.stack([valid] * images))
        return jaxprune.MMTok(**options).choose(patches._replace(questions=asked))

    return SimpleNamespace(choose=choose)


def kept_of(method, features, projected):
    N = len(features)
    signals = {FEATURES: jnp.asarray(features[None]), PROJECTED: jnp.asarray(projected[None])}
    found = jax.jit(method.choose)(patches_of(signals, packing_of([one_tile(N)]), N))
    return np.flatnonzero(np.asarray(found.kept)).tolist()


@pytest.mark.parametrize(
    ("number", "keep", "words", "options"),
    [
        (1, 1, 1, {}),
        (9, 1, 2, {}),
        (9, 9, 2, {}),
        (40, 17, 5, {}),
        (40, 17, 0, {}),
        (40, 12, 3, {"tau_text": 0.5, "tau_vision": 0.05, "weight": 3.0}),
        (40, 12, 3, {"weight": 0.0}),
    ],
)
def test_it_equals_the_rendering(rng, number, keep, words, options):
    features = rng.normal(size=(number, 6)).astype(np.float32)
    projected = rng.normal(size=(number, 8)).astype(np.float32)
    tokens = rng.normal(size=(words + 2, 8)).astype(np.float32)  # the last two are padding
    method = asking(jnp.asarray(tokens), jnp.arange(words + 2) < words, keep=keep, **options)
    expected, added = gains(features, projected, tokens[:words], keep, **options)
    assert kept_of(method, features, projected) == sorted(expected)
    assert (np.diff(added) < 1e-12).all()  # submodular


def test_constant_and_zero_vectors(rng):
    projected = np.ones((9, 8), np.float32)
    method = asking(jnp.zeros((3, 8)), jnp.ones(3, bool), keep=4)
    assert kept_of(method, np.zeros((9, 6), np.float32), projected) == [0, 1, 2, 3]


def test_tiles_together_and_apart(rng):
    signals = {
        s: jnp.asarray(rng.normal(size=(4, 9, 6)), jnp.float32) for s in (FEATURES, PROJECTED)
    }
    words, valid = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32), jnp.array([True, True, False])
    check_on_tiles(
        lambda **options: asking(words, valid, **options),
        signals,
        lambda own, keep: mmtok(own[FEATURES], own[PROJECTED], words[:2], keep),
    )


def test_an_image_is_pruned_by_what_is_asked_about_it(tiny_model):
    asked = "Where is the red\nstar?"
    answer = jaxprune.generate(
        tiny_model, picture(0), asked, method="mmtok", keep=6, return_details=True,
        max_new_tokens=1,
    )  # fmt: skip
    vision = jaxprune.encode(tiny_model, picture(0), method="mmtok", keep=6).vision
    ids = tiny_model.processor.ids_of("Where is the red star?")
    words = tiny_model.arrays["language_model"]["embed_tokens"]["embedding"][jnp.asarray(ids)]
    expected = mmtok(vision.features[0], vision.signals[PROJECTED][0], words, 6)
    assert answer.kept_indices[0].tolist() == expected
    assert expected != mmtok(vision.features[0], vision.signals[PROJECTED][0], words[:0], 6)


def test_the_question_is_what_the_user_says_last(tiny_model):
    first = {"role": "user", "content": "What is it?"}
    said = {"role": "assistant", "content": "A star."}
    texts = [{"type": "text", "text": "Where?\n"}, {"type": "text", "text": "\nIn a word."}]
    last = {"role": "user", "content": [{"type": "image"}, *texts]}
    (row,) = make_request(tiny_model.processor, picture(0), [first, said, last], chat=True).rows
    assert row.question == "Where? In a word."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_text": 0}, "tau_text is 0; expected a number above 0"),
        ({"tau_vision": "low"}, "tau_vision is 'low'"),
        ({"weight": -1}, "weight is -1; expected a number, 0 or more"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.MMTok(keep=3, **options)
