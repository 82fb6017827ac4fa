"""Every method on every family: what holds whatever the tower, the tiles and the decoder are."""

import zlib

import chex
import numpy as np
import pytest

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.calibrate import Sample
from jaxprune.engine.answer import answers_of
from jaxprune.engine.cost import estimate
from jaxprune.reports import bench
from jaxprune.reports.kept_patches import kept_over_depth
from tests import builders, cases
from tests.builders import start
from tests.cases import FEW

SIZES = [(60, 60), (90, 30), (30, 100), (33, 31), (7, 120), (500, 400)]  # width, height
FAMILIES = {
    "llava": builders.tiny_config,
    "llava_next": builders.tiny_next_config,
    "llava_hr": builders.tiny_hr_config,
    "video_llava": lambda: builders.tiny_video_config(temporal=True),
    "internvl": builders.tiny_internvl_config,
}
METHODS = {
    **{
        name: options
        for name, options in cases.METHODS.items()
        if name not in ("adaptive pair", "prumerge fixed", "prumerge_plus fixed")
    },
    "prumerge fixed": {"method": "prumerge", "keep": 14},
    "prumerge_plus fixed": {"method": "prumerge_plus", "keep": 15},
    "fitprune": {"deletions": (30, 20, 10), "num_tokens": 88},
}


def options_of(name):
    return cases.options_of(name, METHODS)


def random_sizes(name, number):
    """Widths and heights, of any aspect ratio up to 1:12; others for every name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    area, ratio = rng.uniform(300, 40000, number), 12 ** rng.uniform(-1, 1, number)
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1)
    return [(max(8, int(width)), max(8, int(height))) for width, height in sides]


def pictures_of(model, sizes, first=0):
    """Noise of such sizes, width first; every other one a video where those are seen as one."""
    found = [cases.picture(first + i, size[::-1]) for i, size in enumerate(sizes)]
    if model.processor.videos is None or model.processor.videos.text is not None:
        return found
    frames = [[cases.picture(100 * i + j, size[::-1]) for j in range(8)]
              for i, size in enumerate(sizes)]  # fmt: skip
    return [x if i % 2 else jaxprune.Video(frames[i]) for i, x in enumerate(found)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "m"
    builders.write_directory(directory, FAMILIES[request.param]())
    return jaxprune.load(directory)


# The papers' methods are seen on every family, the field's on those that they are published for
# and on the others in turn.
PUBLISHED_FOR = ("llava", "llava_next", "internvl")
FIELDS = (
    "fastervlm divprune visionzip mmtok cdpruner holov scope vispruner hiprune evs vidcom2 "
    "dart feather sparsevlm v2drop"
)
SEEN = [
    (family, name)
    for i, name in enumerate(METHODS)
    for j, family in enumerate(FAMILIES)
    if METHODS[name].get("method", name) not in FIELDS.split()
    or family in PUBLISHED_FOR
    or (i - j) % 5 in (0, 2)
]
# A method of each side and a pair; the rest of the matrix is among the longer checks.
QUICK = [pair for pair in SEEN if pair[1] == "prumerge"]
QUICK += [("internvl", "fitprune"), ("llava_next", "pair")]


@pytest.mark.parametrize("model, name", cases.mostly_slow(SEEN, QUICK), indirect=["model"])
def test_a_row_is_the_same_alone_and_in_a_batch(name, model):
    images = pictures_of(model, [SIZES[4], *random_sizes(name, 4)])
    prompts = ["What?", "Where is the red circle, and why?", "a b c", "Is there a star?", "Hm"]
    options = {"buckets": FEW, **options_of(name)}
    batch = start(model, images, prompts, **options)
    for i in (0, 1, 4):
        alone = start(model, images[i], prompts[i], **options)
        chex.assert_trees_all_close(batch.first_logits[i], alone.first_logits[0], atol=1e-4)


EVERYTHING = {
    "uniform": lambda number, tile: {"keep": number},
    "gsearch": lambda number, tile: {"keep_rates": (1.0, 1.0, 1.0)},
    "random": lambda number, tile: {"keep": number},
    "fitprune": lambda number, tile: {"deletions": (0, 0, 0), "num_tokens": 80},
    "fastervlm": lambda number, tile: {"keep": number},
    "divprune": lambda number, tile: {"keep": number},
    "scope": lambda number, tile: {"keep": number},
    "vispruner": lambda number, tile: {"keep": number},
    "hiprune": lambda number, tile: {"keep": number, "layer": 1},
    "cdpruner": lambda number, tile: {"keep": number, "relevance": "embeddings"},
    "mmtok": lambda number, tile: {"keep": number},
    "holov": lambda number, tile: {"keep": number, "num_crops": 4},
    "visionzip": lambda number, tile: {"dominant": tile, "contextual": 0, "cls": False},
    "evs": lambda number, tile: {"keep_rate": 1.0},
    "vidcom2": lambda number, tile: {"keep_rate": 1.0},
    "fastv": lambda number, tile: {"keep_rate": 1.0, "layer": 1},
    "pyramiddrop": lambda number, tile: {"keep_rate": 1.0, "stages": 3},
    "v2drop": lambda number, tile: {"keep_rates": (1.0, 1.0), "cut_layers": (1, 2)},
    "feather": lambda number, tile: {"keep_rates": (1.0, 1.0), "cut_layers": (1, 2)},
    "sparsevlm": lambda number, tile: {"keep_tokens": (576, 576), "cut_layers": (1, 2)},
}
"""Options under which a method drops nothing, of so many patches in all and in a tile.

Who always drops something is left out, and so is who merges; `dart` drops up to seven tokens.
"""
NOTHING_GOES = [
    *((family, name, 0) for family in FAMILIES for name in ("uniform", "gsearch")),
    *((family, name, 1) for family in FAMILIES for name in ("uniform", "gsearch")),
    *((family, name, which) for family in FAMILIES for name in ("random", "fitprune")
      for which in (0, 1)),
    *((family, name, 0) for family in PUBLISHED_FOR for name in list(EVERYTHING)[4:]),
    *(("video_llava", name, 0) for name in ("evs", "vidcom2")),
]  # fmt: skip


@pytest.mark.parametrize(
    "model, name, which",
    cases.mostly_slow(NOTHING_GOES, NOTHING_GOES[: 2 * len(FAMILIES)]),
    indirect=["model"],
)
def test_keeping_everything_is_no_pruning(name, which, model):
    image = pictures_of(model, random_sizes(f"{name} everything", 2))[which]
    plain = start(model, image, "What is it?", buckets=FEW)
    number = sum(tiling.num_patches for tiling in plain.tilings)
    everything = EVERYTHING[name](number, model.config.tower.tokens_per_tile)
    pruned = start(model, image, "What is it?", method=name, buckets=FEW, **everything)
    assert (pruned.seen.room.counts == plain.seen.room.counts).all()
    chex.assert_trees_all_close(pruned.first_logits, plain.first_logits, atol=1e-5)


@pytest.mark.parametrize("name", ["fitprune", "prumerge"])
def test_a_stream_joins_to_the_answer(name, model):
    (image,) = pictures_of(model, [(90, 40)])
    details = jaxprune.generate(
        model, image, "What is it?", max_new_tokens=6, return_details=True, **options_of(name)
    )
    streamed = "".join(
        jaxprune.stream(model, image, "What is it?", max_new_tokens=6, **options_of(name))
    )
    assert streamed.strip() == details.text


TILES = [(family, budget) for family in PUBLISHED_FOR for budget in ("tile", "image")]


@pytest.mark.parametrize(
    "model, budget", cases.mostly_slow(TILES, [("internvl", "tile")]), indirect=["model"]
)
def test_a_number_of_every_tile_or_of_all(budget, model):
    images = pictures_of(model, [(90, 40), (60, 60)])
    run = start(model, images, ["What?"] * 2, method="fastervlm", keep=4, budget=budget)
    patches = model.config.tower.tokens_per_tile
    for answer, tiling in zip(answers_of(run), run.tilings, strict=True):
        kept = answer.kept_indices[0]
        tile, left = np.unique(kept[kept >= 0] // patches, return_counts=True)
        own = np.bincount(tiling.slots[tiling.slots >= 0] // patches)
        if budget == "tile":
            assert left.tolist() == np.minimum(own[tile], 4).tolist() and len(tile) == tiling.tiles
        else:
            assert left.sum() == 4


SHORTENING = [
    *((family, "fitprune") for family in FAMILIES),
    *((family, "pair") for family in FAMILIES),
    *((family, name) for family in PUBLISHED_FOR
      for name in ("iti", "psigmoid", "pyramiddrop", "vtw", "v2drop", "dart", "feather",
                   "sparsevlm", "sparsevlm, renumbered", "sparsevlm plus",
                   "gsearch, without positions")),
]  # fmt: skip


@pytest.mark.parametrize(
    "model, name", cases.mostly_slow(SHORTENING, SHORTENING[: len(FAMILIES)]), indirect=["model"]
)
def test_gather_equals_mask(name, model):
    images = pictures_of(model, random_sizes(f"{name} gather", 4))
    gather, mask = (
        start(model, images, ["What, please?"] * 4, gather=how, buckets=FEW, **options_of(name))
        for how in (True, False)
    )
    assert mask.prompt.schedule.lengths is None and gather.prompt.schedule.lengths is not None
    chex.assert_trees_all_close(gather.first_logits, mask.first_logits, atol=1e-4)


@pytest.mark.parametrize("name", cases.mostly_slow(["prumerge", "fastv", "none"], ["prumerge"]))
def test_show_draws_the_whole_and_the_tiles(name, model):
    sheet = kept_over_depth(
        model, cases.picture(3, (30, 90)), "What?", side=120, **options_of(name)
    )
    assert sheet.height > 2 * 40


@pytest.mark.slow
def test_nothing_compiles_after_a_warm_up(model):
    """300 requests of random sizes, questions and lengths of answers."""
    rng = np.random.default_rng(0)
    buckets = FEW.up_to(batch=1, images=1, row_images=1, text=64, new_tokens=16)
    options = {"buckets": buckets, **options_of("pair")}
    jaxprune.warmup(model, show_progress=False, **options)
    images = pictures_of(model, random_sizes("warm", 60))
    with jaxprune.no_compilation():
        for i in range(300):
            prompt = "a " * int(rng.integers(1, 30))
            length = int(rng.integers(1, 4))
            jaxprune.generate(model, images[i % 60], prompt, max_new_tokens=length, **options)


@pytest.mark.slow
def test_from_calibration_to_a_copy(model, tmp_path):
    """What a user does with a model: fit a recipe, count, measure, convert, export."""
    samples = [Sample(image, "What is it?") for image in pictures_of(model, SIZES[:4])]
    recipe = jaxprune.calibrate(model, samples, method="fitprune", save=0.3, batch_size=2)
    found = estimate(model.config, recipe)
    assert found.saved["visual_macs"] == pytest.approx(0.3, abs=0.1)
    image = samples[0].image
    chosen = [("none", {"method": "none"}), ("recipe", {"method": recipe})]
    rows, _ = bench.bench(model, [image], "What?", chosen, new_tokens=2, rounds=1)
    assert [row.method for row in rows] == ["none", "recipe"]
    jaxprune.export(model, tmp_path / "exported")
    checkpoints_convert.convert(tmp_path / "exported", tmp_path / "converted")
    options = {"max_new_tokens": 3, "return_details": True, "method": recipe, "buckets": FEW}
    expected = jaxprune.generate(model, image, "What is it?", **options).token_ids
    for place in ("exported", "converted"):
        again = jaxprune.load(tmp_path / place)
        assert again.config == model.config
        assert jaxprune.generate(again, image, "What is it?", **options).token_ids == expected
    requests = [(sample.image, "What is it?") for sample in samples]
    several = list(jaxprune.generate_many(model, requests, **options))
    assert several[0].token_ids == expected
