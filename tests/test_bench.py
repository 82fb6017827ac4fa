"""`jaxprune bench` on the tiny model."""

import json
import subprocess
import sys

import pytest

import jaxprune
from jaxprune.reports.bench import bench
from tests import builders
from tests.test_generate import picture


def test_rows_and_ceilings(tiny_model):
    methods = [("none", {"method": "none"}), ("few", {"method": "uniform", "keep": 4})]
    rows, ceilings = bench(tiny_model, [picture(0)] * 2, "What?", methods, new_tokens=4, rounds=2)
    assert [row.method for row in rows] == ["none", "few"]
    assert [row.visual_tokens for row in rows] == [16, 4]
    assert rows[0].speedup == {"first": 1, "decode": 1, "all": 1}
    for row in rows:
        first = sum(row.seconds[stage] for stage in ("encode", "select", "prefill"))
        assert first > 0
        assert 0 < row.seconds["decode"] < row.seconds["all"]
        assert 0 < row.prefill_of_ceiling < 1
        assert row.decode_of_ceiling > 0
        assert row.peak_bytes > 0
    assert rows[0].compile_seconds > 0
    assert set(ceilings) == {"float32_macs", "bfloat16_macs", "bytes"}


@pytest.mark.parametrize("change", [{"new_tokens": 1}, {"rounds": 0}, {"methods": []}])
def test_mistakes(change, tiny_model):
    fields = {"methods": [("none", {})], **change}
    with pytest.raises(jaxprune.UserError, match="needs a method"):
        bench(tiny_model, [picture(0)], "What?", **fields)


def test_the_command(tmp_path):
    builders.write_directory(tmp_path / "m", builders.tiny_config())
    command = [sys.executable, "-m", "jaxprune", "bench", "--model", str(tmp_path / "m")]
    command += ["--method", "none", "--method", "uniform:keep=4", "--new-tokens", "3"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--batch", "2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["method"] for row in found["rows"]] == ["none", "uniform:keep=4"]
    assert {"date", "device", "jax", "dtype"} <= set(found["machine"])
    wrong = subprocess.run([*command, "--batch", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--batch is 0" in wrong.stderr
