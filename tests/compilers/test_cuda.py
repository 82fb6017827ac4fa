"""What CUDA's own compiler makes of our programs for an H100; needs its wheels, and no GPU."""

import importlib.util

import pytest

from tests.compilers.builders import FITPRUNE, LAYERS, stages, written_scores

USABLE = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
    "jax_plugins.xla_cuda12"
)
pytestmark = pytest.mark.skipif(not USABLE, reason="run `make test-cuda`")


@pytest.mark.parametrize(
    "model, method, options",
    [
        ("llava-1.5-7b", "none", {}),
        ("llava-1.5-7b", "fitprune", FITPRUNE),
        ("llava-1.5-7b", "prumerge_plus", {"keep": 144}),
        ("llava-1.6-vicuna-7b", "none", {}),
    ],
)
def test_prefill_of_eight_rows_writes_few_scores(model, method, options):
    prefill = stages("h100", method, batch=8, model=model, only=("prefill",), **options)["prefill"]
    assert written_scores(prefill) == []
    assert not [one for one in prefill.copied if "4096" in one.shape]


@pytest.mark.parametrize(
    "batch, dtype", [(1, "bfloat16"), (8, "bfloat16"), (32, "bfloat16"), (8, "int8")]
)
def test_decode_copies_neither_weights_nor_caches(batch, dtype):
    decode = stages("h100", batch=batch, dtype=dtype, only=("decode",))["decode"]
    assert decode.copied == ()
    caches = 2 * LAYERS * batch * 32 * (640 + 128) * 128 * 2
    assert decode.temporary_bytes < 0.05 * caches + 2 * 2**20
