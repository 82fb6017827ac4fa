"""Images of several tiles: every method over many tilings, and what bad input gets."""

import dataclasses
import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import Sample
from jaxprune.methods import resolve
from jaxprune.methods.prumerge import KEYS
from jaxprune.models.llava_next import LlavaNextConfig
from jaxprune.models.llava_next.config import anyres, best_resolution
from jaxprune.models.registry import depth_of
from jaxprune.ops.tiles import NEWLINE, VisualSize, one_tile
from jaxprune.ops.visual import CLS_ATTENTION
from tests import builders, cases
from tests.builders import start
from tests.methods import builders as tiles
from tests.methods import reference

SIZES = [(60, 60), (90, 30), (30, 100), (33, 31), (7, 120), (500, 400)]  # width, height


def picture(seed, size):
    """Noise of so many pixels, width first."""
    return cases.picture(seed, size[::-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiles") / "m"
    builders.write_directory(directory, builders.tiny_next_config())
    return jaxprune.load(directory)


# ---- how an image is cut


def test_the_published_sizes():
    config = LlavaNextConfig()
    assert config.num_image_tokens == config.tiling(VisualSize(672, 672)).num_tokens == 2928
    assert config.tiling(VisualSize(1008, 336)).num_tokens == 576 + 72 * 24 + 72
    assert config.tiling(VisualSize(336, 1008)).num_tokens == 576 + 24 * 72 + 24
    assert config.tiling(VisualSize(480, 640)).num_tokens == 576 + 36 * 48 + 36  # a photograph, 4:3
    assert config.tiling(VisualSize(1, 300)).num_tokens >= 576


def test_a_map_reads_row_by_row():
    found = anyres(40, 80, ((64, 64), (32, 64)), 32, 2)  # scaled to 32 x 64: no padding
    assert found.tiles == 3
    n = NEWLINE
    assert found.slots.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, n, 6, 7, 10, 11, n]
    assert found.rows.tolist() == [0] * 4 + [1] * 5 + [2] * 5


def test_padding_falls_away():
    found = anyres(20, 80, ((64, 64),), 32, 4)  # 16 of 64 rows are filled: 2 of 8 patches
    lines = found.slots[16:].reshape(2, 9)
    assert (lines[:, -1] == NEWLINE).all()
    assert lines[0, :8].tolist() == [28, 29, 30, 31, 44, 45, 46, 47]  # the first tiles' last row
    assert lines[1, :8].tolist() == [48, 49, 50, 51, 64, 65, 66, 67]


def test_the_resolution_that_shows_most_and_wastes_least():
    points = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert best_resolution(336, 336, points) == (336, 672)  # the first of equals
    assert best_resolution(600, 600, points) == (672, 672)
    assert best_resolution(100, 1000, points) == (336, 1008)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_an_image_too_thin_is_refused(model, size):
    with pytest.raises(jaxprune.UserError, match="too thin"):
        jaxprune.generate(model, picture(0, size), "What?")


def test_several_images_of_other_tilings_in_a_prompt(model):
    images = [picture(i, size) for i, size in enumerate(SIZES[:3])]
    answer = jaxprune.generate(
        model, [images], ["<image><image><image> Which?"], return_details=True, max_new_tokens=2
    )[0]
    sizes = [model.config.tiling(VisualSize(i.height, i.width)).num_tokens for i in images]
    assert answer.visual_tokens == answer.unpruned_visual_tokens == sizes
    assert len(set(sizes)) == 3


# ---- what methods do on tiles


def test_prumerge_treats_every_tile_for_itself(rng):
    tiling = anyres(20, 80, ((64, 64),), 32, 4)  # two of the tiles' rows are left
    x = rng.normal(size=(5, 16, 6)).astype(np.float32)
    k = rng.normal(size=(5, 16, 6)).astype(np.float32)
    s = rng.uniform(0.001, 0.2, size=(5, 16)).astype(np.float32) ** 2
    signals = {CLS_ATTENTION: jnp.asarray(s), KEYS: jnp.asarray(k)}
    found = tiles.select(jaxprune.PruMerge(), jnp.asarray(x), signals, tilings=[tiling])
    inside, kept, extra = set(tiling.slots.tolist()), {}, []
    for t in range(5):
        own = reference.kept_prumerge(s[t])
        merged = reference.merge(x[t], s[t], k[t], own)
        kept |= {t * 16 + n: merged[i] for i, n in enumerate(own) if t * 16 + n in inside}
        extra.append(merged[-1])
    rows = {r for r, p in zip(tiling.rows, tiling.slots, strict=True) if p in kept}
    expected = [
        int(p)
        for r, p in zip(tiling.rows, tiling.slots, strict=True)
        if p in kept or (p == NEWLINE and r in rows)
    ]
    count = int(found.counts[0])
    assert found.indices[0, :count].tolist() == [*expected, -1, -1, -1, -1, -1]
    for slot, patch in enumerate(expected):
        if patch != NEWLINE:
            chex.assert_trees_all_close(found.tokens[0, slot], kept[patch], atol=1e-5)
    chex.assert_trees_all_close(found.tokens[0, count - 5 : count], np.stack(extra), atol=1e-5)


@pytest.mark.parametrize("cls", [jaxprune.PruMerge, jaxprune.PruMergePlus])
@pytest.mark.parametrize("keep", [1, 2, 9, 24])
def test_a_fixed_keep_counts_over_the_image(rng, cls, keep):
    tiling = anyres(20, 80, ((64, 64),), 32, 4)
    s = rng.permutation(80).reshape(5, 16).astype(np.float32) / 80
    x = jnp.asarray(rng.normal(size=(5, 16, 6)), jnp.float32)
    found = tiles.select(
        cls(keep=keep), x, {CLS_ATTENTION: jnp.asarray(s), KEYS: x}, tilings=[tiling]
    )
    patches = tiling.slots[tiling.slots >= 0]
    ranked = {
        jaxprune.PruMerge: reference.kept_prumerge,
        jaxprune.PruMergePlus: reference.kept_prumerge_plus,
    }[cls](s.ravel()[patches], keep)
    indices = np.asarray(found.indices[0, : int(found.counts[0])])
    assert sorted(indices[indices >= 0]) == sorted(patches[ranked])
    assert (indices == -1).sum() == 5  # a token more for every tile


def test_newlines_of_empty_rows_go():
    tiling = anyres(64, 64, ((64, 64),), 32, 2)  # 4 + 4 x (4 + newline)
    x = jnp.zeros((5, 4, 3))
    found = tiles.select(jaxprune.UniformPlaces(keep=2), x, {}, tilings=[tiling])
    # Of 20 patches in reading order 5 and 15, of which the first 4 are the whole image's: one
    # each in the first and the third of the map's four rows.
    patches = tiling.slots[tiling.slots >= 0]
    assert found.indices[0].tolist() == [patches[5], NEWLINE, patches[15], NEWLINE]


def test_tiles_beside_single_squares_change_nothing(rng):
    x = jnp.asarray(rng.normal(size=(6, 16, 3)), jnp.float32)
    several = anyres(64, 64, ((64, 64),), 32, 4)
    mixed = tiles.select(jaxprune.UniformPlaces(keep=5), x, {}, tilings=[one_tile(16), several])
    alone = tiles.select(jaxprune.UniformPlaces(keep=5), x[:1], {}, tilings=[one_tile(16)])
    assert mixed.indices[0, :5].tolist() == alone.indices[0].tolist()
    assert (mixed.tokens[0, :5] == alone.tokens[0]).all()


@pytest.mark.slow
def test_calibration_on_images_of_other_sizes(model):
    samples = [Sample(picture(i, size), "What is it?") for i, size in enumerate(SIZES)]
    recipe = jaxprune.calibrate(model, samples, method="fitprune", save=0.3, batch_size=3)
    assert recipe.options["num_tokens"] == model.config.num_image_tokens
    answer = jaxprune.generate(
        model, samples[0].image, "What is it?", method=recipe, return_details=True
    )
    assert answer.cost.saved["visual_macs"] > 0.1
    recipe = jaxprune.calibrate(model, samples, method="iti", keep_rate=0.2)
    plan = resolve(recipe, depth_of(model.config))
    assert plan.vision is not None and plan.decoder is not None


# ---- what bad input gets


@pytest.mark.parametrize(
    "points, message",
    [
        ([[336, 600]], "multiples of the vision tower's 336"),
        ([[336, 0]], "multiples"),
        ([], "list of"),
        ("(1x1)", "list of"),
        ([[336]], "list of"),
    ],
)
def test_pinpoints_are_checked(points, message):
    fields = {**LlavaNextConfig().to_hf(), "image_grid_pinpoints": points}
    with pytest.raises(jaxprune.UserError, match=message):
        LlavaNextConfig.from_hf(fields)


def test_missing_pinpoints_are_the_published_ones():
    fields = LlavaNextConfig().to_hf()
    del fields["image_grid_pinpoints"]
    assert LlavaNextConfig.from_hf(fields) == LlavaNextConfig()


def test_a_processor_of_other_tilings_is_refused(tmp_path):
    directory = tmp_path / "m"
    builders.write_directory(directory, builders.tiny_next_config())
    path = directory / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "image_grid_pinpoints": [[96, 96]]}))
    with pytest.raises(jaxprune.UserError, match="say different things of tiles"):
        jaxprune.generate(jaxprune.load(directory), picture(0, (60, 60)), "What?")


def test_tokens_over_the_context_are_refused(model):
    images = [[picture(i, (64, 64)) for i in range(4)]]
    with pytest.raises(jaxprune.UserError, match="context"):
        jaxprune.generate(model, images, ["<image><image><image><image> What?"])


def test_positions_of_a_whole_image_count_against_the_context(model):
    """The context is 256; the image has 88 tokens, of which 4 are left."""
    options = {"method": "uniform", "keep": 4, "max_new_tokens": 200}
    image, words = picture(0, (64, 64)), "a " * 60
    plain = start(model, image, words, **options)
    kept = start(model, image, words, positions="original", **options)
    ends = [int(run.prompt.layout.next_position[0]) for run in (plain, kept)]
    assert ends[1] - ends[0] > 70 and plain.limits[0] - kept.limits[0] == ends[1] - ends[0]
    assert kept.limits[0] + ends[1] == 256
    with pytest.raises(jaxprune.UserError, match=r"takes 2\d\d places with its images, but"):
        start(model, image, "a " * 165, positions="original", **options)


def test_the_full_strategy_is_refused():
    with pytest.raises(jaxprune.UserError, match="'full'"):
        dataclasses.replace(LlavaNextConfig(), vision_feature_select_strategy="full")


def test_an_attention_window_is_refused():
    fields = LlavaNextConfig().to_hf()
    fields["text_config"] |= {"model_type": "mistral", "sliding_window": 1024}
    with pytest.raises(jaxprune.UserError, match="sliding_window=1024"):
        LlavaNextConfig.from_hf(fields)


def test_cost_of_the_published_recipes():
    from jaxprune.engine.cost import prompt_cost

    config = LlavaNextConfig.llava_1_6_vicuna_7b(dtype="bfloat16")
    for save, at_2928, at_2880 in ((0.4, 40.2, 40.3), (0.6, 60.1, 60.3)):
        plan = resolve("fitprune", depth_of(config), save=save)
        for number, expected in ((2928, at_2928), (2880, at_2880)):
            found = prompt_cost(config, plan, text_tokens=64, unpruned_visual_tokens=number)
            assert round(100 * found.saved["visual_macs"], 1) == expected
