"""Adapters that were trained here, written and merged into their base again."""

import dataclasses
import json
import sys

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxprune
from jaxprune import checkpoints_convert
from jaxprune.checkpoints_convert import write, write_adapter
from tests import builders


@pytest.fixture(scope="module")
def written(tiny_directory, tmp_path_factory):
    """A model, what was trained on it, and the directory."""
    params = jaxprune.load(tiny_directory, dtype="float32")
    trained = builders.trained_arrays(params)
    target = tmp_path_factory.mktemp("adapters") / "adapter"
    write_adapter(trained, params.config, target, alpha=6, dropout=0.05, base=tiny_directory)
    return params, trained, target


def test_its_base_with_it_is_the_merged_model(written, tiny_directory):
    params, trained, target = written
    expected = builders.merged_arrays(params, trained, alpha=6)
    for found in (jaxprune.load(tiny_directory, adapter=target), jaxprune.load(target)):
        assert found.config == params.config
        chex.assert_trees_all_close(found.arrays, expected, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(params.arrays, expected, atol=1e-3)


def test_what_is_in_the_directory(written, tiny_directory):
    _, trained, target = written
    assert {path.name for path in target.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fields = json.loads((target / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (4, 6, 0.05)
    assert fields["base_model_name_or_path"] == str(tiny_directory)
    assert not {"rank_pattern", "alpha_pattern"} & set(fields)
    tensors = load_file(target / "adapter_model.safetensors")
    start = "base_model.model.model."
    name = f"{start}language_model.layers.1.mlp.down_proj"
    own = trained["lora"]["layers_1/mlp/down_proj"]
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], own["a"].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], own["b"].T)
    name = f"{start}multi_modal_projector.linear_1"
    own = trained["multi_modal_projector"]["linear_1"]
    np.testing.assert_array_equal(tensors[f"{name}.weight"], own["kernel"].T)
    assert len(tensors) == 2 * len(trained["lora"]) + 4
    assert {x.dtype.name for x in tensors.values()} == {"float32"}


def test_some_of_a_fused_matrix(tmp_path):
    """Phi-3 has q, k and v in one; those that were not trained stay as they are."""
    text = {"model_type": "phi3", "head_dim": 12, "num_key_value_heads": 2}
    config = builders.tiny_internvl_config(text=text)
    base = tmp_path / "base"
    builders.write_directory(base, config)
    params = jaxprune.load(base)
    trained = builders.trained_arrays(params)
    some = {p: x for p, x in trained["lora"].items() if "k_proj" in p or "1/mlp/up_proj" in p}
    write_adapter({"lora": some}, config, tmp_path / "adapter", alpha=6, base=base)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["rank_pattern"] == {"qkv_proj": 12, "gate_up_proj": 8}
    assert "modules_to_save" not in fields
    found = jaxprune.load(tmp_path / "adapter").arrays
    expected = builders.merged_arrays(params, {"lora": some}, alpha=6)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora": {}}, r"here are none\. .* jaxprune\.export"),
        ({"lora": None}, "here are none"),
        ({"lora": {"layers_9/self_attn/q_proj": (48, 48)}}, "layers_9/.* in the model not there"),
        ({"lora": {"lm_head/kernel": (48, 48)}}, "is not of this model"),
        ({"lora": {"layers_0/self_attn/k_proj": (48, 48)}}, r"\[48, 48\], in the model \[48, 24\]"),
        ({"lora": {"layers_0/mlp/up_proj": (48, 64), "layers_1/mlp/up_proj": (48, 64, 3)}}, "3, 4"),
        ({"multi_modal_projector": {"linear_3": {"bias": np.zeros(3)}}}, "linear_3/bias is"),
    ],
)
def test_what_is_not_of_the_model(change, message, written, tmp_path):
    params, trained, _ = written

    def factors(inputs, outputs, rank=4):
        return {"a": np.zeros((inputs, rank)), "b": np.zeros((rank, outputs))}

    if change.get("lora"):
        change = {"lora": {path: factors(*shape) for path, shape in change["lora"].items()}}
    with pytest.raises(jaxprune.UserError, match=message):
        write_adapter({**trained, **change}, params.config, tmp_path / "new", alpha=6)
    assert not list(tmp_path.iterdir())


def test_factors_that_do_not_go_together(written, tmp_path):
    params, _, _ = written
    wrong = {"layers_0/mlp/up_proj": {"a": np.zeros((48, 4)), "b": np.zeros((3, 64))}}
    with pytest.raises(jaxprune.UserError, match=r"\[48, 4\] and \[3, 64\]; expected"):
        write_adapter({"lora": wrong}, params.config, tmp_path / "new", alpha=6)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("new", {"form": "loha"}, "form is 'loha'; expected one of: peft, llava"),
        ("adapter", {"form": "llava"}, "both 'llava' and 'lora' .* call it llava-lora-adapter"),
        ("llava-lora-a", {"form": "llava"}, "for a base in LLaVA's original format"),
        ("new", {"base": 3}, "The base is a int"),
    ],
)
def test_forms(name, options, message, written, tiny_directory, tmp_path):
    params, trained, _ = written
    options = {"base": tiny_directory, **options}
    with pytest.raises(jaxprune.UserError, match=message):
        write_adapter(trained, params.config, tmp_path / name, alpha=6, **options)
    assert not list(tmp_path.iterdir())


def test_llavas_form_needs_torch(tmp_path, monkeypatch):
    base, tower = builders.write_original(tmp_path / "base", tmp_path / "tower")
    params = jaxprune.load(base, vision_tower=tower)
    trained = builders.trained_arrays(params)
    target = tmp_path / "llava-lora"
    with monkeypatch.context() as patch, pytest.raises(jaxprune.UserError, match="install torch"):
        patch.setitem(sys.modules, "torch", None)
        write_adapter(trained, params.config, target, alpha=6, base=base, form="llava")
    assert not target.exists()
    # PEFT's form does without, and its reader takes it back over this base too.
    write_adapter(trained, params.config, target, alpha=6, base=base)
    found = jaxprune.load(target, vision_tower=tower)
    expected = builders.merged_arrays(params, trained, alpha=6)
    chex.assert_trees_all_close(found.arrays, expected, atol=1e-6)


@pytest.mark.slow
def test_publishers_names(tmp_path):
    """LLaVA-HR, which transformers does not know."""
    config = builders.tiny_hr_config()
    arrays = builders.random_params(config)
    checkpoints_convert.export(arrays, config, tmp_path / "base")
    trained = builders.trained_arrays(jaxprune.Params(arrays, config))
    write_adapter(trained, config, tmp_path / "adapter", alpha=6)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["mm_projector"]
    found, _ = checkpoints_convert.load_checkpoint(
        tmp_path / "base", dtype="float32", adapter=tmp_path / "adapter"
    )
    expected = builders.merged_arrays(jaxprune.Params(arrays, config), trained, alpha=6)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(error, written, tmp_path, monkeypatch):
    params, trained, _ = written

    def fail(_, path, **__):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(write, "save_file", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else jaxprune.UserError
    with pytest.raises(expected):
        write_adapter(trained, params.config, tmp_path / "new", alpha=6)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(jaxprune.UserError, match="exists; name another"):
        write_adapter(trained, params.config, tmp_path / "there", alpha=6)


def test_a_merged_model_is_exported_with_all_that_its_base_had(written, tiny_directory, tmp_path):
    params, trained, _ = written
    merged = builders.merged_arrays(params, trained, alpha=6)
    jaxprune.export(dataclasses.replace(params, arrays=merged), tmp_path / "merged")
    files = [
        {x.name: x.read_bytes() for x in d.iterdir()} for d in (tiny_directory, tmp_path / "merged")
    ]
    for there in files:
        assert there.pop("model.safetensors")
    assert files[0] == files[1]
    assert "preprocessor_config.json" in files[0] and "tokenizer.json" in files[0]
    found = jaxprune.load(tmp_path / "merged", dtype="float32")
    chex.assert_trees_all_equal(found.arrays, merged)
