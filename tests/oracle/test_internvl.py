"""InternVL against `transformers`, float32: tiles, logits, answers, the publisher's form."""

import functools

import chex
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

import jaxprune  # noqa: E402
from jaxprune import checkpoints_convert  # noqa: E402
from jaxprune.engine.answer import answers_of  # noqa: E402
from jaxprune.inputs.pixels import pixel_values  # noqa: E402
from jaxprune.inputs.request import make_request  # noqa: E402
from jaxprune.ops.tiles import VisualSize  # noqa: E402
from tests.builders import INTERNVL_TOKENS, PUBLISHED, start  # noqa: E402
from tests.cases import FEW  # noqa: E402
from tests.oracle import builders  # noqa: E402

VARIANTS = {
    **{name: {"decoder": name} for name in builders.INTERNVL_DECODERS},
    "InternViT-6B": {"vision": builders.INTERNVIT_6B},
    "tied": {"tie_word_embeddings": True},
    "an earlier layer": {"vision_feature_layer": -2},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By variant, made once: a PyTorch model, and the same weights here."""

    @functools.cache
    def make(name):
        model = builders.torch_internvl(**VARIANTS[name])
        directory = builders.save(model, tmp_path_factory.mktemp("internvl") / "m")
        return model, jaxprune.load(directory, dtype="float32")

    return make


def picture(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3)).astype(np.uint8))


def inputs_of(params, images, question, token=4):
    """What `transformers` takes: the prompt's ids with a token for every visual one, pixels."""
    request = make_request(params.processor, [images], question, chat=True)
    row = request.rows[0]
    ids = list(row.pieces[0])
    for image, piece in zip(images, row.pieces[1:], strict=True):
        ids += [token] * params.config.tiling(
            VisualSize(image.height, image.width)
        ).num_tokens + piece
    pixels = pixel_values(params.processor, images, params.config)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2)),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_answers(name, pairs, rng):
    model, params = pairs(name)
    image = picture(rng, 70, 40)
    inputs = inputs_of(params, [image], "What?")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].numpy()
        ids = model.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
    run = start(params, image, "What?", buckets=FEW)
    assert answers_of(run)[0].prompt_tokens == inputs["input_ids"].shape[1]
    chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits, atol=1e-4)
    details = jaxprune.generate(
        params, image, "What?", max_new_tokens=12, eos_token_id=[], buckets=FEW,
        return_details=True,
    )  # fmt: skip
    assert details.token_ids == ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_publishers_form(name, pairs, rng, tmp_path):
    """The same weights by the publisher's names give the same logits, and go back bit for bit."""
    model, _ = pairs(name)
    directory = builders.save_published(model, name, tmp_path / "published")
    params = jaxprune.load(directory, dtype="float32")
    images = [picture(rng, 70, 40), picture(rng, 30, 90)]
    inputs = inputs_of(params, images, "<image>\nWhat <image> is it?")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].numpy()
    run = start(params, [images], "<image>\nWhat <image> is it?", buckets=FEW)
    chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits, atol=1e-4)

    checkpoints_convert.convert(directory, tmp_path / "hub")
    jaxprune.export(params, tmp_path / "exported")
    state = {key: x.numpy() for key, x in model.state_dict().items()}
    for place in (tmp_path / "hub", tmp_path / "exported"):
        back = transformers.InternVLForConditionalGeneration.from_pretrained(
            place, dtype=torch.float32
        )
        chex.assert_trees_all_equal({k: x.numpy() for k, x in back.state_dict().items()}, state)
        assert back.config.image_token_id == 290 + INTERNVL_TOKENS.index("<IMG_CONTEXT>")
        again = jaxprune.load(place, dtype="float32")
        chex.assert_trees_all_equal(again.arrays, params.arrays)
        rows = [
            make_request(p.processor, [images], "<image>\nWhat <image> is it?", chat=True).rows[0]
            for p in (params, again)
        ]
        assert rows[0].pieces == rows[1].pieces
        assert params.processor.eos_token_ids == again.processor.eos_token_ids
