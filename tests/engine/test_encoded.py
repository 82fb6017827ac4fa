"""Images that are encoded once and asked about several times."""

import pytest

import jaxprune
from tests import builders
from tests.cases import FEW, options_of, picture


@pytest.mark.parametrize("name", ["none", "prumerge", "iti", "uniform", "fitprune"])
def test_answers_are_those_of_the_image(name, tiny_model):
    options = {"buckets": FEW, "max_new_tokens": 6, **options_of(name)}
    images = [picture(i) for i in range(3)]
    kept = jaxprune.encode(tiny_model, images, method="prumerge", buckets=FEW)
    prompts = ["What?", "Where is it?", "a b c"]
    expected = jaxprune.generate(tiny_model, images, prompts, **options)
    assert jaxprune.generate(tiny_model, kept, prompts, **options) == expected
    mixed = [kept[0], images[1], kept[2]]
    assert jaxprune.generate(tiny_model, mixed, prompts, **options) == expected
    assert jaxprune.generate(tiny_model, kept[1], prompts[1], **options) == expected[1]
    many = jaxprune.generate_many(tiny_model, zip(kept, prompts, strict=True), **options)
    assert list(many) == expected


def test_images_of_several_tiles(tmp_path):
    builders.write_directory(tmp_path / "m", builders.tiny_next_config())
    model = jaxprune.load(tmp_path / "m")
    images = [picture(i, size) for i, size in enumerate([(60, 60), (30, 90), (100, 31)])]
    options = {"buckets": FEW, "max_new_tokens": 6, "method": "prumerge_plus"}
    kept = jaxprune.encode(model, images, method="prumerge_plus", buckets=FEW)
    prompt = "<image><image><image> Which?"
    expected = jaxprune.generate(model, [images], [prompt], **options)
    assert jaxprune.generate(model, [kept], [prompt], **options) == expected


def test_nothing_compiles_after_a_warm_up(tiny_model):
    buckets = jaxprune.Buckets(
        batch=(2,), images=(2,), row_images=(1,), text=(64,), visual=(16,), new_tokens=(8,)
    )
    jaxprune.warmup(tiny_model, method="uniform", keep=5, buckets=buckets, encoded=True)
    with jaxprune.no_compilation():
        kept = jaxprune.encode(tiny_model, picture(0), method="uniform", keep=5, buckets=buckets)
        for images, prompts in ((kept, "What?"), ([kept, picture(1)], ["What?", "Why?"])):
            jaxprune.generate(
                tiny_model, images, prompts, method="uniform", keep=5, max_new_tokens=2,
                buckets=buckets,
            )  # fmt: skip


def test_mistakes(tiny_model, small_model):
    kept = jaxprune.encode(tiny_model, picture(0), buckets=FEW)
    with pytest.raises(jaxprune.UserError, match="without what the method goes by; encode it"):
        jaxprune.generate(tiny_model, kept, "What?", method="prumerge", buckets=FEW)
    with pytest.raises(jaxprune.UserError, match="encoded by another model"):
        jaxprune.generate(small_model, kept, "What?")
    with pytest.raises(jaxprune.UserError, match="has no pixels"):
        jaxprune.batch(tiny_model, kept, "What?", buckets=FEW)
    with pytest.raises(jaxprune.UserError, match="image is a NoneType"):
        jaxprune.encode(tiny_model, None)
    assert kept.vision.signals == {}
