"""LLaVA-NeXT against `transformers`, float32: tiles, packing, logits, answers."""

import functools
from typing import Any

import chex
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import jaxprune
import tests.builders
from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.engine.answer import answers_of
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.prompts import as_messages, render
from jaxprune.models.llava_next import FAMILY, LlavaNextConfig
from jaxprune.ops.tiles import VisualSize
from tests.builders import start
from tests.cases import mostly_slow
from tests.oracle import builders

DECODERS = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
}
SIZES = {  # width, height
    "square": (64, 64),
    "small square": (40, 40),
    "3:1": (150, 50),
    "1:3": (50, 150),
    "tiny": (3, 5),
    "huge": (900, 700),
    "1:40": (20, 800),
    "40:1": (800, 20),
    "one pixel wide": (1, 60),
    "one pixel": (1, 1),
}


def picture(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By decoder, made once: a PyTorch model, its processor, and the same weights here."""

    @functools.cache
    def make(decoder):
        model = builders.torch_llava_next(text=DECODERS[decoder])
        directory = builders.save(model, tmp_path_factory.mktemp("next"))
        processor = transformers.AutoProcessor.from_pretrained(directory)
        return model, processor, jaxprune.load(directory, dtype="float32")

    return make


def inputs_of(processor, images, question):
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    return processor(images=images, text=text, return_tensors="pt")


def check(pair, images, question, new=8):
    model, processor, ours = pair
    inputs = inputs_of(processor, images, question)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].numpy()
        ids = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
        )
    run = start(ours, [images], [question], max_new_tokens=new)
    assert answers_of(run)[0].prompt_tokens == inputs.input_ids.shape[1]
    chex.assert_trees_all_close(np.asarray(run.first_logits[0]), logits, atol=1e-4)
    answer = jaxprune.generate(ours, [images], [question], max_new_tokens=new, return_details=True)[
        0
    ]
    expected = ids[0, inputs.input_ids.shape[1] :].tolist()
    stop = expected.index(2) if 2 in expected else new
    assert answer.token_ids == expected[:stop]


# How an image is cut does not depend on the decoder: odd shapes with one of them.
CASES = [("multi-head", size) for size in SIZES]
CASES += [
    (d, s) for d in ("grouped-query", "mistral") for s in ("square", "3:1", "1:3", "tiny", "huge")
]
QUICK = [("multi-head", "square"), ("multi-head", "3:1"), ("grouped-query", "tiny")]


@pytest.mark.parametrize("decoder, size", mostly_slow(CASES, QUICK))
def test_logits_and_answers(pairs, rng, decoder, size):
    check(pairs(decoder), [picture(rng, *SIZES[size])], "What is it?")


@pytest.mark.parametrize("decoder", DECODERS)
def test_two_images_of_different_tilings_in_a_prompt(pairs, rng, decoder):
    check(pairs(decoder), [picture(rng, 70, 50), picture(rng, 20, 90)], "Which is larger?")


def test_pixels_and_lengths_of_many_sizes(rng, tmp_path):
    model = builders.torch_llava_next()
    directory = builders.save(model, tmp_path / "m")
    processor = transformers.AutoProcessor.from_pretrained(directory)
    ours = jaxprune.load(directory)
    for _ in range(40):
        width = int(np.exp(rng.uniform(0, np.log(600))))
        height = max(1, round(width * np.exp(rng.uniform(-1, 1) * np.log(40))))
        image = picture(rng, width, height)
        made = processor.image_processor(images=image, return_tensors="np")
        expected = made["pixel_values"][0].transpose(0, 2, 3, 1)
        found = pixel_values(ours.processor, [image], ours.config)
        assert np.array_equal(found, expected), (width, height)
        with torch.no_grad():
            features = model.model.get_image_features(
                torch.from_numpy(made["pixel_values"]), torch.tensor(made["image_sizes"])
            ).pooler_output
        assert ours.config.tiling(VisualSize(height, width)).num_tokens == len(features[0]), (
            width,
            height,
        )


def hub_config(decoder, image_token, **text):
    """What the config.json of a published model holds."""
    return transformers.LlavaNextConfig(
        text_config=decoder(**text), image_token_index=image_token, vocab_size=text["vocab_size"]
    )


LLAMA, MISTRAL = transformers.LlamaConfig, transformers.MistralConfig
VICUNA = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
PUBLISHED = {
    "llava_1_6_vicuna_7b": (LLAMA, 32000, VICUNA),
    "llava_1_6_vicuna_13b": (
        LLAMA,
        32000,
        {
            **VICUNA,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
        },
    ),
    "llava_1_6_mistral_7b": (
        MISTRAL,
        32000,
        {
            "vocab_size": 32064,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
    ),
    "llava_1_6_34b": (
        LLAMA,
        64000,
        {
            "vocab_size": 64064,
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "max_position_embeddings": 4096,
            "num_attention_heads": 56,
            "num_hidden_layers": 60,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e6,
        },
    ),
    "llava_next_llama3_8b": (
        LLAMA,
        128256,
        {
            "vocab_size": 128320,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
        },
    ),
}


@pytest.mark.parametrize("name", mostly_slow(PUBLISHED, ["llava_1_6_vicuna_7b"]))
def test_published_sizes(name):
    decoder, image_token, text = PUBLISHED[name]
    theirs = hub_config(decoder, image_token, **text)
    config = getattr(LlavaNextConfig, name)()
    assert LlavaNextConfig.from_hf(theirs.to_dict()) == config
    with torch.device("meta"):
        model = transformers.LlavaNextForConditionalGeneration(theirs)
    expected, table = flat_shapes(config), FAMILY.weights(config)
    mapped = {}
    for key, tensor in model.state_dict().items():
        rule = table.rule_of_key(table.canonical_key(key))
        (path,) = rule.paths
        assert path not in mapped, f"{key} and {mapped[path]}"
        mapped[path] = key
        assert rule.stored_shape([expected[path].shape]) == tuple(tensor.shape), key
    assert set(mapped) == set(expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_export_loads_in_transformers(pairs, rng, decoder, tmp_path):
    model, processor, ours = pairs(decoder)
    jaxprune.export(ours, tmp_path / "back")
    back = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    image = picture(rng, 90, 60)
    inputs = inputs_of(processor, [image], "What?")
    with torch.no_grad():
        chex.assert_trees_all_close(
            back(**inputs).logits.numpy(), model(**inputs).logits.numpy(), atol=1e-5
        )
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == "LlavaNextProcessor"


@pytest.mark.parametrize("kind", ["llava_llama", "llava_mistral"])
@pytest.mark.parametrize("size", [(60, 60), (150, 50), (40, 70)])
def test_an_original_checkpoint_answers_in_transformers(kind, size, tmp_path, rng):
    old, tower = tests.builders.write_original(
        tmp_path / "old",
        tmp_path / "tower",
        model_type=kind,
        text={"max_position_embeddings": 512},
        **({"sliding_window": None} if kind == "llava_mistral" else {}),
        **tests.builders.ORIGINAL_NEXT,
    )
    params = jaxprune.load(old, vision_tower=tower)
    # Equally good tilings: the original's first is the tall one, given as (width, height).
    config: Any = params.config
    assert config.image_grid_pinpoints[:2] == ((64, 32), (32, 64))
    checkpoints_convert.convert(old, tmp_path / "new", vision_tower=tower)
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "new")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "new")
    image, question = picture(rng, *size), "What is it?"
    inputs = inputs_of(processor, [image], question)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, -1].numpy()
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    run = start(params, image, question)
    assert answers_of(run)[0].prompt_tokens == inputs.input_ids.shape[1]
    found = np.asarray(run.first_logits[0])
    chex.assert_trees_all_close(found, logits[: len(found)], atol=1e-4)
    details = jaxprune.generate(params, image, question, max_new_tokens=8, return_details=True)
    new = ids[0, inputs.input_ids.shape[1] :].tolist()
    assert details.token_ids == [token for token in new if token != 2]
    named = "[INST]" if kind == "llava_mistral" else "ASSISTANT:"
    assert named in render(params.processor, as_messages(question, [None])[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mm_patch_merge_type": "flat"}, "spatial_unpad"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, "list of"),
        ({"image_grid_pinpoints": [[33, 64]]}, "multiples"),
    ],
)
def test_other_original_tilings_are_refused(fields, message, tmp_path):
    old, tower = tests.builders.write_original(
        tmp_path / "old", tmp_path / "tower", **{**tests.builders.ORIGINAL_NEXT, **fields}
    )
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.load(old, vision_tower=tower)
