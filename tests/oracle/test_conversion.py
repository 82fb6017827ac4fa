"""Checkpoints there and back, judged by PyTorch."""

import json

import chex
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import jaxprune
import tests.builders
from jaxprune import checkpoints_convert
from jaxprune.inputs.pixels import pixel_values
from jaxprune.inputs.prompts import as_messages, render, tokenize
from tests.oracle import builders


@pytest.fixture(scope="module")
def model():
    return builders.torch_llava(text={"num_key_value_heads": 2})


@pytest.fixture
def directory(model, tmp_path):
    return builders.save(model, tmp_path / "source")


def assert_same_tree(a, b):
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


def hub(key):
    key = key.replace("model.language_model.", "language_model.model.")
    key = key.replace("lm_head.", "language_model.lm_head.")
    key = key.replace("model.vision_tower.", "vision_tower.vision_model.")
    return key.replace("model.multi_modal_projector.", "multi_modal_projector.")


def since_4_52(key):
    return key.replace("model.vision_tower.", "model.vision_tower.vision_model.")


def original(key):
    key = key.replace("model.language_model.", "model.")
    key = key.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    key = key.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    return key.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")


SPELLINGS = {"hub": hub, "4.52": since_4_52, "5": lambda key: key, "original": original}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_the_same(spelling, model, directory):
    expected, _ = checkpoints_convert.load_checkpoint(directory)
    renamed = {SPELLINGS[spelling](k): v.contiguous() for k, v in model.state_dict().items()}
    assert len(renamed) == len(model.state_dict())
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    found, _ = checkpoints_convert.load_checkpoint(directory)
    assert_same_tree(found, expected)


def test_old_buffers_are_ignored(model, directory):
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    tensors["model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, directory / "model.safetensors")
    checkpoints_convert.load_checkpoint(directory)


def test_sharded_safetensors(model, directory):
    expected, _ = checkpoints_convert.load_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="50KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    found, _ = checkpoints_convert.load_checkpoint(directory)
    assert_same_tree(found, expected)


def test_bin_files(model, directory):
    expected, _ = checkpoints_convert.load_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    found, _ = checkpoints_convert.load_checkpoint(directory)
    assert_same_tree(found, expected)


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(directory, capsys):
    (directory / "model.safetensors").unlink()
    torch.save({"x": Harmful()}, directory / "pytorch_model.bin")
    with pytest.raises(jaxprune.UserError, match="weights-only loader refuses"):
        checkpoints_convert.load_checkpoint(directory)
    assert "executed" not in capsys.readouterr().out


def test_original_format_with_a_separate_tower(model, directory, tmp_path):
    expected, config = checkpoints_convert.load_checkpoint(directory)
    state = model.state_dict()
    tower = tmp_path / "tower"
    model.model.vision_tower.save_pretrained(tower)
    old = tmp_path / "original"
    old.mkdir()
    kept = {original(k): v for k, v in state.items() if "vision_tower" not in k}
    torch.save(kept, old / "pytorch_model.bin")
    fields = model.config.text_config.to_dict() | {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
        "image_aspect_ratio": "pad",
    }
    (old / "config.json").write_text(json.dumps(fields))
    found, original_config = checkpoints_convert.load_checkpoint(old, vision_tower=tower)
    assert_same_tree(found, expected)
    assert original_config.text_config == config.text_config
    with pytest.raises(jaxprune.UserError, match="missing"):
        checkpoints_convert.load_checkpoint(old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, model, directory):
    torch_model = builders.torch_llava(text={"num_key_value_heads": 2}).to(dtype)
    builders.save(torch_model, directory)
    name = str(dtype).removeprefix("torch.")
    params, config = checkpoints_convert.load_checkpoint(directory, dtype=name)
    assert config.dtype == name
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {name}
    expected = torch_model.model.multi_modal_projector.linear_1.weight.float().detach().numpy().T
    found = params["multi_modal_projector"]["linear_1"]["kernel"].astype(np.float32)
    chex.assert_trees_all_equal(np.asarray(found), expected)
    checkpoints_convert.load_checkpoint(directory, dtype="float32")


@pytest.mark.parametrize("options", [{}, {"text": {"tie_word_embeddings": True}}])
def test_export_is_what_transformers_loads(options, tmp_path):
    torch_model = builders.torch_llava(**options)
    params = jaxprune.load(builders.save(torch_model, tmp_path / "in"))
    jaxprune.export(params, tmp_path / "out")
    back = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    for (name, a), (_, b) in zip(
        torch_model.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert back.config.text_config.eos_token_id == 2
    transformers.AutoProcessor.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("format", ["hf", "jaxprune"])
def test_convert_in_both_formats(format, directory, tmp_path):
    expected, _ = checkpoints_convert.load_checkpoint(directory)
    report = checkpoints_convert.convert(directory, tmp_path / "out", format=format)
    assert report.tensors == report.verified == len(jax.tree.leaves(expected))
    found, _ = checkpoints_convert.load_checkpoint(tmp_path / "out")
    assert_same_tree(found, expected)
    again = checkpoints_convert.convert(tmp_path / "out", tmp_path / "again", dtype="bfloat16")
    assert again.bytes * 2 == report.bytes
    back = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert back.dtype == torch.bfloat16


CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
]


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("prefix", ["first", "always"])
def test_an_original_checkpoint_answers_in_transformers(prefix, aspect, tmp_path, rng):
    old, tower = tests.builders.write_original(
        tmp_path / "old", tmp_path / "tower", prefix=prefix, image_aspect_ratio=aspect
    )
    checkpoints_convert.convert(old, tmp_path / "new", vision_tower=tower)
    params = jaxprune.load(old, vision_tower=tower)
    torch_model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "new")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "new")
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))

    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert text == render(params.processor, as_messages(CONVERSATION, [None])[0])
    inputs = processor(images=image, text=text, return_tensors="pt")
    first, second = tokenize(params.processor, text, 1)
    image_id = torch_model.config.image_token_id
    assert inputs["input_ids"].tolist() == [[*first, *[image_id] * 16, *second]]

    pixels = pixel_values(params.processor, [image], params.config)
    found = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
    chex.assert_trees_all_close(found, pixels, atol=1e-5)
    ids = inputs["input_ids"].numpy()
    logits = tests.builders.forward_logits(
        params.arrays, params.config, pixels, ids, ids == image_id
    )
    with torch.no_grad():
        expected = torch_model(**inputs).logits.numpy()
        answer = torch_model.generate(**inputs, max_new_tokens=20, do_sample=False)
    real = logits.shape[-1]
    chex.assert_trees_all_close(np.asarray(logits), expected[..., :real], atol=1e-4)
    assert expected.shape[-1] == 320 and (expected.argmax(-1) < real).all()

    details = jaxprune.generate(
        params, [[image]], [CONVERSATION], max_new_tokens=20, return_details=True
    )
    found = answer[0, ids.shape[1] :].tolist()
    assert [token for token in found if token != 2] == details[0].token_ids
    assert len(details[0].token_ids) > 2
