"""Every stage lowers for CPU, CUDA and TPU from any machine."""

import functools

import jax
import jax.export
import numpy as np
import pytest

import jaxprune
from jaxprune.engine import stages
from jaxprune.engine.sampling import Ask, make_sampling
from jaxprune.engine.schedules import candidates_left, gather_schedule, mask_schedule
from jaxprune.engine.shapes import RowRoom
from jaxprune.inputs.layout import ImageRoom, lay_out
from jaxprune.inputs.request import Row
from jaxprune.models.registry import depth_of, family_of
from jaxprune.ops.cuts import NO_CUTS
from jaxprune.ops.tiles import VisualSize, pack_tilings
from tests import builders
from tests.cases import mostly_slow

PLATFORMS = ("cpu", "cuda", "tpu")
DECODER = {
    "none": None,
    "fitprune": jaxprune.FitPrune(deletions=(3, 5, 2), num_tokens=16),
    "fastv": jaxprune.FastV(layer=1, positions="renumber"),
}
CASES = [
    ("none", False, "float32"),
    ("none", True, "bfloat16"),
    ("fitprune", True, "float32"),
    ("fitprune", False, "bfloat16"),
    ("fastv", False, "bfloat16"),
]


def lowered(function, *arguments, **static):
    """Export for each platform; the result's shapes."""
    shapes = jax.eval_shape(functools.partial(function, **static), *arguments)
    described = [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]
    for platform in PLATFORMS:
        found = jax.export.export(function, platforms=(platform,))(*arguments, **static)
        assert found.platforms == (platform,)
        assert [(x.shape, x.dtype) for x in found.out_avals] == described
    return shapes


@pytest.mark.parametrize("name, tiled, dtype", mostly_slow(CASES, CASES[1:2]))
def test_every_stage_lowers(name, tiled, dtype):
    make = builders.tiny_next_config if tiled else builders.tiny_config
    config = make(text={"dtype": dtype}, vision={"dtype": dtype})
    params = family_of(config).param_shapes(config)
    tiling = config.tiling(VisualSize(60, 90))
    packing = pack_tilings(
        [tiling], images=1, tiles=tiling.tiles, image_tiles=tiling.tiles, slots=tiling.num_tokens
    )
    side, method = config.tower.tile_size, jaxprune.PruMergePlus()
    pixels = jax.ShapeDtypeStruct((tiling.tiles, side, side, 3), np.float32)
    vision = lowered(stages.encode, params, pixels, config=config, signals=method.signals)
    lowered(stages.count, vision, packing, None, method)
    K = 16
    selection = lowered(stages.select, vision, packing, None, method, capacity=K, images=1)
    # Longer than a block, so that both ways of attention are in the program.
    text, one = 600, np.array([K])
    room = ImageRoom(one, one, np.zeros(1, int), K)
    layout = lay_out([Row([[1] * 300, [1] * 300], [0])], room, batch=1, sequence=text + K)
    tokens = lowered(stages.embed, params, layout.embedded, selection, config=config)
    decoder, schedule, left = DECODER[name], NO_CUTS, None
    if decoder is not None:
        depth = depth_of(config)
        schedule = gather_schedule(decoder, depth, RowRoom(text, K), distinct=8)
        left = candidates_left(decoder, depth, layout)
    sampling = make_sampling(
        [Ask(temperature=1.0)], batch=1, vocab_size=config.text_config.vocab_size
    )
    eos = np.array([2], np.int32)
    state, *_ = lowered(
        stages.prefill, params, tokens, left, layout.next_position, np.int32(1), sampling, eos,
        config=config, schedule=schedule, new_slots=16,
    )  # fmt: skip
    questions = np.full((1, 8), -1, np.int32)
    lowered(stages.embed_questions, params, questions, config=config)
    if decoder is not None:
        masked = mask_schedule(decoder, depth, RowRoom(text, K))
        layout = layout.embedded
        lowered(stages.record, params, layout, selection, left, config=config, schedule=masked)
        lowered(
            stages.score, params, layout, selection, left, questions, config=config,
            schedule=masked,
        )  # fmt: skip
    until = np.full(1, 4, np.int32)
    lowered(stages.decode, params, state, until, sampling, eos, config=config)
