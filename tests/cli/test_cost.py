"""`jaxprune cost` against `estimate`."""

import json

import pytest

from jaxprune.engine.cost import FORMULA, estimate
from jaxprune.model import read_config
from jaxprune.ops.tiles import VisualSize

SAVING = ["--model", "llava-1.5-7b", "--method", "fitprune", "--save", 0.6, "--text-tokens", 75]


def test_json_is_the_estimate(run):
    done = run("cost", *SAVING, "--json")
    assert done.code == 0 and done.err == ""
    found = estimate(read_config("llava-1.5-7b"), "fitprune", save=0.6, text_tokens=75)
    expected = {"model": "llava-1.5-7b", "method": "fitprune", **found.as_dict()}
    assert json.loads(done.out) == json.loads(json.dumps(expected))


def test_the_small_model_without_one(run):
    found = json.loads(run("cost", "--dtype", "float32", "--json").out)
    assert found["model"] == "small_llava"
    assert found["cache_bytes"] == estimate(read_config(dtype="float32")).cache_bytes


def test_sizes_and_numbers_of_tokens(run):
    asked = ["cost", "--model", "llava-1.6-vicuna-7b", "--json"]
    config = read_config("llava-1.6-vicuna-7b")
    wide = json.loads(run(*asked, "--image-size", "1008x336").out)
    assert wide["visual_tokens"] == config.tiling(VisualSize(336, 1008)).num_tokens
    few = json.loads(run(*asked, "--method", "prumerge", "--visual-tokens", 99).out)
    assert few["visual_tokens"] == 99
    said = run(*asked[:-1]).out.splitlines()[-1]
    assert "most visual tokens, 2928; one of 336 x 336 pixels has 1176" in said
    assert "most visual tokens" not in run(*asked[:-1], "--image-size", "336x336").out


def test_the_table(run):
    lines = run("cost", *SAVING).out.splitlines()
    found = estimate(read_config("llava-1.5-7b"), "fitprune", save=0.6, text_tokens=75)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    rows = {int(row[0]): row for row in cells if row[0].isdecimal()}
    assert len(rows) == 32
    for layer in found.layers:
        assert rows[layer.layer] == [
            str(layer.layer),
            "75",
            str(layer.visual_in),
            str(layer.visual_out),
            f"{layer.macs / 1e9:.3f}",
            f"{layer.visual_macs / 1e9:.3f}",
            f"{layer.cache_bytes / 1e6:.3f}",
        ]
    assert cells[-1][:4] == ["all", "", "mean 245.0", ""]
    assert cells[-1][4] == f"{found.macs / 1e9:.1f}"
    assert lines[-3].startswith(
        "Saved against no pruning: 59.7 % of the visual tokens' FLOPs, 53.0 % of all, "
    )
    assert lines[-2] == f"Counted: {FORMULA}."
    assert lines[-1].startswith("Apart: ranking ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "prumerge"], "depends on the image; give their number as visual_tokens"),
        (
            ["--model", "llava-1.5-13b", "--method", "fitprune", "--save", "0.6"],
            "Make one with `jaxprune calibrate`",
        ),
        (["--method", "prumerge,uniform", "--keep", "3"], "are vision-side"),
        (["--method", "uniform", "--keep", "3", "--visual-tokens", "3"], "leave out visual_tokens"),
        (["--method", "prumerge", "--visual-tokens", "145"], "an image has 144 before pruning"),
        (["--visual-tokens", "99999999999999999999"], "from 0 to 1,000,000"),
        (["--text-tokens", "-3"], "expected a number from 0"),
        (["--image-size", "big"], "--image-size is 'big'; expected pixels, e.g. 672x672"),
        (["--image-size", "0x672"], "expected pixels"),
        (["--image-size", "672"], "expected pixels"),
        (["--method", "fastv", "--option", "prompt=1"], "prompt is none"),
        (["--method", "fastv", "--option", "text_tokens=1"], "text_tokens is none"),
        (["--option", "c"], "expected name=value"),
        (
            ["--model", "llava-9b"],
            "llava-9b does not exist; expected the directory of a model. It is no preset either",
        ),
        (["--dtype", "int4"], "dtype is 'int4'"),
    ],
)
def test_mistakes(arguments, message, refused):
    assert message in refused("cost", *arguments)
