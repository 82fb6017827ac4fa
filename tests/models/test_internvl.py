"""InternVL without PyTorch: tilings, merged patches, prompts, sizes, what bad input gets."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.checkpoints_convert.plan import flat_shapes
from jaxprune.engine.cost import estimate
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.prompts import as_messages, render
from jaxprune.inputs.request import make_request
from jaxprune.models.internvit.modeling import merge_squares
from jaxprune.models.internvl.config import PRESETS, InternVLConfig
from jaxprune.models.internvl.publisher import published_config
from jaxprune.models.registry import family_of, table_of
from jaxprune.ops.tiles import VisualSize
from tests import builders
from tests.cases import mostly_slow, picture

GRIDS = {  # width, height: columns, rows
    (100, 100): (1, 1),
    (633, 633): (1, 1),
    (634, 634): (2, 2),
    (896, 896): (2, 2),
    (1024, 1024): (3, 3),
    (4000, 4000): (3, 3),
    (800, 600): (4, 3),
    (640, 480): (4, 3),
    (50, 40): (4, 3),
    (1344, 448): (3, 1),
    (1920, 1080): (4, 2),
    (3000, 200): (12, 1),
    (10000, 1): (12, 1),
    (1, 10000): (1, 12),
}


@pytest.mark.parametrize("size", GRIDS)
def test_the_published_tilings(size):
    (width, height), (columns, rows) = size, GRIDS[size]
    tiles = columns * rows
    tiling = InternVLConfig().tiling(VisualSize(height, width))
    assert tiling.tiles == (tiles + 1 if tiles > 1 else 1)  # no thumbnail of a single tile
    assert tiling.num_tokens == 256 * tiling.tiles
    if tiles > 1:
        whole, enlarged = tiling.maps
        assert whole.tolist() == (tiles * 256 + np.arange(256)).reshape(16, 16).tolist()
        assert enlarged.shape == (16 * rows, 16 * columns)
        assert enlarged[0, :17].tolist() == ([*range(16), 256] if columns > 1 else [*range(16)])


def test_squares_of_patches():
    """Token (I, J) has at (2a + b) C + c what patch (2I + a, 2J + b) has at c."""
    patches = np.arange(36)[:, None] + np.array([0.0, 0.5])  # 6 x 6 of two channels
    found = np.asarray(merge_squares(jnp.asarray(patches)[None], 2))[0]
    assert found.shape == (9, 8)
    for token in range(9):
        I, J = divmod(token, 3)
        expected = [6 * (2 * I + a) + 2 * J + b + c for a in (0, 1) for b in (0, 1)
                    for c in (0, 0.5)]  # fmt: skip
        assert found[token].tolist() == expected


COUNTS = {  # parameters, tensors in the spelling of transformers, in the publisher's
    "internvl2-1b": (938_158_976, 733, 637),
    "internvl2-2b": (2_205_754_368, 661, 517),
    "internvl2-4b": (4_146_855_936, 637, 541),
    "internvl2-8b": (8_075_365_376, 733, 573),
}


@pytest.mark.parametrize("name", mostly_slow(COUNTS, ["internvl2-4b"]))
def test_parameters_and_tensors_of_the_published_sizes(name):
    config, (parameters, tensors, published) = PRESETS[name](), COUNTS[name]
    shapes = flat_shapes(config)
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == parameters
    keys = {table_of(config).rule_of_path(path).key for path in shapes}
    assert len(keys) == tensors
    # There q, k and v of the tower are one tensor, weights and biases, and of InternLM2 too.
    layers = config.text_config.num_hidden_layers
    fused = 2 * 2 * 24 + 2 * layers * (config.text_config.model_type == "llama")
    assert len(keys) - fused == published


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_back(name):
    config = PRESETS[name](dtype="bfloat16")
    assert config == InternVLConfig.from_hf(config.to_hf(), dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_that_they_are_called_by(name):
    size = float(name.rpartition("-")[2].removesuffix("b"))
    billions = sum(math.prod(leaf.shape) for leaf in flat_shapes(PRESETS[name]()).values()) / 1e9
    assert abs(billions - size) < 0.3 * size + 0.35, billions


# ---- prompts

SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)


@pytest.mark.parametrize(
    "fields, expected",
    [
        (
            {"template": "Hermes-2"},
            f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            {"template": "phi3-chat"},
            f"<|system|>\n{SYSTEM}<|end|><|user|>\n<image>\nWhat?<|end|><|assistant|>\n",
        ),
        (
            {"template": "internvl2_5", "system_message": "Be short."},
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_prompts_of_the_publisher(fields, expected, published):
    builders.edit(published, "config.json", **fields)
    processor = jaxprune.load(published).processor
    assert processor is not None
    messages, _ = as_messages("What?", [None])
    assert render(processor, messages) == expected
    turns = [{"role": "user", "content": "Ah"}, {"role": "assistant", "content": "Oh"}]
    text = render(processor, as_messages([*turns, {"role": "user", "content": "Hm"}], [])[0])
    end = "<|end|>" if fields["template"] == "phi3-chat" else "<|im_end|>"
    assert (
        text.index("Ah") < text.index(end, text.index("Ah")) < text.index("Oh") < text.index("Hm")
    )
    ends = processor.tokenizer.convert_tokens_to_ids(end)
    assert processor.eos_token_ids == (ends,)


@pytest.fixture
def published(tmp_path):
    """A directory in the publisher's form, tiny and random."""
    return builders.write_published_internvl(tmp_path / "published")


def test_an_image_stands_between_its_tokens(published):
    params = jaxprune.load(published)
    ids = params.processor.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    row = make_request(params.processor, picture(0), "What?", chat=True).rows[0]
    assert row.pieces[0][-1] == ids[0] and row.pieces[1][0] == ids[1]
    assert row.pieces[0][0] == params.processor.tokenizer.bos_token_id


def test_a_sentencepiece_tokenizer(published, tmp_path):
    """InternLM2's: no space in front of a text, the added tokens at their ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (published / "tokenizer.json").unlink()
    (tmp_path / "text").write_text("USER: What is it? ASSISTANT: A bus.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(published / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(published / "tokenizer.model"))
    added = {
        str(reference.vocab_size() + i): {"content": token, "special": True, "normalized": False,
                                          "lstrip": False, "rstrip": False, "single_word": False}
        for i, token in enumerate(builders.INTERNVL_TOKENS)
    }  # fmt: skip
    builders.edit(
        published, "tokenizer_config.json", added_tokens_decoder=added,
        tokenizer_class="InternLM2Tokenizer", add_bos_token=True,
        auto_map={"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    )  # fmt: skip
    processor = jaxprune.load(published).processor
    assert processor is not None
    for text in ("What is it?", " What is  it?\n", "A bus: ü"):
        assert processor.ids_of(text) == reference.encode(text)
        assert processor.text_of(reference.encode(text)) == text
    whole = processor.ids_of("<|im_start|>user\nWhat", add_special_tokens=True)
    start = reference.vocab_size() + builders.INTERNVL_TOKENS.index("<|im_start|>")
    assert whole == [1, start, *reference.encode("user\nWhat")]


# ---- what bad input gets


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ps_version": "v1"}, "ps_version='v1'; supported: 'v2'"),
        ({"ps_version": ...}, "ps_version='v1'; supported: 'v2'"),  # the class's default
        ({"use_llm_lora": 16}, "use_llm_lora=16: the weights are an adapter's"),
        ({"force_image_size": 32}, "force_image_size=32, but the vision tower takes 64"),
        ({"use_thumbnail": False}, "use_thumbnail=false"),
        ({"llm_config__architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"llm_config__rope_scaling": {"type": "yarn", "factor": 2}}, "RoPE scaling 'yarn'"),
        ({"llm_config__hidden_size": 64}, "do not fit its config.json"),
        ({"max_dynamic_patch": 0}, "cuts images into 1 to 0 tiles"),
        ({"downsample_ratio": 0.3}, "merges squares of 3 patches, which do not divide the 8"),
        ({"vision_config__image_size": [32, 64]}, "image_size=.32, 64.; supported: squares"),
        ({"pad2square": True}, "does not handle: pad2square"),
        ({"template": "vicuna"}, "chat template"),
    ],
)
def test_what_is_refused(fields, message, published):
    builders.edit(published, "config.json", **fields)
    with pytest.raises(jaxprune.UserError, match=message):
        params = jaxprune.load(published)
        jaxprune.generate(params, picture(0), "What?", max_new_tokens=1)


def test_defaults_differ_by_spelling(published):
    fields = json.loads((published / "config.json").read_text())
    for name in ("dynamic_image_size", "use_thumbnail", "max_dynamic_patch"):
        del fields[name]
    assert published_config(fields, dtype="float32").max_tiles == 1
    fields |= {"dynamic_image_size": True, "use_thumbnail": True}
    assert published_config(fields, dtype="float32").max_tiles == 6
    vision = fields["vision_config"]
    for name in ("qkv_bias", "qk_normalization", "norm_type"):
        vision.pop(name, None)
    found = published_config(fields, dtype="float32").vision_config
    assert not found.attention_bias and found.use_qk_norm and found.norm_type == "rms_norm"
    hub = InternVLConfig.from_hf(
        {"vision_config": {}, "text_config": builders.tiny_internvl_config().text_config.to_hf()}
    )
    assert not hub.vision_config.use_qk_norm and hub.vision_config.norm_type == "layer_norm"
    assert hub.max_tiles == 12 and hub.text_config.tie_word_embeddings


def test_a_stale_llm_config_beside_a_right_text_config(published):
    fields = json.loads((published / "config.json").read_text())
    expected = published_config(fields, dtype="float32")
    right = fields["llm_config"]
    stale = {**right, "hidden_size": 5120}
    found = published_config({**fields, "llm_config": stale, "text_config": right}, dtype="float32")
    assert found == expected


@pytest.mark.parametrize("rotated", [{"type": "su"}, {"rope_type": "longrope"}])
def test_su_and_longrope_are_one(rotated, published):
    fields = json.loads((published / "config.json").read_text())
    fields["llm_config"] |= {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 256,
        "rope_scaling": {**rotated, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
    }
    found = published_config(fields, dtype="float32").text_config.rope_scaling
    assert found.kind == "longrope" and found.original_max_position_embeddings == 64
    assert found.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    assert PRESETS["internvl2-4b"]().text_config.rope_scaling.attention_factor == pytest.approx(
        math.sqrt(1 + math.log(32) / math.log(4096))
    )


def test_qwens_window_is_none():
    text = builders.tiny_internvl_config().text_config.to_hf() | {"model_type": "qwen2"}
    window = {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2}
    config = InternVLConfig.from_hf({"vision_config": {}, "text_config": {**text, **window}})
    assert config.text_config.model_type == "qwen2" and config.text_config.attention_bias
    with pytest.raises(jaxprune.UserError, match="use_sliding_window"):
        InternVLConfig.from_hf(
            {"vision_config": {}, "text_config": {**text, **window, "use_sliding_window": True}}
        )


def test_the_published_curves_cost():
    """G-Search's curve for InternVL2-8B: mean keep rate .428."""
    config = jaxprune.read_config("internvl2-8b")
    found = estimate(config, "gsearch", text_tokens=60)
    kept = [layer.visual_in / found.layers[0].visual_in for layer in found.layers]
    assert np.mean(kept) == pytest.approx(0.428, abs=0.002)


def test_tiles_are_the_image_processors(tmp_path):
    """Of a directory of the Hub: what preprocessor_config.json says of them."""
    config = dataclasses.replace(builders.tiny_internvl_config(), max_tiles=3)
    builders.write_directory(tmp_path / "m", config)
    assert jaxprune.load(tmp_path / "m").config == config
    builders.edit(tmp_path / "m", "preprocessor_config.json", crop_to_patches=False)
    params = jaxprune.load(tmp_path / "m")  # transformers' processor crops anyway
    answer = jaxprune.generate(
        params, picture(0, (30, 60)), "What?", max_new_tokens=1, return_details=True
    )
    assert answer.visual_tokens == [48]
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == np.float32, params.arrays))


@pytest.mark.parametrize("most", [12, 6])
def test_tiles_of_many_sizes(rng, most):
    """As many as the image processor of transformers makes, and the same pixels."""
    config = dataclasses.replace(InternVLConfig(), max_tiles=most)
    theirs = family_of(config).image_processor(config, pad=False)
    area, ratio = np.exp(rng.uniform(2, 14, 300)), np.exp(rng.uniform(-3, 3, 300))
    for width, height in np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).astype(int):
        size = VisualSize(max(1, int(height)), max(1, int(width)))
        expected = theirs.get_number_of_image_patches(size.height, size.width)
        assert config.tiling(size).tiles == expected, size


def test_pixels_are_those_of_transformers(tmp_path):
    """Of a directory of the Hub, whose file leaves the cutting to the processor's class."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    builders.write_directory(tmp_path / "m", builders.tiny_internvl_config())
    params = jaxprune.load(tmp_path / "m")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    side = {"height": 64, "width": 64}
    theirs = GotOcr2ImageProcessorPil(
        size=side, image_mean=mean, image_std=std, crop_to_patches=True, max_patches=4
    )
    for i, size in enumerate([(64, 64), (40, 50), (30, 200), (200, 30), (5, 9), (300, 310)]):
        image = picture(i, size)
        expected = np.stack(theirs(np.asarray(image))["pixel_values"]).transpose(0, 2, 3, 1)
        found = pixel_values(params.processor, [image], params.config)
        np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_decoder_that_contradicts_the_weights(tmp_path):
    """And a directory of one family with the config of another."""
    directory = tmp_path / "m"
    builders.write_directory(directory, builders.tiny_internvl_config())
    builders.edit(directory, "config.json", text_config__num_key_value_heads=4)
    with pytest.raises(jaxprune.UserError, match=r"of another shape .*k_proj"):
        jaxprune.load(directory)
    builders.write_directory(tmp_path / "other", builders.tiny_config())
    shutil.copy(tmp_path / "other" / "config.json", directory / "config.json")
    with pytest.raises(jaxprune.UserError, match=r"do not fit its config\.json: .* missing"):
        jaxprune.load(directory)
