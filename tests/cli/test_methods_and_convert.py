"""`jaxprune methods` and `jaxprune convert`."""

import json

import pytest
from safetensors import safe_open

import jaxprune
from jaxprune.methods import describe
from tests import builders


def test_methods_are_listed(run):
    rows = [describe(cls) for cls in jaxprune.METHODS.values()]
    assert json.loads(run("methods", "--json").out) == json.loads(json.dumps(rows))
    table = run("methods").out
    names = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert [name for name in names if name] == list(jaxprune.METHODS)


@pytest.fixture
def source(tmp_path):
    builders.write_directory(tmp_path / "in", builders.tiny_config())
    return tmp_path / "in"


def test_convert(source, run, refused, tmp_path):
    done = run("convert", source, tmp_path / "out", "--dtype", "bfloat16")
    assert done.code == 0 and done.err == ""
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        number = len(list(file.keys()))
    assert done.out.startswith(f"{tmp_path / 'out'}: {number} tensors, ")
    assert done.out.endswith(f" MB, {number} read back and equal.\n")
    assert jaxprune.load(tmp_path / "out", dtype="bfloat16").config.dtype == "bfloat16"
    assert "exists" in refused("convert", source, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_convert_as_json_without_reading_back(source, run, tmp_path):
    found = json.loads(run("convert", source, tmp_path / "out", "--no-verify", "--json").out)
    assert found["destination"] == str(tmp_path / "out")
    assert found["verified"] == 0 and found["tensors"] > 0
    again = run("convert", source, tmp_path / "again", "--no-verify")
    assert again.out.endswith(", not read back.\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "out"], "nowhere does not exist"),
        (["nowhere", "out", "--format", "h5"], "format is 'h5'"),
    ],
)
def test_mistakes(arguments, message, refused):
    assert message in refused("convert", *arguments)


def test_methods_of_a_model(run, source):
    listed = json.loads(run("methods", "--model", "llava-hr-7b", "--json").out)
    rows = {row["name"]: row for row in listed}
    assert rows["prumerge"]["reads"] == {"cls_attention": "received_attention", "keys": "keys"}
    assert rows["fitprune"]["recipes"] == [0.4, 0.6] and rows["fastv"]["recipes"] == []
    assert "those of this model are of llava_hr. cdpruner needs none" in rows["cdpruner"]["refused"]
    curves = json.loads(run("methods", "--model", "internvl2-8b", "--json").out)
    (gsearch,) = (row for row in curves if row["name"] == "gsearch")
    assert gsearch["recipes"] == [0.4277] and gsearch["refused"] is None
    table = run("methods", "--model", "llava-hr-7b").out
    assert "received" in table
    own = json.loads(run("methods", "--model", source, "--json").out)
    assert all(asked == given for row in own for asked, given in row["reads"].items())


@pytest.mark.parametrize("preset", ["llava-1.5-7b", "llava-hr-7b", "internvl2-8b"])
def test_methods_of_a_preset(preset, run):
    """Recipes of all sorts among them: some are made to save, some to keep, some for neither."""
    assert run("methods", "--model", preset).code == 0
    rows = json.loads(run("methods", "--model", preset, "--json").out)
    assert any(row["recipes"] for row in rows)
