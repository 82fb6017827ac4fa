"""`jaxprune bench`: what it asks for, and its table."""

import importlib
import json

from jaxprune.reports.bench import Measured

module = importlib.import_module("jaxprune.reports.bench")
LIMITS = {"float32_macs": 1e9, "bfloat16_macs": 2e9, "bytes": 5e9}
STAGES = ("preprocess", "encode", "select", "prefill", "decode", "first", "all")


def test_json_of_a_run(tiny_directory, run, monkeypatch):
    monkeypatch.setattr(module, "ceilings", lambda: LIMITS)
    asked = ["--model", tiny_directory, "--method", "none", "--method", "uniform:keep=4"]
    done = run("bench", *asked, "--new-tokens", 3, "--rounds", 1, "--batch", 2, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [row["method"] for row in found["rows"]] == ["none", "uniform:keep=4"]
    assert [row["visual_tokens"] for row in found["rows"]] == [16, 4]
    assert set(found["machine"]) == {"date", "device", "python", "jax", "jaxprune", "dtype"}
    assert found["ceilings"] == LIMITS


def test_the_table(tiny_directory, run, monkeypatch):
    asked = {}

    def bench(params, images, prompt, methods, **fields):
        asked.update(images=images, prompt=prompt, methods=methods, **fields)
        figures = {
            "visual_tokens": 12.25,
            "seconds": {stage: (i + 1) / 1000 for i, stage in enumerate(STAGES)},
            "spread": {},
            "speedup": {"first": 1.0, "decode": 1.5, "all": 1.25},
            "prefill_of_ceiling": 0.5,
            "decode_of_ceiling": 0.25,
            "compile_seconds": 3.25,
            "peak_bytes": 3 * 2**29,
        }
        return [Measured(label, **figures) for label, _ in methods], LIMITS

    monkeypatch.setattr(module, "bench", bench)
    monkeypatch.setenv("COLUMNS", "200")  # so that no cell is wrapped
    labels = ["prumerge_plus:keep=4;order=raster", "uniform,vtw:keep=4", "vtw"]
    methods = [word for label in labels for word in ("--method", label)]
    sizes = ["--batch", 2, "--rounds", 3, "--new-tokens", 9]
    done = run("bench", "--model", tiny_directory, "--prompt", "Why?", *methods, *sizes)
    assert [image.size for image in asked.pop("images")] == [(384, 384)] * 2
    assert asked == {
        "prompt": "Why?",
        "methods": [
            (labels[0], {"method": "prumerge_plus", "keep": 4, "order": "raster"}),
            (labels[1], {"method": ("uniform", "vtw"), "keep": 4}),
            (labels[2], {"method": "vtw"}),
        ],
        "new_tokens": 9,
        "rounds": 3,
    }
    lines = done.out.splitlines()
    (row,) = (line for line in lines if line.startswith("│ vtw "))
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "vtw",
        "12.2",
        "2.0",
        "3.0",
        "4.0",
        "5.0 (1.50x)",
        "7.0 (1.25x)",
        "50 %",
        "25 %",
        "3.2 s",
        "1.50 GiB",
    ]
    assert "Ceilings: 2 float32 and 4 bfloat16 GFLOP/s of a matrix product, 5.0 GB/s" in done.out
    assert lines[-1].startswith("date ") and lines[-1].endswith("dtype float32")


def test_mistakes(tiny_directory, refused):
    asked = ["bench", "--model", tiny_directory]
    assert "--batch is 0; expected a whole number, 1 or more" in refused(*asked, "--batch", 0)
    assert "--new-tokens is 1; expected a whole number, 2 or more" in refused(
        *asked, "--new-tokens", 1
    )
    assert "There is no argument prompt" in refused(*asked, "--method", "none:prompt=Why")
    assert "has: keep" in refused(*asked, "--method", "uniform:keep=4;c=1")
