"""CDPruner against determinants, its text tower on tiny models, and the whole of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import Sample, encode_samples
from jaxprune.engine.answer import answers_of
from jaxprune.engine.programs import Sizes, through_stages
from jaxprune.methods import Plan
from jaxprune.methods.cdpruner import SHORT_ANSWER
from jaxprune.model import TextTower
from jaxprune.models.clip import ClipTextTower
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import Questions, one_tile, patches_of
from jaxprune.ops.visual import PROJECTED, TEXT_SIMILARITY
from tests import builders
from tests.builders import start
from tests.cases import FEW, picture
from tests.methods.builders import check_on_tiles, chosen_of, packing_of


def kernel_of(x, r):
    x = np.asarray(x, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return r[:, None] * (x @ x.T) * r


def relevance(similar):
    rho = -np.asarray(similar, np.float64)
    span = np.ptp(rho)
    return (rho - rho.min() + 1e-6) / span if span else np.ones_like(rho)


def most_diverse(L, keep):
    """Whoever makes the largest determinant joins, every one computed anew."""
    chosen = []
    while len(chosen) < keep:
        rest = [i for i in range(len(L)) if i not in chosen]
        sets = [np.ix_(*[np.array([*chosen, i])] * 2) for i in rest]
        chosen.append(rest[int(np.argmax([np.linalg.slogdet(L[own])[1] for own in sets]))])
    return sorted(chosen)


def kept_by(x, similar, keep):
    signals = {PROJECTED: jnp.asarray(x[None]), TEXT_SIMILARITY: jnp.asarray(similar[None])}
    return np.flatnonzero(chosen_of(jaxprune.CDPruner(keep=keep), signals, len(x))).tolist()


@pytest.mark.parametrize(("number", "keep"), [(1, 1), (9, 1), (9, 4), (9, 8), (9, 9), (60, 20)])
def test_against_determinants(rng, number, keep):
    x = rng.normal(size=(number, 64)).astype(np.float32)
    similar = rng.normal(size=number).astype(np.float32)
    assert kept_by(x, similar, keep) == most_diverse(kernel_of(x, relevance(similar)), keep)


def test_without_a_difference_in_relevance(rng):
    x = rng.normal(size=(20, 32)).astype(np.float32)
    found = kept_by(x, np.full(20, 0.3, np.float32), 8)
    assert found == most_diverse(kernel_of(x, np.ones(20)), 8)


def test_over_the_rank_the_most_relevant_follow(rng):
    x = np.repeat(rng.normal(size=(3, 8)), 4, axis=0).astype(np.float32)  # of rank 3
    x[5] = 0
    similar = rng.permutation(12).astype(np.float32)
    r = relevance(similar) * (np.arange(12) != 5)  # what has no direction has no size
    for keep in (3, 4, 7, 12):
        best = [group[np.argmax(r[group])] for group in np.split(np.arange(12), 3)]
        rest = [i for i in np.argsort(-r) if i not in best]
        assert kept_by(x, similar, keep) == sorted([*best, *rest][:keep])


def test_features_of_sixteen_bits(rng):
    x = jnp.asarray(rng.normal(size=(40, 64)), jnp.bfloat16)
    similar = rng.normal(size=40).astype(np.float32)
    expected = most_diverse(kernel_of(x, relevance(similar)), 9)
    assert kept_by(x, similar, 9) == expected


def test_tiles_together_and_apart(rng):
    x, similar = rng.normal(size=(4, 9, 32)), rng.normal(size=(4, 9))
    inside = [*range(4), *range(9, 18), *range(20, 26)]
    rho = -similar.reshape(-1)[inside]  # relative to the image, of all its tiles

    def rendering(own, keep):
        r = (-own[TEXT_SIMILARITY].astype(np.float64) - rho.min() + 1e-6) / np.ptp(rho)
        return most_diverse(kernel_of(own[PROJECTED], r), keep)

    signals = {PROJECTED: x, TEXT_SIMILARITY: similar}
    signals = {signal: jnp.asarray(values, jnp.float32) for signal, values in signals.items()}
    check_on_tiles(jaxprune.CDPruner, signals, rendering)


def test_relevance_by_embeddings(rng):
    x, words = rng.normal(size=(20, 32)), rng.normal(size=(5, 32))
    asked = np.array([1, 1, 0, 1, 0], bool)
    unit = [y / np.linalg.norm(y, axis=1, keepdims=True) for y in (x, words[asked])]
    rho = (unit[0] @ unit[1].T).mean(axis=1)
    r = (rho - rho.min() + 1e-6) / np.ptp(rho)
    questions = Questions(jnp.asarray(words[None], jnp.float32), jnp.asarray(asked[None]))
    signals = {PROJECTED: jnp.asarray(x[None], jnp.float32)}
    patches = patches_of(signals, packing_of([one_tile(20)]), 20, questions)
    method = jaxprune.CDPruner(keep=7, relevance="embeddings")
    assert method.reads_question and not method.compares_text
    found = np.flatnonzero(method.choose(patches).kept[0, 0])
    assert found.tolist() == most_diverse(kernel_of(x, r), 7)
    unasked = patches._replace(questions=questions._replace(valid=jnp.zeros((1, 5), bool)))
    found = np.flatnonzero(method.choose(unasked).kept[0, 0])
    assert found.tolist() == most_diverse(kernel_of(x, np.ones(20)), 7)


def test_sentences_that_are_no_question():
    asks = "Which of both? Answer the question using a single word or phrase."
    method = jaxprune.CDPruner(keep=5)
    assert method.read(asks) == "Which of both?"
    assert method.read(SHORT_ANSWER) == SHORT_ANSWER  # rather that than nothing
    assert jaxprune.CDPruner(keep=5, leave_out=()).read(asks) == asks
    own = jaxprune.CDPruner(keep=5, leave_out=["Which of\nboth?", "Answer"])
    assert own.read(asks) == "the question using a single word or phrase."
    with pytest.raises(jaxprune.UserError, match="leave_out is 3; expected sentences"):
        jaxprune.CDPruner(keep=5, leave_out=3)
    with pytest.raises(jaxprune.UserError, match="relevance is 'llm'; expected one of: clip, emb"):
        jaxprune.CDPruner(keep=5, relevance="llm")


# ---- on models


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return builders.write_clip(tmp_path_factory.mktemp("clip") / "c")


@pytest.fixture(scope="module")
def model(tiny_directory, clip):
    return jaxprune.load(tiny_directory, text_tower=clip)


PROMPTS = ["red circle", "Where is the blue star, and how many are there of them?", "a"]


def test_the_whole_of_it(model):
    """From pixels and words to patches, the question cut into parts of eight tokens."""
    config, tower = model.config, model.text_tower
    for i, prompt in enumerate(PROMPTS[:2]):
        run = start(model, picture(i), prompt, method="cdpruner", keep=6, buckets=FEW)
        (answer,) = answers_of(run)
        ids = [256, *tower.tokenizer(prompt, add_special_tokens=False)["input_ids"], 257]
        parts = [np.array((ids[at : at + 8] + [0] * 8)[:8]) for at in range(0, len(ids), 8)]
        pixels = model.processor.image_processor(picture(i), return_tensors="np")["pixel_values"]
        vision = family_of(config).encode(
            model.arrays, config, jnp.asarray(pixels.transpose(0, 2, 3, 1)), frozenset({PROJECTED})
        )
        said, seen = ClipTextTower(tower.config).apply(
            {"params": tower.arrays}, jnp.asarray(parts), vision.features
        )
        said, seen = (np.asarray(x, np.float64) for x in (said, seen[0]))
        said, seen = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (said, seen))
        similar = np.mean([seen @ own for own in said], axis=0)
        L = kernel_of(vision.signals[PROJECTED][0], relevance(similar))
        assert answer.kept_indices[0].tolist() == most_diverse(L, 6)


def test_a_row_is_the_same_alone_and_in_a_batch(model):
    options = {"method": "cdpruner", "keep": 5, "buckets": FEW}
    image = picture(3)  # one for all of them, each of which asks something else
    batch = start(model, image, PROMPTS, **options)
    kept = [answer.kept_indices[0].tolist() for answer in answers_of(batch)]
    for i, prompt in enumerate(PROMPTS):
        alone = start(model, image, prompt, **options)
        chex.assert_trees_all_close(batch.first_logits[i], alone.first_logits[0], atol=1e-4)
    assert kept[0] != kept[1]  # or this tests nothing


def test_what_is_left_out_decides_nothing(model):
    asked = f"{PROMPTS[0]}\n{SHORT_ANSWER}"
    kept = {}
    for name, prompt, options in (
        ("short", PROMPTS[0], {}),
        ("long", asked, {}),
        ("whole", asked, {"leave_out": ()}),
    ):
        run = start(model, picture(3), prompt, method="cdpruner", keep=5, **options)
        kept[name] = answers_of(run)[0].kept_indices[0].tolist()
    assert kept["long"] == kept["short"] != kept["whole"]


def test_an_encoded_image_and_keeping_everything(model):
    encoded = jaxprune.encode(model, picture(1), method="cdpruner", keep=5)
    for keep in (5, 16):
        options = {"method": "cdpruner", "keep": keep, "max_new_tokens": 4}
        asked = [jaxprune.generate(model, x, "What?", **options) for x in (picture(1), encoded)]
        assert asked[0] == asked[1]
    kept = start(model, picture(1), "What?", method="cdpruner", keep=16)
    chex.assert_trees_all_close(
        kept.first_logits, start(model, picture(1), "What?").first_logits, atol=1e-5
    )


def test_forward_sees_the_same(model):
    run = start(model, picture(0), PROMPTS[1], method="cdpruner", keep=5)
    batch = jaxprune.batch(model, picture(0), PROMPTS[1], method="cdpruner", keep=5)
    found = jax.jit(jaxprune.forward)(model, batch)
    assert found.kept[0, :5].tolist() == answers_of(run)[0].kept_indices[0].tolist()
    with pytest.raises(jaxprune.UserError, match="goes by a CLIP's text tower"):
        jaxprune.forward(model.arrays, batch)


def test_nothing_compiles_after_a_warm_up(model):
    buckets = jaxprune.Buckets(
        batch=(2,), images=(2,), row_images=(1,), text=(32, 128), visual=(8,), new_tokens=(8,)
    )
    options = {"method": "cdpruner", "keep": 5, "buckets": buckets}
    jaxprune.warmup(model, show_progress=False, **options)
    with jaxprune.no_compilation():
        for prompts in (PROMPTS[:2], ["a"]):
            images = [picture(0)] * len(prompts)
            jaxprune.generate(model, images, prompts, max_new_tokens=3, **options)


@pytest.mark.slow
def test_on_tiles(clip, tmp_path):
    builders.write_directory(tmp_path / "m", builders.tiny_next_config())
    model = jaxprune.load(tmp_path / "m", text_tower=clip)
    images = [picture(i, size) for i, size in enumerate([(30, 90), (60, 60), (500, 40)])]
    options = {"method": "cdpruner", "keep": 7, "buckets": FEW}
    batch = start(model, images, PROMPTS, **options)
    for i in (0, 2):
        alone = start(model, images[i], PROMPTS[i], **options)
        chex.assert_trees_all_close(batch.first_logits[i], alone.first_logits[0], atol=1e-4)


def test_a_model_without_a_text_tower(tiny_model):
    with pytest.raises(jaxprune.UserError, match=r"load the model with it.*text_tower="):
        jaxprune.generate(tiny_model, picture(0), "What?", method="cdpruner", keep=5)


def test_a_model_that_no_text_tower_goes_with(tmp_path):
    builders.write_directory(tmp_path / "m", builders.tiny_internvl_config())
    internvl = jaxprune.load(tmp_path / "m")
    ask = functools.partial(jaxprune.generate, internvl, picture(0), "What?", method="cdpruner")
    with pytest.raises(jaxprune.UserError, match=r"are of internvl.*needs none under relevance"):
        ask(keep=3)
    assert isinstance(ask(keep=3, relevance="embeddings", max_new_tokens=1), str)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            builders.tiny_config,
            {"vision_width": 48},
            "of width 48, but the model's is 32 wide",
        ),
        (builders.tiny_config, {"tokens": 300}, "has 300 tokens, but its embedding 258 rows"),
        (builders.tiny_hr_config, {}, "those of this model are of llava_hr"),
        (builders.tiny_internvl_config, {}, "those of this model are of internvl"),
        (
            lambda: builders.tiny_config(vision_feature_layer=(-2, -1)),
            {},
            "those of this model are of 2 layers",
        ),
    ],
)
def test_towers_that_do_not_fit(tmp_path, config, fields, message):
    clip = builders.write_clip(tmp_path / "clip", **fields)
    builders.write_directory(tmp_path / "m", config())
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.load(tmp_path / "m", text_tower=clip)


def test_samples_are_scored_by_their_own_questions(model):
    samples = [Sample(picture(3), prompt, "yes") for prompt in PROMPTS]
    method = jaxprune.CDPruner(keep=5)
    data = encode_samples(model, samples, method=method, show_progress=False)
    batch = start(model, picture(3), PROMPTS, method="cdpruner", keep=5)
    kept = [answer.kept_indices[0].tolist() for answer in answers_of(batch)]
    assert data.batches[0].seen.selection.indices[:, :5].tolist() == kept


def test_nothing_is_compiled_without_a_model():
    plan, sizes = Plan(vision=jaxprune.CDPruner(keep=5)), Sizes(text_tokens=32)
    with pytest.raises(jaxprune.UserError, match="goes by a CLIP's text tower, which is not"):
        through_stages({}, builders.tiny_config(), plan, sizes, lambda x, axis: x, print)


def test_a_tower_rides_along(model):
    assert isinstance(model.text_tower, TextTower)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    assert jax.tree.leaves(half.text_tower)[0].dtype == jnp.bfloat16
    assert half.text_tower.tokenizer is model.text_tower.tokenizer
