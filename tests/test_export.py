"""Every stage lowers for CPU, CUDA and TPU from any machine."""

import functools

import jax
import jax.export
import numpy as np
import pytest

import jaxprune
from jaxprune.engine import stages
from jaxprune.engine.lengths import candidates_left, gather_schedule
from jaxprune.engine.sampling import make_sampling
from jaxprune.engine.shapes import Lengths
from jaxprune.inputs.request import Row, lay_out
from jaxprune.methods import Depth
from jaxprune.models.registry import family
from jaxprune.ops.cuts import NO_CUTS
from jaxprune.ops.tiles import pack_tilings
from tests import builders

PLATFORMS = ("cpu", "cuda", "tpu")
DECODER = {
    "none": None,
    "fitprune": jaxprune.FitPrune(deletions=(3, 5, 2), num_tokens=16),
    "fastv": jaxprune.FastV(layer=1),
}


def lowered(function, *arguments, **static):
    """Export for all platforms; the result's shapes."""
    found = jax.export.export(function, platforms=PLATFORMS)(*arguments, **static)
    assert found.platforms == PLATFORMS
    assert found.mlir_module().count("stablehlo") > 10
    return jax.eval_shape(functools.partial(function, **static), *arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DECODER)
@pytest.mark.parametrize("tiled", [False, True])
def test_every_stage_lowers(name, dtype, tiled):
    make = builders.tiny_next_config if tiled else builders.tiny_config
    config = make(text={"dtype": dtype}, vision={"dtype": dtype})
    params = family(config).param_shapes(config)
    tiling = config.tiling(60, 90)
    packing = pack_tilings(
        [tiling], images=1, tiles=tiling.tiles, image_tiles=tiling.tiles, slots=tiling.num_tokens
    )
    side, method = config.vision_config.image_size, jaxprune.PruMergePlus()
    pixels = jax.ShapeDtypeStruct((tiling.tiles, side, side, 3), np.float32)
    vision = lowered(stages.encode, params, pixels, config=config, signals=method.signals)
    lowered(stages.count, vision, packing, config=config, method=method)
    K = 16
    selection = lowered(
        stages.select, vision, packing, config=config, method=method, capacity=K, images=1
    )
    # Longer than a block, so that both ways of attention are in the program.
    text = 600
    layout = lay_out(
        [Row([[1] * 300, [1] * 300], [0])], np.array([K]), K, batch=1, sequence=text + K
    )
    fields = (layout.token_ids, layout.visual_index, layout.kind, layout.lengths)
    tokens = lowered(stages.embed, params, *fields, selection, config=config)
    decoder, schedule, left = DECODER[name], NO_CUTS, None
    if decoder is not None:
        depth = Depth("llava", config.text_config.num_hidden_layers)
        schedule = gather_schedule(decoder, depth, Lengths(text, K), distinct=8)
        left = candidates_left(decoder, depth, layout.kind, np.array([K]))
    sampling = make_sampling(temperature=1.0, top_k=None, top_p=None, seeds=[0], vocab_size=9)
    eos = np.array([2], np.int32)
    state, _, _ = lowered(
        stages.prefill, params, tokens, left, layout.lengths, np.int32(1), sampling, eos,
        config=config, schedule=schedule, new_slots=16, greedy=False,
    )  # fmt: skip
    lowered(stages.decode, params, state, np.int32(4), sampling, eos, config=config, greedy=False)
