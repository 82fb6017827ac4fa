"""After a warm-up nothing compiles, whatever requests come within its buckets."""

import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image

import jaxprune
from jaxprune.devices import compilation
from jaxprune.engine.shapes import Shapes
from jaxprune.ops.tiles import VisualSize
from tests import builders
from tests.cases import mostly_slow, options_of

BUCKETS = jaxprune.Buckets(
    batch=(2, 4), images=(1, 4), row_images=(1,), text=(64,), visual=(16, 64, 128),
    new_tokens=(8,),
)  # fmt: skip
FOUR = dataclasses.replace(BUCKETS, batch=(4,), images=(4,))  # half as many programs
NAMES = (
    "none", "prumerge", "prumerge_plus fixed", "random", "iti", "fitprune", "gsearch", "vtw",
    "gsearch, renumbered", "prumerge, original positions", "adaptive pair",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiled_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("warm") / "m"
    builders.write_directory(directory, builders.tiny_next_config())
    return jaxprune.load(directory)


def picture(rng):
    height, width = rng.integers(20, 140, size=2)
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))


def ask_at_random(model, options, number, *, temperature=0.0, most=4, buckets=BUCKETS):
    """Requests of all sizes that the buckets hold, of up to `most` rows."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        rows = int(rng.integers(1, most + 1))
        images = [picture(rng) for _ in range(rows)]
        if rng.random() < 0.3:
            images = [images[0]] * rows
        prompts = ["a " * int(rng.integers(1, 20)) for _ in range(rows)]
        limit = int(rng.integers(1, 9))
        jaxprune.generate(
            model, images, prompts, max_new_tokens=limit, temperature=temperature,
            buckets=buckets, **options,
        )  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(NAMES, ["fitprune", "adaptive pair"]))
def test_nothing_compiles_after_it(name, tiny_model):
    options = options_of(name)
    buckets = BUCKETS if name in ("none", "adaptive pair") else FOUR
    report = jaxprune.warmup(tiny_model, buckets=buckets, **options)
    assert report.combinations > 0
    with jaxprune.no_compilation() as compilations:
        ask_at_random(tiny_model, options, 12, buckets=buckets)
    assert len(compilations) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_process_full_of_programs_makes_no_more(tiny_model, monkeypatch, tmp_path):
    def ask(text):
        return jaxprune.generate(
            tiny_model, image, text, method="random", keep=3, max_new_tokens=2, buckets=buckets
        )

    image, buckets = picture(np.random.default_rng(0)), dataclasses.replace(BUCKETS, text=(64, 96))
    answer = ask("a")
    with monkeypatch.context() as full:
        full.setattr(compilation, "_MOST_MAPPINGS", tmp_path / "most")
        (tmp_path / "most").write_text("10")
        assert ask("a") == answer  # what is compiled still runs
        for _ in range(2):
            with pytest.raises(jaxprune.UserError, match=r"memory mappings .* jax.clear_caches"):
                ask("a " * 70)
        assert ask("a") == answer
    longer = jaxprune.generate(
        tiny_model, image, "a " * 70, method="random", keep=3, max_new_tokens=2
    )
    assert ask("a " * 70) == longer


def test_a_warm_up_covers_all_seeds(tiny_model):
    jaxprune.warmup(tiny_model, method="random", keep=5, buckets=BUCKETS)
    image, kept = picture(np.random.default_rng(0)), set()
    with jaxprune.no_compilation():
        for seed in (0, 7, 2**32 - 1):
            answer = jaxprune.generate(
                tiny_model, image, "a", method="random", keep=5, seed=seed, max_new_tokens=2,
                buckets=BUCKETS, return_details=True,
            )  # fmt: skip
            kept.add(tuple(answer.kept_indices[0].tolist()))
    assert len(kept) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "prumerge"])
def test_nothing_compiles_after_it_with_tiles(name, tiled_model):
    options, buckets = {"method": name}, BUCKETS.up_to(batch=2)
    jaxprune.warmup(tiled_model, buckets=buckets, **options)
    with jaxprune.no_compilation():
        ask_at_random(tiled_model, options, 12, most=2)


def test_several_images_a_row(tiny_model):
    buckets = jaxprune.Buckets(
        batch=(1, 2), images=(2, 4), row_images=(1, 2), text=(64,), visual=(16, 24, 32),
        new_tokens=(8,),
    )  # fmt: skip
    jaxprune.warmup(tiny_model, method="uniform", keep=4, buckets=buckets)
    rng = np.random.default_rng(0)
    a, b, c, d = (picture(rng) for _ in range(4))
    with jaxprune.no_compilation():
        for images in ([[a]], [[a, b]], [[a, b], [c]], [[a, b], [c, d]], [[a], [a, a]], [[a], [b]]):
            prompts = ["<image> " * len(row) + "What?" for row in images]
            jaxprune.generate(
                tiny_model, images, prompts, method="uniform", keep=4, max_new_tokens=2,
                buckets=buckets,
            )  # fmt: skip


@pytest.mark.slow
def test_text_alone_draws_and_streams(tiny_model):
    jaxprune.warmup(tiny_model, buckets=BUCKETS, text_only=True, sampled=True)
    with jaxprune.no_compilation():
        ask_at_random(tiny_model, {}, 4, temperature=0.7)
        jaxprune.generate(tiny_model, None, "Hello", max_new_tokens=3, buckets=BUCKETS)
        list(jaxprune.stream(tiny_model, None, "Hello", max_new_tokens=3, buckets=BUCKETS))


def test_a_second_warm_up_makes_nothing(tiny_model):
    jaxprune.warmup(tiny_model, buckets=BUCKETS)
    report = jaxprune.warmup(tiny_model, buckets=BUCKETS)
    assert report.programs == {}
    assert "all there already" in str(report)


def test_what_is_not_covered_is_named(tiny_model):
    image = picture(np.random.default_rng(0))
    jaxprune.generate(tiny_model, image, "a", max_new_tokens=2)
    with (
        pytest.raises(jaxprune.UserError, match=r"'prefill' had to be compiled for batch=1, te"),
        jaxprune.no_compilation(),
    ):
        buckets = jaxprune.Buckets(text=(64, 99))
        jaxprune.generate(tiny_model, image, "a " * 80, max_new_tokens=2, buckets=buckets)


def test_other_compilations_are_named_at_the_end():
    import jax

    with (
        pytest.raises(jaxprune.UserError, match=r"1 XLA programs were made .*: jit\(odd_name\)"),
        jaxprune.no_compilation(),
    ):

        def odd_name(x):
            return x * 3 + 1

        jax.jit(odd_name)(np.zeros(7, np.float32))


def test_bounds_of_the_lists():
    cut = jaxprune.Buckets().up_to(batch=3, text=100)
    assert cut.batch == (1, 2, 4)
    assert cut.text == (32, 64, 128)
    assert cut.visual == jaxprune.Buckets().visual
    with pytest.raises(jaxprune.UserError, match="'rows' is no dimension"):
        jaxprune.Buckets().up_to(rows=3)
    with pytest.raises(jaxprune.UserError, match="over the largest bucket 64"):
        jaxprune.Buckets().up_to(batch=65)


def test_rooms_over_the_largest_bucket_are_left_out(tiny_model):
    buckets = jaxprune.Buckets(visual=(16, 20))
    shapes = Shapes(buckets, tiny_model.config, None)
    assert {room.visual for room in shapes.every_row(2, 16, 16)} == {16, 20, 32}


def test_slots_of_an_accelerator_are_whole_tiles(tiny_model):
    method = jaxprune.PruMerge(keep=5)
    shapes = Shapes(jaxprune.Buckets(text=(20, 64)), tiny_model.config, method, multiple=16)
    capacity = shapes.fixed_capacity(shapes.of_images(1, 1))
    assert capacity == 6  # which is selected; only its row is longer
    for images in (1, 2):
        room = shapes.of_rows(20, images, capacity, images * capacity)
        assert room.slots % 16 == 0 and 0 <= room.visual - images * capacity < 16
        assert room in shapes.every_row(images, capacity, capacity)
    assert shapes.of_rows(20, 0, 0, 0).slots == 20


def test_a_list_of_tiles_without_one(tiny_model):
    shapes = Shapes(jaxprune.Buckets(image_tiles=(5,)), tiny_model.config, None)
    (shape,) = set(shapes.every_image()[:1])
    assert list(shapes.every_selection(shape)) == [16]


def test_a_keep_over_one_tile_is_no_mistake_with_tiles(tiled_model):
    buckets = dataclasses.replace(BUCKETS, batch=(1,), images=(1,), visual=(64,))
    jaxprune.warmup(tiled_model, method="uniform", keep=40, buckets=buckets)


@pytest.mark.parametrize("name", ["none", "prumerge"])
def test_every_size_is_one_that_is_listed(name, tiled_model):
    method = None if name == "none" else jaxprune.PruMerge()
    shapes = Shapes(jaxprune.Buckets(), tiled_model.config, method)
    every = shapes.every_image()
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = map(int, rng.integers(8, 300, size=2))
        tiling = tiled_model.config.tiling(VisualSize(height, width))
        shape = shapes.of_images(1, tiling.tiles)
        assert shape in every
        assert shape.slots >= tiling.num_tokens
        assert shapes.of_selection(shape, tiling.num_tokens) in shapes.every_selection(shape)
