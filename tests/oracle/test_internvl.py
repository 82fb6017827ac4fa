"""InternVL against `transformers`, float32: tiles, logits, answers, the publisher's form."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.engine.answer import answers_of
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.request import make_request
from jaxprune.models.llama.modeling import text_tokens
from jaxprune.models.registry import family_of
from jaxprune.ops.tiles import VisualSize
from jaxprune.ops.visual import Signal
from tests.builders import INTERNVL_TOKENS, PUBLISHED, start
from tests.cases import FEW, mostly_slow
from tests.oracle import builders

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


@pytest.mark.parametrize("name", mostly_slow(VARIANTS, ["internlm2", "InternViT-6B"]))
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


@pytest.mark.parametrize("name", mostly_slow(PUBLISHED, ["internlm2", "phi3"]))
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


def torch_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def our_logits(params, rows):
    """Logits of rows of text, padded into one batch."""
    family, config = family_of(params.config), params.config
    longest = max(map(len, rows))
    ids = jnp.array([[*row, *[0] * (longest - len(row))] for row in rows], jnp.int32)
    tokens = text_tokens(family.embed_text(params.arrays, config, ids))
    valid = jnp.arange(longest) < jnp.array([[len(row)] for row in rows])

    @jax.jit
    def logits(arrays, tokens):
        prefilled = family.prefill(arrays, config, tokens, new_slots=0)
        return family.logits(arrays, config, prefilled.tokens.x)

    found = np.asarray(logits(params.arrays, tokens._replace(valid=valid)))
    return [x[: len(row)] for x, row in zip(found, rows, strict=True)]


def test_longrope_around_its_switch(pairs, rng):
    """The long factors act beyond 16 positions, for each row by itself; the short ones up to it."""
    model, params = pairs("phi3")
    rows = [rng.integers(5, 512, size=n).tolist() for n in (5, 15, 16, 17, 40)]
    alone = [our_logits(params, [row])[0] for row in rows]
    for row, found in zip(rows, alone, strict=True):
        chex.assert_trees_all_close(found, torch_logits(model, row), atol=1e-4)
    chex.assert_trees_all_close(our_logits(params, rows), alone, atol=1e-4)
    # The switch is not without effect: the same tokens in a longer row.
    longer = our_logits(params, [[*rows[2], *rows[1]]])[0][:16]
    assert np.abs(longer - alone[2]).max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "InternViT-6B"])
def test_signals_of_merged_patches(name, pairs, rng):
    """Attention summed over the patches of a token after the softmax, keys side by side."""
    model, params = pairs(name)
    pixels = rng.normal(size=(2, 3, 32, 32)).astype(np.float32)
    tower = model.model.vision_tower
    with torch.no_grad():
        x = torch.from_numpy(pixels)
        states = [tower.embeddings(x)]
        for layer in tower.encoder.layer:
            states.append(layer(states[-1]))
        last = tower.encoder.layer[-1]
        y, attention = last.layernorm_before(states[-2]), last.attention
        q = attention.q_norm(attention.q_proj(y))
        k = attention.k_norm(attention.k_proj(y))
        cls = torch.softmax(q[:, :1] @ k.transpose(1, 2) / 32**0.5, -1)[:, 0, 1:]

    def merged(patches):  # 4 x 4 patches -> 2 x 2 tokens
        C = patches.shape[-1]
        squares = patches.reshape(2, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5)
        return squares.reshape(2, 4, 4 * C)

    expected = {
        Signal("features"): merged(states[-1][:, 1:]),
        Signal("cls_attention", heads="joined"): merged(cls[..., None]).sum(-1),
        Signal("keys", heads="joined"): merged(k[:, 1:]),
    }
    found = family_of(params.config).encode(
        params.arrays, params.config, jnp.asarray(pixels.transpose(0, 2, 3, 1)), frozenset(expected)
    )
    wanted = {signal: x.numpy() for signal, x in expected.items()}
    chex.assert_trees_all_close(found.signals, wanted, atol=1e-4)
