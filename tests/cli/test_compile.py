"""`jaxprune compile`: what it prints, and mistakes; the compilers have tests of their own."""

import dataclasses
import importlib
import importlib.util
import json

import pytest

from jaxprune.devices.hlo import Written
from jaxprune.reports.compiled import Compiled, StageReport

command = importlib.import_module("jaxprune.cli.compile")  # where the name is a function

STAGE = StageReport(
    stage="decode",
    compile_seconds=1.5,
    argument_bytes=3 * 10**9,
    output_bytes=10**6,
    temporary_bytes=2 * 10**6,
    bound_seconds=0.004,
    bound_by="bytes",
    estimated_seconds=0.005,
    copied=(Written("copy", "bf16[8,8]", 128, 3),),
    written=(),
    collectives={"all-reduce": (5, 10**6)},
)
FOUND = Compiled("v5e:2x2", (1, 4), 8, 640, 128, (STAGE,), 2**30, 2**31, 15 * 2**30)


@pytest.fixture
def asked(monkeypatch):
    """What the command asks for; it is given FOUND."""
    calls = []
    found = [FOUND]
    for name in ("compiled", "largest_batch", "smallest_slice"):
        monkeypatch.setattr(
            command, name, lambda *a, name=name, **k: (calls.append((name, a, k)), found[0])[1]
        )
    return calls, found


@pytest.mark.parametrize(
    "options, name",
    [
        ([], "compiled"),
        (["--fit", "batch"], "largest_batch"),
        (["--fit", "slice"], "smallest_slice"),
    ],
)
def test_what_is_asked_and_printed(options, name, run, asked):
    done = run(
        "compile", "--target", "v5e:2x2", "--model", "llava-1.6-vicuna-7b", "--batch", 8,
        "--method", "fitprune", "--save", 0.6, "--image-size", "1008x336", "--data", 2, *options,
    )  # fmt: skip
    ((called, (config, target), given),) = asked[0]
    assert (called, target, done.code) == (name, "v5e:2x2", 0)
    assert config.text_config.num_hidden_layers == 32 and config.dtype == "bfloat16"
    sizes = given["sizes"]
    assert (sizes.batch, sizes.image_size.height, sizes.image_size.width) == (8, 336, 1008)
    assert (given["method"], given["save"], given["data"]) == ("fitprune", 0.6, 2)
    row = next(line for line in done.out.splitlines() if "decode" in line and "│" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:3] == ["decode", "1.5", "3,000.0 MB"]
    assert cells[6:8] == ["4.00 (bytes)", "5.00"]
    assert "A chip needs 2.00 GiB, of which weights 1.00; usable are 15.00: it fits." in done.out


def test_json(run, asked):
    done = run("compile", "--target", "v5e:2x2", "--json")
    found = json.loads(done.out)
    assert found["fits"] is True and found["stages"][0]["copied"][0]["bytes"] == 128
    assert found["stages"][0]["collectives"] == {"all-reduce": [5, 10**6]}


def test_what_does_not_fit_is_a_mistake(run, asked):
    asked[1][0] = dataclasses.replace(FOUND, needed_bytes=2**40)
    done = run("compile", "--target", "v5e:2x2")
    assert done.code == 2 and "It does not fit on v5e:2x2" in done.err
    assert "it does not fit" in done.out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--target", "v9"], "The target 'v9' is unknown; expected one of v4, v5e"),
        (["--target", "v5e:2x2x2"], "The shape of v5e is '2x2x2'; expected two numbers"),
        (["--target", "v5e", "--batch", 0], "--batch is 0; expected a whole number, 1 or more"),
        (["--target", "v5e", "--fit", "all"], "--fit is 'all'; expected one of: batch, slice"),
        (["--target", "v5e", "--method", "prumerge"], "depends on the image; give their number"),
        (["--target", "v5e", "--method", "fitprun"], "Did you mean 'fitprune'?"),
        (["--target", "v5e:2x2", "--data", 3], "which does not divide the 4 of v5e:2x2"),
        (["--target", "v5e", "--image-size", "1x"], "--image-size is '1x'"),
        (["--target", "v5e", "--text-tokens", 10**6], "over the largest bucket"),
    ],
)
def test_mistakes(options, message, run):
    done = run("compile", *options)
    assert done.code == 2 and done.out == "" and message in " ".join(done.err.split())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler(run):
    done = run("compile", "--target", "v5e")
    assert done.code == 2 and "pip install 'jaxprune[tpu-compile]'" in " ".join(done.err.split())
