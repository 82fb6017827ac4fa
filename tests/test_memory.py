"""What a request takes is estimated before it is tried."""

import functools

import jax
import numpy as np
import pytest

import jaxprune
from jaxprune import memory, stages
from jaxprune.memory import check_memory, request_bytes
from jaxprune.models.llama import LlamaConfig
from jaxprune.models.llava import LlavaConfig
from jaxprune.models.registry import family
from jaxprune.ops.schedule import NO_CUTS
from jaxprune.request import Row, lay_out
from jaxprune.sampling import make_sampling
from tests.test_generate import picture


@pytest.mark.parametrize("batch, slots", [(1, 640), (4, 640), (1, 2400)])
def test_the_estimate_is_near_what_xla_allocates(batch, slots):
    text = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(text_config=text)
    params = family(config).param_shapes(config)
    layout = lay_out([Row([[1] * slots], [])] * batch, np.zeros(0, int), 0, batch=batch,
                     sequence=slots)  # fmt: skip
    fields = (layout.token_ids, layout.visual_index, layout.kind, layout.lengths)
    tokens = jax.eval_shape(functools.partial(stages.embed, config=config), params, *fields, None)
    sampling = make_sampling(temperature=0, top_k=None, top_p=None, seeds=[0] * batch, vocab_size=9)
    compiled = stages.prefill.lower(
        params, tokens, None, layout.lengths, np.int32(batch), sampling, np.array([2], np.int32),
        config=config, schedule=NO_CUTS, new_slots=16, greedy=True,
    ).compile()  # fmt: skip
    sizes = compiled.memory_analysis()
    found = sum(request_bytes(config, batch=batch, slots=slots, schedule=NO_CUTS, new_slots=16))
    allocated = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    assert 0.6 < found / allocated < 1.7


def test_what_does_not_fit_is_refused_with_what_would():
    config = LlavaConfig.llava_1_5_7b(dtype="bfloat16")
    sizes = {"slots": 640, "schedule": NO_CUTS, "new_slots": 128}
    check_memory(config, batch=8, **sizes, free=16 << 30)
    with pytest.raises(jaxprune.UserError, match=r"64 rows of 640 .* about \d+ prompts at once"):
        check_memory(config, batch=64, **sizes, free=8 << 30)
    with pytest.raises(jaxprune.UserError, match="What may fit: fewer new tokens"):
        check_memory(config, batch=1, **sizes, free=1 << 20)
    check_memory(config, batch=64, **sizes, free=8 << 30, devices=8)


def test_a_request_over_the_memory_leaves_the_next_alone(tiny_model, monkeypatch):
    with monkeypatch.context() as low:
        low.setattr(memory, "free_bytes", lambda: 1000)
        with pytest.raises(jaxprune.UserError, match="are free"):
            jaxprune.generate(tiny_model, picture(0), "What?")
    assert isinstance(jaxprune.generate(tiny_model, picture(0), "What?", max_new_tokens=2), str)


def test_memory_is_known_here():
    assert memory.peak_bytes() > 1 << 20
    assert memory.free_bytes() is None or memory.free_bytes() > 1 << 20
