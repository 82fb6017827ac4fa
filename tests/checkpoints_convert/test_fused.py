"""Several parameters in one stored tensor, on a made-up family that only the registry knows."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

import jaxprune
from jaxprune.checkpoints_convert import convert, export, load_checkpoint
from jaxprune.models import registry
from jaxprune.models.llava import Llava
from jaxprune.models.weights import KeyTable, join_rows, linear, split_rows

HEADS, WIDTH, HEAD, MLP, LAYERS = 4, 6, 3, 5, 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's sizes; every layer has one attention of either layout."""

    kv_heads: int
    dtype: str = "float32"
    image_token_index = 0

    @classmethod
    def from_hf(cls, fields, *, dtype="float32"):
        return cls(fields["kv_heads"], dtype)

    def to_hf(self):
        return {"model_type": "made_up", "kv_heads": self.kv_heads}

    def mesh_splits(self):
        return {"heads": HEADS}


def param_shapes(config):
    sizes = {"q": HEADS * HEAD, "k": config.kv_heads * HEAD, "v": config.kv_heads * HEAD}

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, config.dtype)

    grouped = {name: {"kernel": leaf(WIDTH, size)} for name, size in sizes.items()}
    stacked = {name: {**grouped[name], "bias": leaf(size)} for name, size in sizes.items()}
    mlp = {name: {"kernel": leaf(WIDTH, MLP)} for name in ("gate", "up")}
    layer = {"grouped": grouped, "stacked": stacked, "mlp": mlp}
    return {"decoder": {f"layers_{i}": layer for i in range(LAYERS)}}


def paths(module, names):
    return tuple(f"layers_{{l}}/{module}/{name}" for name in names)


PART = KeyTable(
    rules=(
        *linear("{l}.wqkv", paths("grouped", "qkv"), lambda config: config.kv_heads),
        *linear("{l}.qkv_proj", paths("stacked", "qkv")),
        *linear("{l}.gate_up_proj", paths("mlp", ("gate", "up"))),
    ),
    also_read=(
        *linear("{l}.gate_proj", "layers_{l}/mlp/gate"),
        *linear("{l}.up_proj", "layers_{l}/mlp/up"),
    ),
    partition=((r".*/(q|k|v|gate|up)/kernel", 1),),
)


class MadeUp(Llava):
    """Nothing of it is run."""

    config: Any = Config

    def recognises(self, fields):
        return fields.get("model_type") == "made_up"

    def read_config(self, files):
        return Config.from_hf(files.fields, dtype=files.dtype)

    def weights(self, config):
        return PART.under("text.", "decoder/")

    param_shapes: Any = staticmethod(param_shapes)


@pytest.fixture(params=[4, 2, 1], ids=lambda kv_heads: f"g={HEADS // kv_heads}")
def directory(request, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, "made_up": MadeUp()})
    config = Config(request.param)
    rows = (HEADS + 2 * config.kv_heads) * HEAD
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(LAYERS):
        tensors |= {
            f"text.{i}.wqkv.weight": rng.normal(size=(rows, WIDTH)),
            f"text.{i}.qkv_proj.weight": rng.normal(size=(rows, WIDTH)),
            f"text.{i}.qkv_proj.bias": rng.normal(size=rows),
            f"text.{i}.gate_up_proj.weight": rng.normal(size=(2 * MLP, WIDTH)),
        }
    source = tmp_path / "source"
    source.mkdir()
    write(source, tensors)
    (source / "config.json").write_text(json.dumps(config.to_hf()))
    return source


def loaded(directory) -> tuple[dict, Any]:
    return load_checkpoint(directory)


def stored(directory):
    return load_file(directory / "model.safetensors")


def write(directory, tensors):
    tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


def separate_mlp(tensors):
    """The first layer's MLP stored as two tensors."""
    fused = tensors.pop("text.0.gate_up_proj.weight")
    tensors["text.0.gate_proj.weight"] = fused[:MLP].copy()
    tensors["text.0.up_proj.weight"] = fused[MLP:].copy()


def test_every_row_goes_to_its_parameter(directory):
    tensors = stored(directory)
    params, config = loaded(directory)
    layer = params["decoder"]["layers_1"]
    groups = config.kv_heads
    each = HEADS // groups

    wqkv = tensors["text.1.wqkv.weight"].reshape(groups, each + 2, HEAD, WIDTH)
    expected = {"q": wqkv[:, :each], "k": wqkv[:, each], "v": wqkv[:, each + 1]}
    for name, rows in expected.items():
        found = layer["grouped"][name]["kernel"]
        np.testing.assert_array_equal(found, rows.reshape(-1, WIDTH).T)

    ends = (HEADS * HEAD, (HEADS + groups) * HEAD, (HEADS + 2 * groups) * HEAD)
    for name, start, end in zip("qkv", (0, *ends), ends, strict=False):
        for leaf, key in (("kernel", "weight"), ("bias", "bias")):
            rows = tensors[f"text.1.qkv_proj.{key}"][start:end]
            np.testing.assert_array_equal(layer["stacked"][name][leaf], rows.T)

    gate_up = tensors["text.1.gate_up_proj.weight"]
    np.testing.assert_array_equal(layer["mlp"]["gate"]["kernel"], gate_up[:MLP].T)
    np.testing.assert_array_equal(layer["mlp"]["up"]["kernel"], gate_up[MLP:].T)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


def test_export_and_convert_write_what_was_read(directory, tmp_path):
    params, config = load_checkpoint(directory)
    export(params, config, tmp_path / "exported")
    assert_same(stored(tmp_path / "exported"), stored(directory))
    report = convert(directory, tmp_path / "converted")
    assert report.tensors == report.verified == len(stored(directory))
    assert_same(stored(tmp_path / "converted"), stored(directory))


def test_through_the_own_format_and_back(directory, tmp_path):
    params, config = loaded(directory)
    report = convert(directory, tmp_path / "own", format="jaxprune")
    flat = flatten_dict(params, sep="/")
    assert report.tensors == report.verified == len(flat)
    assert_same(stored(tmp_path / "own"), flat)
    convert(tmp_path / "own", tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(directory))
    half = convert(tmp_path / "own", tmp_path / "half", dtype="bfloat16")
    assert half.bytes * 2 == report.bytes and half.verified == half.tensors
    found, half_config = load_checkpoint(tmp_path / "half", dtype="bfloat16")
    assert half_config == dataclasses.replace(config, dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), found, params)


def test_another_form_is_read_and_not_written(directory, tmp_path):
    expected, tensors = stored(directory), stored(directory)
    separate_mlp(tensors)
    write(directory, tensors)
    convert(directory, tmp_path / "converted")
    assert_same(stored(tmp_path / "converted"), expected)


def test_everything_wrong_is_told_at_once(directory):
    tensors = stored(directory)
    tensors["text.0.wqkv.weight"] = tensors["text.0.wqkv.weight"][1:].copy()
    tensors["text.1.qkv_proj.weight"] = tensors["text.1.qkv_proj.weight"][:, 1:].copy()
    tensors["text.0.up_proj.weight"] = tensors["text.0.gate_up_proj.weight"][MLP:].copy()
    tensors["text.7.gate_up_proj.weight"] = tensors["text.0.gate_up_proj.weight"]
    del tensors["text.1.gate_up_proj.weight"], tensors["text.1.qkv_proj.bias"]
    write(directory, tensors)
    with pytest.raises(jaxprune.UserError) as error:
        load_checkpoint(directory)
    message = str(error.value)
    assert "2 missing (text.1.gate_up_proj.weight, text.1.qkv_proj.bias);" in message
    assert "1 unknown (text.7.gate_up_proj.weight);" in message
    # Whichever of the two is met first is not the one that is told.
    assert "1 present twice (text.0." in message
    assert "2 of another shape (text.0.wqkv.weight is [" in message


def test_half_of_another_form_is_told_by_its_parameter(directory):
    tensors = stored(directory)
    separate_mlp(tensors)
    del tensors["text.0.up_proj.weight"]
    write(directory, tensors)
    with pytest.raises(jaxprune.UserError, match=r"1 missing \(decoder/layers_0/mlp/up/kernel\)"):
        load_checkpoint(directory)


@pytest.mark.parametrize("module, key", [("grouped", "wqkv"), ("stacked", "qkv_proj")])
def test_a_missing_part_on_export(module, key, directory, tmp_path):
    params, config = load_checkpoint(directory)
    del params["decoder"]["layers_0"][module]["v"]["kernel"]
    message = f"lack decoder/layers_0/{module}/v/kernel, which text.0.{key}.weight holds"
    with pytest.raises(jaxprune.UserError, match=message):
        export(params, config, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_parts_are_laid_over_a_mesh(directory):
    params, _ = load_checkpoint(directory, mesh=jax.make_mesh((1,), ("model",)))
    layer = params["decoder"]["layers_0"]
    assert layer["grouped"]["k"]["kernel"].sharding.spec == PartitionSpec(None, "model")
    assert layer["stacked"]["k"]["bias"].sharding.spec == PartitionSpec()


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_rows_of_one_column(blocks):
    rows = (8, 4, 4)
    x = np.arange(16)
    parts = split_rows(x, rows, blocks)
    assert [len(part) for part in parts] == list(rows)
    np.testing.assert_array_equal(join_rows(parts, blocks), x)
    if blocks == 2:
        found = [part.tolist() for part in parts]
        assert found == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    with pytest.raises(AssertionError, match="do not divide"):
        split_rows(x, rows, 3)
