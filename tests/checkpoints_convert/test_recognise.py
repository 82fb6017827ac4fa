"""What a directory is said to be that holds no model, whatever check fails first."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert.recognise import existing_directory
from tests.builders import edit


def quantised(kind):
    return lambda d: edit(d, "config.json", quantization_config={"quant_method": kind})


def pointer(name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    return lambda d: (d / name).write_text(text)


def adapter(directory):
    (directory / "model.safetensors").unlink()
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}
        )
    )
    weights = {f"base_model.model.x.lora_{x}.weight": np.zeros((2, 2), np.float32) for x in "AB"}
    save_file(weights, directory / "adapter_model.safetensors")


def lora_output(directory):
    (directory / "model.safetensors").unlink()
    (directory / "non_lora_trainables.bin").write_bytes(b"x")


def interrupted(directory):
    (directory / "model.safetensors").unlink()
    place = directory / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    (place / "model.safetensors.abc.incomplete").write_bytes(b"x")


def empty(name):
    return lambda d: (d / name).write_bytes(b"")


def gguf(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model-q4.gguf").write_bytes(b"GGUF")


CASES = {
    "bitsandbytes": (quantised("bitsandbytes"), r"quantised weights \(bitsandbytes\)"),
    "awq": (quantised("awq"), r"quantised weights \(awq\)"),
    "fp8": (quantised("fp8"), r"quantised weights \(fp8\)"),
    "pointer to weights": (pointer("model.safetensors"), "Git LFS pointer.*git lfs pull"),
    "pointer to a tokenizer": (pointer("tokenizer.json"), "tokenizer.json .* Git LFS pointer"),
    "adapter": (adapter, "an adapter whose base is not here: llava-hf/llava-1.5-7b-hf"),
    "LLaVA's LoRA": (
        lora_output,
        "has no adapter_config.json; expected the directory of an adapter",
    ),
    "interrupted": (interrupted, "was interrupted .*incomplete"),
    "empty weights": (empty("model.safetensors"), "model.safetensors in .* is empty"),
    "empty config": (empty("config.json"), "config.json in .* is empty"),
    "GGUF": (gguf, "GGUF files"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_what_it_is(name, tiny_directory, tmp_path):
    make, message = CASES[name]
    directory = tmp_path / "m"
    shutil.copytree(tiny_directory, directory)
    make(directory)
    for use in (jaxprune.load, lambda d: checkpoints_convert.convert(d, tmp_path / "out")):
        if name == "pointer to a tokenizer" and use is not jaxprune.load:
            continue  # convert copies it
        with pytest.raises(jaxprune.UserError, match=message):
            use(directory)
    assert not (tmp_path / "out").exists()


def test_wrappers_of_training_loops_are_taken_off(tiny_directory, tmp_path, tiny_model):
    directory = tmp_path / "m"
    shutil.copytree(tiny_directory, directory)
    weights = load_file(directory / "model.safetensors")
    for wrapped in (
        {f"module.{key}": x for key, x in weights.items()},
        {f"_orig_mod.{key}": x for key, x in weights.items()},
        {key.replace(".layers.", "._orig_mod.layers."): x for key, x in weights.items()},
    ):
        save_file(wrapped, directory / "model.safetensors", metadata={"format": "pt"})
        found = jaxprune.load(directory)
        kernel = found["language_model"]["lm_head"]["kernel"]
        assert (kernel == tiny_model["language_model"]["lm_head"]["kernel"]).all()


@pytest.fixture
def cache(tmp_path, tiny_directory, monkeypatch):
    """A cache of the Hub's with one repository."""
    folder = tmp_path / "hub" / "models--some--llava"
    shutil.copytree(tiny_directory, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_the_hubs_cache(cache, tmp_path):
    assert existing_directory(cache) == cache / "snapshots" / "abc"
    assert existing_directory("some/llava") == cache / "snapshots" / "abc"
    jaxprune.load("some/llava")
    with pytest.raises(jaxprune.UserError, match="does not hold it; download it first, or pass"):
        jaxprune.load("some/other")
    shutil.copytree(cache / "snapshots" / "abc", cache / "snapshots" / "def")
    (cache / "refs" / "main").unlink()
    with pytest.raises(jaxprune.UserError, match="with 2 snapshots; name one"):
        jaxprune.load(cache)


@pytest.mark.parametrize("use", ["load", "convert"])
def test_a_cast_that_overflows(use, tiny_directory, tmp_path):
    directory = tmp_path / "m"
    shutil.copytree(tiny_directory, directory)
    weights = load_file(directory / "model.safetensors")
    key = next(key for key in weights if key.endswith("norm.weight"))
    weights[key] = weights[key].copy()
    weights[key][0] = 1e5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(jaxprune.UserError, match=r"holds 1e\+05, which float16 cannot"):
        if use == "load":
            jaxprune.load(directory, dtype="float16")
        else:
            checkpoints_convert.convert(directory, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    jaxprune.load(directory, dtype="bfloat16")


def test_the_first_of_two_conversions_is_kept(tiny_directory, tmp_path):
    from jaxprune.files import whole_directory

    target = tmp_path / "out"
    with (
        pytest.raises(jaxprune.UserError, match="exists by now; another program was first"),
        whole_directory(target) as slow,
    ):
        (slow / "a").write_text("slow")
        with whole_directory(target) as quick:
            (quick / "a").write_text("quick")
    assert (target / "a").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_preset_has_no_weights():
    with pytest.raises(jaxprune.UserError, match=r"llava-1\.5-7b is a model's published sizes"):
        existing_directory("llava-1.5-7b")
