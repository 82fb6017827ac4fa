"""LLaVA-HR against PyTorch, float32: features, signals, answers, and back to where it came from."""

import functools
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.request import make_request
from jaxprune.models.llava_hr.modeling import resized
from jaxprune.models.registry import family_of
from jaxprune.ops.visual import Signal
from tests.builders import edit, start
from tests.cases import FEW, mostly_slow, picture
from tests.oracle import hr

VARIANTS = {  # the slow map beside the fast one
    "equal": {},  # 4 x 4 and 4 x 4
    "smaller": {"fast": {"patch_size": 42, "image_size": 126}},  # 4 x 4 and 8 x 8
    "larger": {"fast": {"patch_size": 168, "image_size": 504}},  # 4 x 4 and 2 x 2
    "positions as they are": {"fast": {"image_size": 336}},
    "grouped-query": {"text": {"num_key_value_heads": 2}},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By variant, made once: a PyTorch model, and the same weights here."""

    @functools.cache
    def make(name):
        model = hr.made(**VARIANTS[name])
        directory = hr.save(model, tmp_path_factory.mktemp("hr") / "m")
        return model, jaxprune.load(directory, dtype="float32")

    return make


def torch_pixels(params, images):
    pixels = pixel_values(params.processor, images, params.config)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("name", mostly_slow(VARIANTS, ["smaller"]))
def test_logits_and_answers(name, pairs):
    model, params = pairs(name)
    images = [picture(0, (40, 50)), picture(1, (90, 30))]
    row = make_request(params.processor, [images], "<image>What <image> is it?", chat=True).rows[0]
    with torch.no_grad():
        x = model.embeddings(row.pieces, torch_pixels(params, images))
        logits = model.decoder(inputs_embeds=x).logits[0, -1].numpy()
        ids = model.decoder.generate(
            inputs_embeds=x, max_new_tokens=12, min_new_tokens=12, do_sample=False,
            eos_token_id=None, attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
        )  # fmt: skip
    asked = ([images], "<image>What <image> is it?")
    run = start(params, *asked, buckets=FEW)
    chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits, atol=1e-4)
    answer = jaxprune.generate(
        params, *asked, max_new_tokens=12, eos_token_id=[], buckets=FEW, return_details=True
    )
    assert answer[0].token_ids == ids[0].tolist()
    assert answer[0].visual_tokens == [params.config.grid**2] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equal", "smaller"])
def test_signals(name, pairs):
    """Without CLS: the attention that patches receive, in layers whose inputs are adapted."""
    model, params = pairs(name)
    pixels = torch_pixels(params, [picture(0), picture(1)])
    with torch.no_grad():
        inputs, features = model.states(pixels)
        expected = {Signal("features"): features, Signal("hidden_states", layer=0): inputs[1]}
        vision = getattr(model.fast, "vision_model", model.fast)
        for l in (-1, 1):
            layer = vision.encoder.layers[l]
            x = layer.layer_norm1(inputs[l])
            q, k = (
                getattr(layer.self_attn, f"{kind}_proj")(x).reshape(2, x.shape[1], 2, -1)
                for kind in "qk"
            )
            attention = torch.einsum("fqhd,fkhd->fhqk", q, k) * q.shape[-1] ** -0.5
            received = attention.softmax(-1).mean((1, 2))
            expected[Signal("received_attention", layer=l)] = received
            expected[Signal("cls_attention", layer=l, heads="joined")] = received
            expected[Signal("keys", layer=l)] = k.mean(2)
            expected[Signal("keys", layer=l, heads="joined")] = k.flatten(2)
    found = family_of(params.config).encode(
        params.arrays, params.config, jnp.asarray(pixels.numpy().transpose(0, 2, 3, 1)),
        frozenset(expected),
    )  # fmt: skip
    wanted = {signal: x.numpy() for signal, x in expected.items()}
    chex.assert_trees_all_close(found.signals, wanted, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1024, 448), (128, 336), (7, 3), (3, 8)])
def test_corners_stay_when_a_map_is_resized(sizes, rng):
    before, after = sizes
    x = rng.normal(size=(1, before, before, 2)).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        (after, after),
        mode="bilinear",
        align_corners=True,
    )
    found = np.asarray(resized(jnp.asarray(x), after))
    chex.assert_trees_all_close(found, expected.numpy().transpose(0, 2, 3, 1), atol=2e-6)


def test_there_and_back(pairs, tmp_path):
    """It is written as its publisher stores it, bit for bit, but for what is never read."""
    model, params = pairs("equal")
    jaxprune.export(params, tmp_path / "exported")
    checkpoints_convert.convert(tmp_path / "exported", tmp_path / "converted")
    expected = {key: x for key, x in hr.published(model).items() if ".head." not in key}
    for place in (tmp_path / "exported", tmp_path / "converted"):
        chex.assert_trees_all_equal(load_file(place / "model.safetensors"), expected)
        again = jaxprune.load(place, dtype="float32")
        assert again.config == params.config
        chex.assert_trees_all_equal(again.arrays, params.arrays)
        images, prompt = picture(0), "What?"
        rows = [make_request(p.processor, images, prompt, chat=True).rows for p in (params, again)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "has other sizes"),
        ({"vision_tower_slow": "convnext_xxlarge.clip_laion2b_soup"}, "has other sizes"),
        ({"input_image_size": 1024}, "maps of 5 x 5 and 32 x 32 places do not fit"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"vision_tower_slow": 3}, "vision_tower_slow=3"),
        ({"grid": 3}, "does not handle: grid"),
    ],
)
def test_what_is_refused(fields, message, tmp_path):
    directory = hr.save(hr.made(), tmp_path / "m", **fields)
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.load(directory)


@pytest.mark.slow
def test_adapters_that_are_missing_are_named(tmp_path):
    directory = hr.save(hr.made(), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    left = {key: x for key, x in tensors.items() if "align_stages_latent" not in key}
    save_file(left, directory / "model.safetensors")
    with pytest.raises(jaxprune.UserError, match=r"36 missing .*align_stages_latent"):
        jaxprune.load(directory)
    edit(directory, "config.json", freeze_vision=True)  # the first stage of training has none
    params: Any = jaxprune.load(directory)
    assert not params.config.adapters
    assert jaxprune.generate(params, picture(0), "What?", max_new_tokens=1) is not None
