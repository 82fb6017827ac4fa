"""LLaVA's original format becomes a Hugging Face directory that answers the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from tokenizers import Tokenizer, processors

import jaxprune
from jaxprune import checkpoints_convert, cli
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.processor import load_processor
from jaxprune.inputs.prompts import as_messages, render, tokenize
from tests import builders

IDS = 290
ROWS = 320  # those and two more, rounded up to a multiple of 64
ORIGINAL = dataclasses.replace(builders.tiny_config(), image_token_index=-200)


@pytest.fixture(params=["first", "always"])
def original(request, tmp_path):
    return builders.write_original(tmp_path / "old", tmp_path / "tower", prefix=request.param)


@pytest.fixture
def wide():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    return Image.fromarray(pixels)


def convert(original, destination, **options):
    directory, tower = original
    return checkpoints_convert.convert(directory, destination, vision_tower=tower, **options)


def load(original):
    directory, tower = original
    return jaxprune.load(directory, vision_tower=tower)


CONVERSATIONS = [
    (1, "What is it?"),
    (1, "<image>What is it?"),
    (1, "What is <image> it?"),
    (2, "<image><image> What?\n"),
    (2, "<image> What <image>\n\nis it?"),
    (0, "What?"),
    (1, [{"role": "system", "content": "See."}, {"role": "user", "content": "What?"}]),
    (
        1,
        [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A bus."},
            {"role": "user", "content": "Where is it?"},
        ],
    ),
]


@pytest.mark.parametrize("images, prompt", CONVERSATIONS)
def test_prompts_keep_their_strings_and_ids(images, prompt, original, tmp_path):
    convert(original, tmp_path / "new")
    messages, _ = as_messages(prompt, [None] * images)
    old = load_processor(original[0], ORIGINAL)
    new = load_processor(tmp_path / "new", builders.tiny_config())
    text = render(old, messages)
    assert text.endswith(" ASSISTANT:")
    assert render(new, messages) == text
    assert tokenize(new, text, images) == tokenize(old, text, images)


@pytest.mark.parametrize("format", ["hf", "jaxprune"])
def test_answers_stay_the_same(format, original, wide, tmp_path):
    report = convert(original, tmp_path / "new", format=format)
    assert report.verified == report.tensors
    old, new = load(original), jaxprune.load(tmp_path / "new")
    assert new.config.image_token_index == IDS
    prompts = [[wide], [wide]], ["What is it?", "Where?"]
    for method in ("none", "prumerge"):
        options = {"method": method, "max_new_tokens": 20, "return_details": True}
        for a, b in zip(
            jaxprune.generate(old, *prompts, **options),
            jaxprune.generate(new, *prompts, **options),
            strict=True,
        ):
            assert len(a.token_ids) > 2
            assert (b.token_ids, b.text) == (a.token_ids, a.text)


def test_new_rows_are_the_mean_of_the_old(original, tmp_path):
    convert(original, tmp_path / "new")
    old, new = (
        flatten_dict(params.arrays, sep="/")
        for params in (load(original), jaxprune.load(tmp_path / "new"))
    )
    changed = {path for path in old if old[path].shape != new[path].shape}
    assert changed == {"language_model/embed_tokens/embedding", "language_model/lm_head/kernel"}
    for path, array in old.items():
        a, b = np.asarray(array), np.asarray(new[path])
        if path in changed:
            axis = a.shape.index(IDS)
            mean = a.mean(axis=axis, keepdims=True)
            added = b.take(np.arange(IDS, ROWS), axis)
            np.testing.assert_allclose(added, np.broadcast_to(mean, added.shape), atol=1e-6)
            b = b.take(np.arange(IDS), axis)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rows", [63, 64, 127])
def test_the_vocabulary_grows_to_a_multiple_of_64(rows):
    array = np.arange(rows * 2, dtype=np.float16).reshape(rows, 2)
    path = "language_model/embed_tokens/embedding"
    found = checkpoints_convert.hub_form.with_new_rows(path, array, 128)
    assert found.shape == (128, 2) and found.dtype == np.float16
    np.testing.assert_array_equal(found[rows:], np.tile([rows - 1, rows], (128 - rows, 1)))
    other = checkpoints_convert.hub_form.with_new_rows("language_model/norm/scale", array, 128)
    assert other is array


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_images_become_the_same_pixels(aspect, wide, tmp_path):
    original = builders.write_original(
        tmp_path / "old", tmp_path / "tower", image_aspect_ratio=aspect
    )
    convert(original, tmp_path / "new")
    config = builders.tiny_config()
    old = load_processor(original[0], ORIGINAL)
    pixels = pixel_values(load_processor(tmp_path / "new", builders.tiny_config()), [wide], config)
    np.testing.assert_allclose(pixels, pixel_values(old, [wide], config), atol=1e-6)
    padded = bool(np.ptp(pixels[0, 0, :, 0]) < 0.02)  # the first row is the padding's one color
    assert padded == (aspect == "pad")


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_export_writes_what_convert_writes(original, tmp_path):
    convert(original, tmp_path / "converted")
    jaxprune.export(load(original), tmp_path / "exported")
    converted, exported = contents(tmp_path / "converted"), contents(tmp_path / "exported")
    weights = [c.pop("model.safetensors") for c in (converted, exported)]
    assert exported == converted
    assert len(weights[0]) == len(weights[1])
    a, b = (jaxprune.load(tmp_path / name).arrays for name in ("converted", "exported"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < set(exported)


def test_half_precision(original, tmp_path):
    convert(original, tmp_path / "new", dtype="bfloat16")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    embedding = jaxprune.load(tmp_path / "new", dtype="bfloat16")["language_model"]["embed_tokens"]
    assert embedding["embedding"].shape[0] == config["text_config"]["vocab_size"] == ROWS


def test_tied_embeddings(tmp_path):
    original = builders.write_original(
        tmp_path / "old", tmp_path / "tower", text={"tie_word_embeddings": True}
    )
    convert(original, tmp_path / "new")
    language_model = jaxprune.load(tmp_path / "new")["language_model"]
    assert "lm_head" not in language_model
    assert language_model["embed_tokens"]["embedding"].shape[0] == ROWS


def test_mistakes_are_refused(original, tmp_path, monkeypatch, capsys):
    directory, tower = original
    with pytest.raises(jaxprune.UserError, match=r"missing .* as vision_tower"):
        checkpoints_convert.convert(directory, tmp_path / "new")
    with pytest.raises(jaxprune.UserError, match="does not exist"):
        convert((directory, tmp_path / "nowhere"), tmp_path / "new")
    with pytest.raises(jaxprune.UserError, match="exists"):
        convert(original, tower)
    params = load(original)
    with pytest.raises(jaxprune.UserError, match="without its processor"):
        checkpoints_convert.export(params.arrays, params.config, tmp_path / "new")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(jaxprune.UserError, match="no usable tokenizer"):
        convert(original, tmp_path / "new")
    assert not (tmp_path / "new").exists()

    monkeypatch.setattr("sys.argv", ["jaxprune", "convert", str(directory), str(tmp_path / "new")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "vision_tower" in capsys.readouterr().err


def test_it_answers_on_the_command_line(original, tmp_path, monkeypatch, capsys):
    directory, tower = original
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 40), "red").save(image)
    arguments = ["generate", "--model", directory, "--vision-tower", tower, "--image", image]
    arguments += ["--prompt", "What?", "--max-new-tokens", "3"]
    monkeypatch.setattr("sys.argv", ["jaxprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    expected = jaxprune.generate(load(original), image, "What?", max_new_tokens=3)
    assert capsys.readouterr().out == expected + "\n"


def test_a_tokenizer_that_cannot_keep_the_ids_is_refused(original, tmp_path):
    path = original[0] / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    # The end of an answer behind a whole prompt, but not behind the text around an image.
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(path))
    with pytest.raises(jaxprune.UserError, match="cannot be given an image token"):
        convert(original, tmp_path / "new")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_tokenizer(legacy, original, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    directory, _ = original
    (directory / "tokenizer.json").unlink()
    (tmp_path / "text").write_text("USER: What is it? ASSISTANT: A bus.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=IDS,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    options = {"legacy": legacy, "add_bos_token": True}
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | options))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    text = "USER: <image>\nWhat is it? ASSISTANT:"
    expected = [reference.encode(part) for part in text.split("<image>")]
    expected[0].insert(0, 1)
    old = load_processor(directory, ORIGINAL)
    assert tokenize(old, text, 1) == expected
    convert(original, tmp_path / "new")
    assert tokenize(load_processor(tmp_path / "new", builders.tiny_config()), text, 1) == expected
