"""What a request takes is estimated before it is tried."""

import functools

import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.engine import stages
from jaxprune.engine.footprint import (
    check_memory,
    check_tower_memory,
    request_bytes,
    tower_bytes,
)
from jaxprune.inputs.layout import NO_IMAGES, lay_out
from jaxprune.inputs.request import Row
from jaxprune.models.clip import ClipVisionConfig
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import family_of
from jaxprune.ops.cuts import NO_CUTS
from tests.cases import picture


@pytest.mark.parametrize("batch, slots", [(1, 640), (4, 640), (1, 2400)])
def test_the_estimate_is_near_what_xla_allocates(batch, slots):
    text = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(text_config=text)
    params = family_of(config).param_shapes(config)
    layout = lay_out([Row([[1] * slots], [])] * batch, NO_IMAGES, batch=batch, sequence=slots)
    embed = functools.partial(stages.embed, config=config)
    tokens = jax.eval_shape(embed, params, layout.embedded, None)
    compiled = stages.prefill.lower(
        params, tokens, None, layout.next_position, np.int32(batch), None,
        np.array([2], np.int32),
        config=config, schedule=NO_CUTS, new_slots=16,
    ).compile()  # fmt: skip
    sizes = compiled.memory_analysis()
    found = sum(request_bytes(config, batch=batch, slots=slots, schedule=NO_CUTS, new_slots=16))
    allocated = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    assert 0.6 < found / allocated < 1.7


@pytest.mark.parametrize(
    "tiles, method", [(1, jaxprune.PruMergePlus), (6, jaxprune.PruMergePlus), (6, jaxprune.MMTok)]
)
def test_the_towers_estimate_is_near_what_xla_allocates(tiles, method):
    vision = ClipVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    config = LlavaConfig(vision_config=vision)
    params = family_of(config).param_shapes(config)
    pixels = jax.ShapeDtypeStruct((tiles, 336, 336, 3), np.float32)
    signals = method.signals
    compiled = stages.encode.lower(params, pixels, config=config, signals=signals).compile()
    sizes = compiled.memory_analysis()
    allocated = pixels.size * 4 + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    assert 0.6 < sum(tower_bytes(config, tiles, signals)) / allocated < 1.7


def test_what_does_not_fit_is_refused_with_what_would():
    config = LlavaConfig.llava_1_5_7b(dtype="bfloat16")
    sizes = {"slots": 640, "schedule": NO_CUTS, "new_slots": 128}
    check_memory(config, batch=8, **sizes, free=16 << 30)
    with pytest.raises(jaxprune.UserError, match=r"64 rows of 640 .* fit: 16 prompts at once"):
        check_memory(config, batch=64, **sizes, batches=(1, 8, 16, 32, 64), free=8 << 30)
    with pytest.raises(jaxprune.UserError, match="What may fit: fewer new tokens"):
        check_memory(config, batch=1, **sizes, free=1 << 20)
    check_memory(config, batch=64, **sizes, free=8 << 30, devices=8)
    check_tower_memory(config, tiles=8, free=1 << 30)
    with pytest.raises(jaxprune.UserError, match=r"320 tiles .* fit: 8 images at once"):
        check_tower_memory(config, tiles=320, images=(1, 8, 64), image_tiles=5, free=1 << 30)


def test_a_request_over_the_memory_leaves_the_next_alone(tiny_model, monkeypatch):
    expected = jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=2)
    with monkeypatch.context() as low:
        low.setattr("jaxprune.engine.engine.free_bytes", lambda devices: 1000)
        with pytest.raises(jaxprune.UserError, match="are free"):
            jaxprune.generate(tiny_model, picture(0), "What?")
    assert jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=2) == expected
