"""What is wrong with a model directory is said in full, before anything is read."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert import write
from tests import builders


@pytest.fixture
def directory(tiny_directory, tmp_path):
    return shutil.copytree(tiny_directory, tmp_path / "model")


def change_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(directory, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.load(directory)


NORM = "language_model.model.norm.weight"


def test_missing_unknown_and_misshaped_tensors_are_told_at_once(directory):
    def change(tensors):
        del tensors[NORM]
        tensors["language_model.model.extra.weight"] = np.zeros(3, np.float32)
        tensors["multi_modal_projector.linear_1.bias"] = np.zeros(3, np.float32)

    change_weights(directory, change)
    refused(directory, rf"1 missing \({NORM}\); 1 unknown .*extra.*; 1 of another shape .*\[3\]")


def test_a_tensor_under_two_names(directory):
    change_weights(directory, lambda t: t.update({"model.language_model.norm.weight": t[NORM]}))
    refused(directory, "1 present twice")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(directory, value):
    def change(tensors):
        tensors[NORM] = tensors[NORM].copy()
        tensors[NORM][3] = value

    change_weights(directory, change)
    refused(directory, f"{NORM} holds NaN or infinity")


def test_files_that_end_early(directory):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(directory, "is not a complete safetensors file|is empty")


def test_integers_are_no_weights(directory):
    change_weights(directory, lambda t: t.update({NORM: np.ones(48, np.int8)}))
    refused(directory, "as I8; supported")


def test_no_weights_no_config_no_directory(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    refused(directory, "has no weights")
    (directory / "config.json").write_text("{")
    refused(directory, "is not readable JSON")
    (directory / "config.json").write_text("[]")
    refused(directory, "expected a JSON object")
    (directory / "config.json").unlink()
    refused(directory, "has no config.json")
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")


def test_another_architecture(directory):
    change_config(directory, model_type="mixtral")
    refused(directory, "of type 'mixtral'; supported: llava")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_feature_layer": -9}, "vision_feature_layer=-9"),
        ({"vision_feature_select_strategy": "cls"}, "'cls'; supported: 'default', 'full'"),
        ({"projector_hidden_act": "mish"}, "'mish'"),
        ({"tile_size": 3}, "does not handle: tile_size"),
        ({"text_config": {"model_type": "gemma"}}, "'gemma'; supported: 'llama'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"image_token_index": "four"}, "image_token_index='four'; expected a whole number"),
        ({"multimodal_projector_bias": "yes"}, "expected true or false"),
        ({"text_config": [3]}, "text_config=.3.; expected an object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'; expected true or false"),
        ({"projector_hidden_act": ["gelu"]}, "projector_hidden_act=..gelu.."),
    ],
)
def test_configs_are_read_strictly(directory, fields, message):
    change_config(directory, **fields)
    refused(directory, message)


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("text_config", {"rope_theta": "x"}, "rope_theta='x'; expected a positive number"),
        ("text_config", {"rope_parameters": [1]}, "rope_parameters=.1.; expected an object"),
        ("text_config", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
        ("text_config", {"rope_scaling": {"type": "linear", "factor": -2}}, "factor=-2"),
        ("text_config", {"rope_scaling": {"type": ["linear"]}}, "RoPE scaling"),
        ("text_config", {"rms_norm_eps": -1}, "rms_norm_eps=-1; expected a positive number"),
        ("text_config", {"attention_bias": "false"}, "attention_bias='false'; expected true"),
        ("text_config", {"num_attention_heads": "4", "head_dim": None}, "num_attention_heads='4'"),
        ("text_config", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0"),
        ("text_config", {"hidden_size": "48", "head_dim": None}, "hidden_size='48'"),
        ("text_config", {"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ("text_config", {"head_dim": 0}, "head_dim=0"),
        ("vision_config", {"layer_norm_eps": "x"}, "layer_norm_eps='x'; expected a positive"),
        ("vision_config", {"patch_size": 8.5}, "patch_size=8.5; expected a positive whole number"),
    ],
)
def test_values_of_the_wrong_type(directory, part, fields, message):
    old = json.loads((directory / "config.json").read_text())[part]
    old = {name: value for name, value in old.items() if name != "rope_parameters"}
    change_config(directory, **{part: old | fields})
    refused(directory, message)


def test_rotating_all_of_a_head_is_nothing_special(directory):
    text = json.loads((directory / "config.json").read_text())["text_config"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    change_config(directory, text_config=text | {"rope_parameters": rope})
    text_config: Any = jaxprune.load(directory).config.text_config
    assert text_config.rope_scaling.kind == "default"


@pytest.mark.parametrize("kind", ["yarn", "proportional"])
def test_other_rope_scalings_are_refused_by_name(directory, kind):
    text = json.loads((directory / "config.json").read_text())["text_config"]
    change_config(directory, text_config=text | {"rope_scaling": {"type": kind, "factor": 2.0}})
    refused(directory, f"RoPE scaling '{kind}'; supported: default, linear, dynamic, llama3")


def test_shards(directory, monkeypatch):
    expected = jaxprune.load(directory)
    monkeypatch.setattr(write, "MAX_SHARD_BYTES", 40_000)
    sharded = directory.parent / "sharded"
    checkpoints_convert.convert(directory, sharded)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    found = jaxprune.load(sharded)
    jax.tree.map(np.testing.assert_array_equal, found.arrays, expected.arrays)

    shards[1].unlink()
    refused(sharded, f"lacks the shard {shards[1].name}")
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    refused(sharded, "points outside its directory")
    index.write_text("{}")
    refused(sharded, "no 'weight_map'")


def test_no_code_of_a_directory_is_run(directory, tmp_path):
    mark = tmp_path / "mark"
    (directory / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    change_config(directory, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        path = directory / name
        fields = json.loads(path.read_text())
        fields["auto_map"] = {"AutoTokenizer": [None, "evil.T"], "AutoImageProcessor": "evil.P"}
        path.write_text(json.dumps(fields))
    try:
        jaxprune.load(directory)
    except jaxprune.UserError as error:
        assert "has no usable" in str(error)
    assert not mark.exists()


def test_broken_tokenizer_and_processor(directory):
    (directory / "preprocessor_config.json").write_text("{")
    refused(directory, "has no usable image processor")
    (directory / "tokenizer.json").write_text("{")
    refused(directory, "has no usable tokenizer")


class Interrupts:
    """An array that is being copied when the user presses Ctrl-C."""

    def __init__(self, array):
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, *_, **__):
        raise KeyboardInterrupt


@pytest.mark.parametrize("which", [0, 20, -1])
def test_an_interrupted_export_leaves_nothing(which, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_SHARD_BYTES", 20_000)  # some shards are on disk by then
    leaves, places = jax.tree.flatten(tiny_model.arrays)
    leaves[which] = Interrupts(leaves[which])
    broken = dataclasses.replace(tiny_model, arrays=jax.tree.unflatten(places, leaves))
    with pytest.raises(KeyboardInterrupt):
        jaxprune.export(broken, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_destination_is_not_touched(tiny_model, tmp_path):
    (tmp_path / "keep").touch()
    with pytest.raises(jaxprune.UserError, match="exists"):
        jaxprune.export(tiny_model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


def test_export_and_load_give_the_same_arrays(tiny_model, tmp_path):
    jaxprune.export(tiny_model, tmp_path / "out")
    found = jaxprune.load(tmp_path / "out")
    assert found.config == tiny_model.config
    jax.tree.map(np.testing.assert_array_equal, found.arrays, tiny_model.arrays)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: jaxprune.load(d, mesh=3), "mesh is a int; expected a jax.sharding.Mesh"),
        (lambda d: jaxprune.load(d, dtype=object()), "expected one of: auto, float32"),
        (lambda d: jaxprune.export({}, "x"), "params is a dict; expected what jaxprune.load gives"),
        (lambda d: jaxprune.export(jaxprune.load(d), None), "destination is a NoneType"),
        (lambda d: checkpoints_convert.convert(None, "x"), "directory is a NoneType"),
        (lambda d: jaxprune.load("a\0b"), "is not a path|does not exist"),
        (lambda d: jaxprune.load("~nobody-of-this-name/x"), "is not a path|does not exist"),
        (lambda d: checkpoints_convert.convert(d, "a\0b"), "is not a path"),
        (lambda d: checkpoints_convert.convert(d, None), "destination is a NoneType"),
    ],
)
def test_arguments_of_the_wrong_type(directory, call, message):
    with pytest.raises(jaxprune.UserError, match=message):
        call(directory)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_std": [0, 0, 0]}, "not finite; check image_std"),
        ({"image_std": "x"}, "image processor fails"),
        ({"do_center_crop": False}, "the vision tower takes 32 x 32"),
    ],
)
def test_odd_image_processors(directory, fields, message):
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    images = [np.zeros(shape, np.uint8) for shape in ((40, 60, 3), (60, 40, 3))]
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.generate(jaxprune.load(directory), images, "What?", max_new_tokens=1)


def test_dtype_is_checked(directory):
    with pytest.raises(jaxprune.UserError, match="dtype is 'int4'"):
        jaxprune.load(directory, dtype="int4")


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_config_there_and_back(text):
    config = builders.tiny_config(text=text, vision_feature_layer=(-2, -1))
    assert type(config).from_hf(config.to_hf()) == config
