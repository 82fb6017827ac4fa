"""What the TPU's own compiler makes of our programs; needs its wheel, and no TPU."""

import dataclasses
import importlib.util
import os
from typing import Any

import pytest

import jaxprune
from jaxprune.reports.compiled import compiled, largest_batch, smallest_slice
from tests.compilers.builders import FITPRUNE, LAYERS, config, stages, written_scores

# The library ends the process where XLA_FLAGS has flags that it does not know.
USABLE = importlib.util.find_spec("libtpu") and "xla_" not in os.environ.get("XLA_FLAGS", "")
pytestmark = pytest.mark.skipif(not USABLE, reason="run `make test-tpu`")


@pytest.mark.parametrize(
    "method, batch, options",
    [
        ("none", 1, {}),
        ("none", 8, {}),
        ("fitprune", 1, FITPRUNE),
        ("prumerge_plus", 1, {"keep": 144}),
    ],
)
def test_prefill_copies_no_weight_and_writes_no_scores(method, batch, options):
    prefill = stages("v5e", method, batch=batch, only=("prefill",), **options)["prefill"]
    assert prefill.copied == ()
    assert written_scores(prefill) == []


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_decode_copies_neither_weights_nor_a_prompts_cache(batch):
    decode = stages("v5e", batch=batch, only=("decode",))["decode"]
    slots = 640
    assert not [one for one in decode.copied if f",{slots}," in one.shape]
    assert not [one for one in decode.copied if "4096" in one.shape]
    caches = 2 * LAYERS * batch * 32 * (slots + 128) * 128 * 2
    assert decode.temporary_bytes < 0.05 * caches + 2 * 2**20
    # The compiler's own estimate and the bytes: neither is far from what the bytes allow.
    assert decode.estimated_seconds < 1.35 * decode.bound_seconds


def test_weights_of_8_bits_are_read_as_they_are():
    decode, wide = (
        stages("v5e", batch=1, only=("decode",), dtype=dtype)["decode"]
        for dtype in ("int8", "bfloat16")
    )
    assert not [one for one in decode.written if one.shape.startswith(("bf16[4096,", "f32[4096,"))]
    # Half of all bytes but for the caches' and the head's.
    assert decode.estimated_seconds < 0.7 * wide.estimated_seconds


@pytest.mark.parametrize("data", [1, 2])
def test_a_slice_of_four_sums_twice_a_layer_and_gathers_nothing_large(data):
    """Rows over "data" need nothing more than that."""
    found = stages("v5e:2x2", batch=2, data=data)
    for name, tokens in (("prefill", 640), ("decode", 1)):
        number, size = found[name].collectives["all-reduce"]
        states = 2 // data * tokens * 4096 * 2  # bytes of a chip's rows
        # Two a layer and the embeddings'; what else there is are numbers: the likeliest token,
        # whether any row goes on.
        assert size < (2 * LAYERS + 1) * states + 2**17
        assert 2 * LAYERS < number <= 2 * LAYERS + 5
        assert found[name].collectives.get("all-gather", (0, 0))[1] < 2**20
        assert set(found[name].collectives) <= {"all-reduce", "all-gather"}


def test_what_fits():
    most = largest_batch(config(layers=20), "v5e", only=("decode",), show_progress=False)
    assert most.fits and most.batch == 16
    # 19 GB of weights, and a chip has 16 GiB.
    large = config("llava-1.5-13b", layers=30)
    found = smallest_slice(large, "v5e", only=("decode",), show_progress=False)
    assert found.target == "v5e:2x2" and found.fits


def test_a_tower():
    whole: Any = jaxprune.read_config("internvl2-1b")
    tower = dataclasses.replace(whole.vision_config, num_hidden_layers=2)
    few = dataclasses.replace(whole, vision_config=tower)
    (encode,) = compiled(few, "v5e", only=("encode",), show_progress=False).stages
    assert encode.copied == ()
    assert written_scores(encode) == []


def test_a_slice_that_there_is_not():
    with pytest.raises(jaxprune.UserError, match=r"knows no v5e:3x3 .*; slices that are offered"):
        compiled(config(), "v5e:3x3", show_progress=False)
